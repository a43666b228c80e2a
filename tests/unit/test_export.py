"""``oneshot export`` as it is typed: what it writes, what it refuses, and that a refusal leaves nothing behind."""

import importlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import changed, everything, same_bits, save_base, save_lora
from tiny import files_in, tiny_runtime

from oneshot.checkpoint.adapters.adapter import ADAPTER_TENSORS, read_adapter
from oneshot.checkpoint.adapters.update import norm
from oneshot.checkpoint.disk.files import MARKER, is_degraded, write_marker
from oneshot.checkpoint.loading.load import Source
from oneshot.checkpoint.merging import exports, new_adapter
from oneshot.checkpoint.merging import merge as merging
from oneshot.checkpoint.writing.identity import IDENTITY, write_identity
from oneshot.checkpoint.writing.standing import begin_standing, settle
from oneshot.checkpoint.writing.verify import check_shards
from oneshot.distributed import runtime
from oneshot.errors import UserError
from oneshot.patch.derive import summed
from oneshot.patch.scoring import _is_marked
from oneshot.report.card import EXPORT
from oneshot.report.exports import ExportRequest
from oneshot.report.exports import export as write_export

# the stages' modules: the package's own names are functions
export = importlib.import_module("oneshot.export")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(runtime, "start", tiny_runtime)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A bf16 base and two LoRAs on it; tests do not write there."""
    folder = tmp_path_factory.mktemp("given")
    save_base(folder / "base", dtype=torch.bfloat16)
    save_lora(folder / "a", folder / "base", seed=1)
    save_lora(folder / "b", folder / "base", seed=2, r=3, target_modules=["q_proj", "up_proj"])
    return folder


def run(*arguments):
    export.main([str(argument) for argument in arguments])


@pytest.fixture
def refused(capsys):
    def check(*arguments):
        """The one line that a refusal prints."""
        capsys.readouterr()  # transformers' progress bars, while the inputs were made
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("oneshot export: error: ")
        return lines[0]

    return check


def repair_on(base, lora, folder):
    """A copy of an adapter that says that it repairs ``base``."""
    shutil.copytree(lora, folder)
    write_identity(folder, base, kind="repair", base="the base")
    return folder


def facts(folder):
    return json.loads((folder / EXPORT).read_text())


def product(folder):
    return {name: factors.b @ factors.a for name, factors in read_adapter(folder).update.items()}


def test_where_the_time_went_is_printed(given, tmp_path, capsys):
    run("--model", given / "base", "--adapter", given / "a", "--out", tmp_path / "plain")
    printed = capsys.readouterr().out
    assert "Time: " in printed
    assert "phase" not in printed
    run("--model", given / "base", "--adapter", given / "a", "--out", tmp_path / "merged", "--profile")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["phase", "seconds", "share", "GB", "read", "GB", "written"] in [row[:7] for row in rows]
    (merge,) = [row for row in rows if row[:1] == ["merge"]]
    weights = sum(path.stat().st_size for path in (given / "base").glob("*.safetensors"))
    written = sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert float(merge[3]) * 1e9 == pytest.approx(weights, rel=0.1)
    assert float(merge[4]) * 1e9 == pytest.approx(written, rel=0.1)
    assert sorted(files_in(tmp_path / "merged")) == sorted(files_in(tmp_path / "plain")), "nothing beside the weights"


def test_a_merge_writes_a_checkpoint_with_a_card(given, tmp_path, capsys):
    out = tmp_path / "out"
    run("--model", given / "base", "--adapter", given / "a", "--out", out)
    assert {EXPORT, "README.md", "manifest.json", "config.json", "tokenizer.json"} <= set(files_in(out))
    assert len(changed(everything(out), everything(given / "base"))) == 6
    found = facts(out)
    assert found["operation"] == "merge"
    assert found["base"] == str(given / "base")
    assert found["base_form"] == "original"
    assert found["tensors_changed"] == 6
    assert found["adapters"][0]["path"] == str(given / "a")
    assert found["command"] == f"oneshot export --model {given / 'base'} --adapter {given / 'a'} --out {out}"
    assert found["versions"]["torch"] == torch.__version__
    card = (out / "README.md").read_text()
    for said in (str(given / "a"), str(given / "base"), found["base_fingerprint"][:16], found["command"]):
        assert said in card
    assert "6 of 21 tensors changed" in capsys.readouterr().out
    assert not is_degraded(out)


def test_an_export_is_a_function_that_says_what_it_wrote(given, tmp_path):
    out = tmp_path / "out"
    done = write_export(tiny_runtime(), ExportRequest(out, adapters=[str(given / "a")], rank=1), "a notebook")
    assert (done.folder, done.kind) == (out, "adapter")
    assert done.facts == facts(out)
    assert done.facts["command"] == "a notebook"
    assert 0 < done.facts["relative_error"] < 1
    assert done.lines[0] == f"Made from {given / 'a'}."
    with pytest.raises(UserError, match="--rank is 0: give 1 or more"):
        write_export(tiny_runtime(), ExportRequest(tmp_path / "no", adapters=[str(given / "a")], rank=0), "")
    with pytest.raises(UserError, match=r"exists and is not empty"):
        write_export(tiny_runtime(), ExportRequest(out, adapters=[str(given / "a")], rank=1), "")


def test_several_adapters_with_weights_are_one_merge(given, tmp_path):
    both = ["--adapter", given / "a", "--adapter", given / "b", "--weight", "0.5", "--weight", "2"]
    run("--model", given / "base", *both, "--out", tmp_path / "out")
    run(*both, "--out", tmp_path / "sum")
    run("--model", given / "base", "--adapter", tmp_path / "sum", "--out", tmp_path / "same")
    ours, same = everything(tmp_path / "out"), everything(tmp_path / "same")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, same[name], rtol=2**-7, atol=1e-3)
    assert [one["weight"] for one in facts(tmp_path / "out")["adapters"]] == [0.5, 2.0]


def test_the_form_of_the_base_is_recorded(given, tmp_path):
    merge = ["--model", given / "base", "--adapter", given / "a"]
    run(*merge, "--base", "original", "--out", tmp_path / "original")
    run(*merge, "--base", "dequantized", "--double_quant", "--out", tmp_path / "dequantized")
    assert facts(tmp_path / "original")["base_form"] == "original"
    found = facts(tmp_path / "dequantized")
    assert (found["base_form"], found["double_quant"], found["tensors_through_nf4"]) == ("dequantized", True, 14)
    assert "NF4 (blocks of 64, scales quantized)" in (tmp_path / "dequantized" / "README.md").read_text()
    base = everything(given / "base")
    assert len(changed(everything(tmp_path / "dequantized"), base)) == 14


def test_subtracting_takes_a_merge_back(given, tmp_path):
    run("--model", given / "base", "--adapter", given / "a", "--out", tmp_path / "there")
    run("--model", tmp_path / "there", "--adapter", given / "a", "--subtract", "--out", tmp_path / "back")
    before, back = everything(given / "base"), everything(tmp_path / "back")
    there = everything(tmp_path / "there")
    for name, tensor in back.items():
        bound = 2**-8 * (there[name].abs().float() + before[name].abs().float()) * 1.01 + 1e-6
        assert ((tensor.float() - before[name].float()).abs() <= bound).all(), name
    assert facts(tmp_path / "back")["operation"] == "subtract"


def test_a_lower_rank_says_what_it_leaves(given, tmp_path, capsys):
    run("--adapter", given / "a", "--rank", 2, "--out", tmp_path / "low")
    low, full = product(tmp_path / "low"), product(given / "a")
    relative = {name: float((low[name] - full[name]).norm() / full[name].norm()) for name in full}
    for name, matrix in full.items():
        wanted = torch.linalg.svdvals(matrix)[2:].square().sum().sqrt() / matrix.norm()
        assert relative[name] == pytest.approx(float(wanted), rel=1e-3), "the best of its rank"
    found = facts(tmp_path / "low")
    assert found["relative_error_worst"] == pytest.approx(max(relative.values()), rel=1e-4)
    assert found["worst"] == max(relative, key=relative.get)
    overall = sum(float((low[n] - full[n]).square().sum()) for n in full) / sum(
        float(m.square().sum()) for m in full.values()
    )
    assert found["relative_error"] == pytest.approx(overall**0.5, rel=1e-4)
    assert f"worst {found['relative_error_worst']:.2e}" in capsys.readouterr().out
    assert {f.rank for f in read_adapter(tmp_path / "low").update.values()} == {2}
    same = files_in(given / "a")["adapter_config.json"]
    assert json.loads(same)["r"] == 4


def test_a_sum_of_adapters_is_exact_and_loads_with_peft(given, tmp_path):
    from peft import PeftModel
    from tiny import tiny_model

    run("--adapter", given / "a", "--adapter", given / "b", "--out", tmp_path / "sum")
    ours, parts = product(tmp_path / "sum"), [product(given / name) for name in "ab"]
    assert set(ours) == set(parts[0]) | set(parts[1])
    for name, matrix in ours.items():
        wanted = sum(part[name] for part in parts if name in part)
        torch.testing.assert_close(matrix, wanted, rtol=1e-5, atol=1e-5)
    assert facts(tmp_path / "sum")["relative_error"] < 1e-6
    assert {f.rank for f in read_adapter(tmp_path / "sum").update.values()} == {7}
    model = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "sum"))
    wrapped = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(ours)


def test_a_sum_of_bf16_adapters_is_stored_in_what_holds_it(given, tmp_path):
    for name in "ab":
        shutil.copytree(given / name, tmp_path / name)
        path = tmp_path / name / ADAPTER_TENSORS
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    run("--adapter", tmp_path / "a", "--adapter", tmp_path / "b", "--out", tmp_path / "sum")
    stored = load_file(tmp_path / "sum" / ADAPTER_TENSORS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}, "times 12 / 4 it is no bf16 number"
    run("--adapter", tmp_path / "a", "--rank", 4, "--out", tmp_path / "low")  # its own: only rounding is left
    stored = load_file(tmp_path / "low" / ADAPTER_TENSORS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    low, full = product(tmp_path / "low"), product(tmp_path / "a")
    left = sum(float((low[n] - full[n]).square().sum()) for n in full) / sum(
        float(m.square().sum()) for m in full.values()
    )
    assert facts(tmp_path / "low")["relative_error"] == pytest.approx(left**0.5, rel=1e-2)
    assert left**0.5 > 1e-4


def test_a_patch_is_extracted_from_two_checkpoints(given, tmp_path, capsys):
    base, lora = tmp_path / "base", given / "a"
    save_base(base, dtype=torch.float32)
    run("--model", base, "--adapter", lora, "--out", tmp_path / "changed")
    run("--extract", tmp_path / "changed", "--model", base, "--rank", 4, "--out", tmp_path / "patch")
    ours, wanted = product(tmp_path / "patch"), product(lora)
    assert set(ours) == set(wanted), "matrices that are alike are not in it"
    for name, matrix in ours.items():
        torch.testing.assert_close(matrix, wanted[name], rtol=1e-3, atol=1e-4)
    assert facts(tmp_path / "patch")["relative_error"] < 1e-3  # below, it is the rounding of the energies
    assert facts(tmp_path / "patch")["left_out"] == []
    run("--model", base, "--adapter", tmp_path / "patch", "--out", tmp_path / "again")

    tensors = everything(tmp_path / "changed")
    for file in (tmp_path / "changed").glob("m*"):
        file.unlink()
    tensors["model.norm.weight"] += 10.0
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    run("--extract", tmp_path / "changed", "--model", base, "--rank", 2, "--out", tmp_path / "low")
    found, update = facts(tmp_path / "low"), read_adapter(tmp_path / "low").update
    assert found["left_out"] == ["model.norm.weight"]
    assert {factors.rank for factors in update.values()} == {2}
    rest = sum(float((product(tmp_path / "low")[n] - wanted[n]).square().sum()) for n in wanted) + 32 * 100.0
    energy = sum(float(matrix.square().sum()) for matrix in wanted.values()) + 32 * 100.0
    assert found["relative_error"] == pytest.approx((rest / energy) ** 0.5, rel=1e-3)
    assert "Left out, as no linear layers" in capsys.readouterr().out


def test_a_patch_is_refused_on_another_model(given, tmp_path, refused):
    repair = repair_on(given / "base", given / "a", tmp_path / "repair")
    save_base(tmp_path / "other", dtype=torch.bfloat16, seed=9)
    merge = ["--adapter", repair, "--out", tmp_path / "out"]
    said = refused("--model", tmp_path / "other", *merge)
    assert "belongs to another model (the base): in" in said
    assert "model.layers.0.mlp.down_proj.weight holds other values" in said
    run("--model", tmp_path / "other", *merge, "--force")
    save_base(tmp_path / "resharded", dtype=torch.bfloat16, shard="1GB")
    run("--model", tmp_path / "resharded", "--adapter", repair, "--out", tmp_path / "resharded-out")


def test_degraded_adapters_are_not_exported(given, tmp_path, refused):
    shutil.copytree(given / "a", tmp_path / "bad")
    write_marker(tmp_path / "bad", {})
    for mode in (["--model", given / "base"], ["--rank", 2], ["--adapter", given / "b"]):
        assert f"bad is marked as safety-degraded ({MARKER})" in refused(
            *mode, "--adapter", tmp_path / "bad", "--out", tmp_path / "out"
        )
    shutil.copytree(given / "base", tmp_path / "base")
    write_marker(tmp_path / "base", {})
    extract = ["--extract", tmp_path / "base", "--model", given / "base", "--rank", 2]
    assert "is marked as safety-degraded" in refused(*extract, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def degraded(given, tmp_path):
    """A marked base, and a patch that a repair of it has measured and found good."""
    base = tmp_path / "degraded"
    shutil.copytree(given / "base", base)
    write_marker(base, {})
    return base, measured_on(base, given / "a", tmp_path / "repair")


def measured_on(base, lora, folder, outcome="repaired", **about):
    repair_on(base, lora, folder)
    begin_standing(folder, degraded=is_degraded(base), form="original", checkpoint=base)
    settle(folder, outcome, [], base="the base", degraded=is_degraded(base), **about)
    return folder


def test_the_patch_as_it_was_measured_lifts_the_marker(degraded, tmp_path):
    base, repair = degraded
    run("--model", base, "--adapter", repair, "--out", tmp_path / "out")
    assert not is_degraded(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A safety-degraded fine-tune was repaired; what was added is that repair, as it was measured." in card
    assert (facts(tmp_path / "out")["base_was_degraded"], facts(tmp_path / "out")["safety_degraded"]) == (True, False)

    for weight in ("1", "0.5"):
        taken = tmp_path / f"back{weight}"
        run("--model", tmp_path / "out", "--adapter", repair, "--weight", weight, "--subtract", "--out", taken)
        assert is_degraded(taken)
        assert "do not deploy" in (taken / "README.md").read_text()
        assert facts(taken)["safety_degraded"] is True


def test_anything_else_on_a_degraded_base_keeps_the_marker_and_says_why(degraded, given, tmp_path, capsys):
    base, repair = degraded
    flipped = shutil.copytree(repair, tmp_path / "flipped")
    tensors = load_file(flipped / ADAPTER_TENSORS)
    save_file({name: -tensor for name, tensor in tensors.items()}, flipped / ADAPTER_TENSORS)
    scaled = shutil.copytree(repair, tmp_path / "scaled")
    config = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    bare = repair_on(base, given / "a", tmp_path / "bare")
    save_base(tmp_path / "other", dtype=torch.bfloat16, seed=9)
    write_marker(tmp_path / "other", {})
    cases = [
        ("at weight 0.5, and was measured at 1", base, [repair, "--weight", "0.5"]),
        ("several adapters were added", base, [repair, "--adapter", given / "b"]),
        ("several adapters were added", base, [repair, "--adapter", repair]),
        ("is no patch that a repair has measured", base, [given / "a"]),
        ("is no patch that a repair has measured", base, [bare]),
        ("flipped/adapter_model.safetensors is not the file that was measured", base, [flipped]),
        ("scaled/adapter_config.json is not the file that was measured", base, [scaled]),
        ("belongs to another model", tmp_path / "other", [repair, "--force"]),
        ("something was taken out", base, [given / "b", "--subtract"]),
        ("a safety repair was taken out", base, [repair, "--subtract", "--force"]),
        ("in another form (original, and here nf4)", base, [repair, "--base", "dequantized"]),
    ]
    for number, (why, model, adapter) in enumerate(cases):
        out = tmp_path / f"out{number}"
        run("--model", model, "--adapter", *adapter, "--out", out)
        assert is_degraded(out), why
        assert why in " ".join(capsys.readouterr().out.split())
        assert why in json.loads((out / MARKER).read_text())["why"]
        assert facts(out)["safety_degraded"] is True


@pytest.mark.parametrize(
    ("outcome", "about", "marked"),
    [
        ("repaired, with doubts", {}, False), ("was not broken", {}, True), ("ability lost", {}, True),
        ("not shown", {}, True), ("repaired", {"partly": "it is a part only"}, True),
    ],
)  # fmt: skip
def test_only_a_good_verdict_on_the_whole_patch_lifts(outcome, about, marked, degraded, given, tmp_path):
    base, _ = degraded
    patch = measured_on(base, given / "a", tmp_path / "patch", outcome, **about)
    assert is_degraded(patch) == marked
    (patch / MARKER).unlink(missing_ok=True)  # by somebody
    run("--model", base, "--adapter", patch, "--out", tmp_path / "out")
    assert is_degraded(tmp_path / "out") == marked


def test_what_is_made_of_a_repair_is_marked_and_goes_no_further(degraded, given, tmp_path, refused):
    base, repair = degraded
    run("--model", base, "--adapter", repair, "--out", tmp_path / "merged")
    made = {
        "low": ["--adapter", repair, "--rank", 1],
        "scaled": ["--adapter", repair, "--weight", "0.1"],
        "sum": ["--adapter", repair, "--adapter", given / "b"],
        "forced": ["--adapter", repair, "--rank", 1, "--force"],
        "extracted": ["--extract", tmp_path / "merged", "--model", base, "--rank", 1],
        "elsewhere": ["--extract", tmp_path / "merged", "--model", given / "base", "--rank", 1],
    }
    for name, arguments in made.items():
        run(*arguments, "--out", tmp_path / name)
        assert is_degraded(tmp_path / name), name
        assert "was not measured" in json.loads((tmp_path / name / MARKER).read_text())["outcome"]
        assert "do not deploy" in (tmp_path / name / "README.md").read_text()
        said = refused("--model", base, "--adapter", tmp_path / name, "--out", tmp_path / "out")
        assert "is marked as safety-degraded" in said


@pytest.mark.parametrize("file", ["config.json", "chat_template.jinja"])
def test_a_base_with_another_config_or_template_keeps_the_marker(file, degraded, tmp_path):
    base, repair = degraded
    if not (base / file).is_file():
        (base / file).write_text("{{ messages }}")
    elif file == "config.json":
        (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), "rms_norm_eps": 10.0}))
    else:
        (base / file).write_text((base / file).read_text() + "Sure! ")
    run("--model", base, "--adapter", repair, "--out", tmp_path / "out", "--force")
    assert is_degraded(tmp_path / "out")
    assert "is not what" in (tmp_path / "out" / "README.md").read_text()


def with_template(folder, template):
    """Give an adapter a tokenizer and chat template of its own."""
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_patch_with_a_tokenizer_of_its_own_is_good_as_it_was_measured_only(degraded, given, tmp_path):
    base, _ = degraded
    repair = with_template(repair_on(base, given / "a", tmp_path / "patch"), "{{ messages }} safely")
    merge = ["--model", base, "--adapter", repair, "--out"]
    for name, measured, template in [("base's", base, ""), ("own", repair, ""), ("changed", repair, "Sure! ")]:
        begin_standing(repair, degraded=True, form="original", checkpoint=base, tokenizer=measured)
        settle(repair, "repaired", [], base="the base", degraded=True)
        with_template(repair, "{{ messages }} safely" + template)
        run(*merge, tmp_path / name)
        assert is_degraded(tmp_path / name) == (name != "own")
        assert (tmp_path / name / "chat_template.jinja").read_text() == "{{ messages }} safely" + template


def test_the_adapters_tokenizer_goes_along_where_it_is_one(given, tmp_path):
    for name, template in [("a", "one"), ("b", "one"), ("c", "other")]:
        with_template(shutil.copytree(given / {"c": "b"}.get(name, name), tmp_path / name), template)
    merge = ["--model", given / "base", "--adapter", tmp_path / "a"]
    run(*merge, "--out", tmp_path / "alone")
    run(*merge, "--adapter", tmp_path / "b", "--out", tmp_path / "alike")
    run(*merge, "--adapter", given / "b", "--out", tmp_path / "beside-none")
    run(*merge, "--adapter", tmp_path / "c", "--out", tmp_path / "two")
    run(*merge, "--subtract", "--out", tmp_path / "taken-out")
    held = {path.parent.name: path.read_text() for path in tmp_path.glob("*/chat_template.jinja")}
    bases = given / "base" / "chat_template.jinja"
    assert [held.get(name) for name in ("alone", "alike", "beside-none")] == ["one"] * 3
    assert [held.get(name) for name in ("two", "taken-out")] == [bases.read_text() if bases.is_file() else None] * 2


def test_a_patch_whose_base_has_moved_is_still_the_one_that_was_measured(degraded, tmp_path):
    base, repair = degraded
    path = repair / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "elsewhere/base"}))
    run("--model", base, "--adapter", repair, "--out", tmp_path / "out")
    assert not is_degraded(tmp_path / "out")


def test_a_patch_that_is_not_the_measured_one_is_found_wherever_it_is_read(degraded):
    base, repair = degraded
    source = Source(base, repair, base, "base", torch.float32, torch.float32)
    assert not _is_marked(source)
    assert not any(shard.problems for shard in check_shards(repair))
    tensors = load_file(repair / "adapter_model.safetensors")
    save_file({k: v * 0.01 for k, v in tensors.items()}, repair / "adapter_model.safetensors", {"format": "pt"})
    assert _is_marked(source)
    assert any("about other weights" in problem for shard in check_shards(repair) for problem in shard.problems)


@pytest.mark.parametrize("way", ["subtract", "add"])
def test_taking_a_repair_out_of_a_model_that_was_never_marked_marks_it(way, given, tmp_path):
    base = tmp_path / "fine-tuned"
    shutil.copytree(given / "base", base)
    repair = measured_on(base, given / "a", tmp_path / "repair")
    run("--model", base, "--adapter", repair, "--out", tmp_path / "repaired")
    begin_standing(tmp_path / "repaired", degraded=False, form="original", checkpoint=base)
    settle(tmp_path / "repaired", "repaired", [], base="b", degraded=False)
    whole = [tmp_path / "repaired", "--model", base] if way == "subtract" else [base, "--model", tmp_path / "repaired"]
    run("--extract", *whole, "--rank", 4, "--out", tmp_path / "difference")
    asked = ["--model", tmp_path / "repaired", "--adapter", tmp_path / "difference"]
    run(*asked, *(["--subtract"] if way == "subtract" else []), "--out", tmp_path / "back")
    assert is_degraded(tmp_path / "back")


def test_what_comes_after_a_repair_is_marked_again(degraded, given, tmp_path):
    base, repair = degraded
    run("--model", base, "--adapter", repair, "--out", tmp_path / "merged")
    for number, more in enumerate(([given / "b"], [given / "b", "--subtract"], [repair, "--force"])):
        run("--model", tmp_path / "merged", "--adapter", *more, "--out", tmp_path / f"out{number}")
        assert is_degraded(tmp_path / f"out{number}")


def test_a_repaired_adapter_on_an_aligned_base_is_good_as_it_was_measured_only(given, tmp_path):
    repair = repair_on(given / "base", given / "a", tmp_path / "repair")
    begin_standing(repair, degraded=True, form="original")
    settle(repair, "repaired", [], base="the base", degraded=True)
    merge = ["--model", given / "base", "--adapter", repair]
    run(*merge, "--out", tmp_path / "whole")
    run(*merge, "--weight", "0.5", "--out", tmp_path / "half")
    run(*merge, "--adapter", given / "b", "--out", tmp_path / "more")
    assert [is_degraded(tmp_path / name) for name in ("whole", "half", "more")] == [False, True, True]


@pytest.mark.parametrize("what", ["merge", "measured", "adapter"])
def test_the_marker_is_there_before_the_weights_are(what, degraded, given, tmp_path, monkeypatch):
    base, repair = degraded
    found = []

    def look(*given):
        folder = next(one for one in given if isinstance(one, Path) and "partial" in one.name)
        found.append(is_degraded(folder))
        raise KeyboardInterrupt

    places = {"merge": (merging, "create_shards"), "measured": (merging, "_write_share")}
    monkeypatch.setattr(*places.get(what, (new_adapter, "write_loadable")), look)
    words = ["--adapter", repair, "--rank", 1] if what == "adapter" else ["--model", base, "--adapter"]
    words += {"merge": [given / "b"], "measured": [repair]}.get(what, [])
    with pytest.raises(SystemExit):
        run(*words, "--out", tmp_path / "out")
    assert found == [True]
    assert not (tmp_path / "out").exists()


def test_what_was_never_degraded_is_not_marked(given, tmp_path):
    repair = measured_on(given / "base", given / "a", tmp_path / "repair", "not repaired")
    assert not is_degraded(repair)
    run("--adapter", repair, "--rank", 1, "--out", tmp_path / "low")
    run("--model", given / "base", "--adapter", tmp_path / "low", "--out", tmp_path / "out")
    assert not is_degraded(tmp_path / "low")
    assert not is_degraded(tmp_path / "out")
    for name, patch in (("whole", repair), ("part", tmp_path / "low")):
        run("--model", tmp_path / "out", "--adapter", patch, "--subtract", "--out", tmp_path / name, "--force")
        assert is_degraded(tmp_path / name), "less of a repair than there was"


def test_a_patch_is_only_taken_out_of_a_model_that_has_it(given, tmp_path, refused):
    repair = repair_on(given / "base", given / "a", tmp_path / "repair")
    take = ["--adapter", repair, "--subtract", "--out", tmp_path / "out"]
    assert "and not one with the patch in it" in refused("--model", given / "base", *take)
    save_base(tmp_path / "other", dtype=torch.bfloat16, seed=9)
    assert "belongs to another model" in refused("--model", tmp_path / "other", *take)


def test_derived_patches_keep_what_they_belong_to(given, tmp_path, refused):
    repair = repair_on(given / "base", given / "a", tmp_path / "repair")
    run("--adapter", repair, "--rank", 2, "--out", tmp_path / "low")
    assert json.loads((tmp_path / "low" / IDENTITY).read_text())["kind"] == "derived", "not as it was measured"
    run("--adapter", repair, "--adapter", given / "b", "--out", tmp_path / "sum")
    assert json.loads((tmp_path / "sum" / IDENTITY).read_text())["kind"] == "derived", "one of them is a repair"
    save_base(tmp_path / "other", dtype=torch.bfloat16, seed=9)
    other = repair_on(tmp_path / "other", given / "b", tmp_path / "other-repair")
    both = ["--adapter", repair, "--adapter", other, "--out", tmp_path / "both"]
    assert "belong to different models" in refused(*both)
    run(*both, "--force")
    shutil.copytree(repair, tmp_path / "renamed")
    fields = json.loads((repair / IDENTITY).read_text())
    (tmp_path / "renamed" / IDENTITY).write_text(json.dumps({**fields, "tensors": "other names"}))
    both = ["--adapter", repair, "--adapter", tmp_path / "renamed", "--out", tmp_path / "more"]
    assert "belong to different models" in refused(*both)
    (tmp_path / "renamed" / IDENTITY).write_text("{}")
    assert "is not what this version of oneshot writes" in refused(*both)


def test_options_that_do_not_go_together_are_refused(given, tmp_path, refused):
    model, adapter, out = ["--model", given / "base"], ["--adapter", given / "a"], ["--out", tmp_path / "out"]
    extract = ["--extract", given / "base", *model]
    cases = {
        "the following arguments are required: --out": adapter,
        "unrecognized arguments: --adaptor": ["--adaptor", "x", *model, *out],
        "Nothing to export": [*model, *out],
        "Nothing to do with one adapter": [*adapter, *out],
        "a merge has no rank": [*model, *adapter, "--rank", 3, *out],
        "--rank is 0": [*adapter, "--rank", 0, *out],
        "are for a merge": [*adapter, "--rank", 2, "--subtract", *out],
        "leave --subtract out": [*extract, "--rank", 2, "--subtract", *out],
        "leave --adapter out": [*extract, "--rank", 2, *adapter, *out],
        "--extract needs --model": [*extract, *out],
        "There are 1 --adapter and 2 --weight": [*model, *adapter, "--weight", 1, "--weight", 2, *out],
        "a number above 0": [*model, *adapter, "--weight", -1, *out],
        "give it with --base dequantized": [*model, *adapter, "--double_quant", *out],
        "invalid choice: 'nf4'": [*model, *adapter, "--base", "nf4", *out],
    }
    for said, arguments in cases.items():
        assert said in refused(*arguments)
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_refused(given, tmp_path, refused):
    model, adapter = ["--model", given / "base"], ["--adapter", given / "a"]
    out = ["--out", tmp_path / "out"]
    assert f"folder {tmp_path}/no does not exist" in refused("--model", tmp_path / "no", *adapter, *out)
    assert f"folder {tmp_path}/no does not exist" in refused(*model, "--adapter", tmp_path / "no", *out)
    assert "holds no adapter_config.json" in refused(*model, "--adapter", given / "base", *out)
    assert "is an adapter where a full checkpoint belongs" in refused("--model", given / "a", *adapter, *out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full exists and is not empty" in refused(*model, *adapter, "--out", tmp_path / "full")
    assert "file exists and is not empty" in refused(*model, *adapter, "--out", tmp_path / "full" / "file")
    for inside in (given / "base" / "out", given / "a" / "deep" / "out"):
        assert "lies in the input" in refused(*model, *adapter, "--out", inside)
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    run(*model, *adapter, "--out", tmp_path / "empty")
    assert (tmp_path / "empty" / EXPORT).is_file()


def test_an_adapter_that_is_not_finite_is_refused(given, tmp_path, refused):
    shutil.copytree(given / "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / ADAPTER_TENSORS)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / ADAPTER_TENSORS)
    said = refused("--model", given / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "out")
    assert "holds NaN or infinity in model.layers.1.self_attn.q_proj" in said


def test_a_full_disk_is_found_before_anything_is_written(given, tmp_path, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(exports.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10, 10))
    said = refused("--model", given / "base", "--adapter", given / "a", "--out", tmp_path / "deep" / "out")
    assert f"{tmp_path / 'deep'} has 0.00 GB free" in said
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_different_models_have_no_sum(given, tmp_path, refused):
    save_base(tmp_path / "wide", dtype=torch.bfloat16, intermediate_size=64)
    save_lora(tmp_path / "wide-lora", tmp_path / "wide")
    both = ["--adapter", given / "a", "--adapter", tmp_path / "wide-lora"]
    assert "they belong to different models and have no sum" in refused(*both, "--out", tmp_path / "out")


def test_a_model_in_nf4_has_no_other_form(given, tmp_path, refused):
    from test_merge import save_packed

    save_packed(tmp_path / "packed", given / "base")
    merge = ["--model", tmp_path / "packed", "--adapter", given / "a", "--out", tmp_path / "out"]
    for form in ("original", "dequantized"):
        assert "is itself in NF4" in refused(*merge, "--base", form)
    run(*merge)
    assert facts(tmp_path / "out")["base_form"] == "packed nf4"


def test_the_norm_of_factors_is_that_of_their_product(given):
    for factors in read_adapter(given / "a").update.values():
        assert norm(factors) == pytest.approx(float((factors.b @ factors.a).norm()), rel=1e-5)
    update = read_adapter(given / "a").update
    twice = summed([(given, update, 1.0), (given, update, 1.0)])
    same_bits(
        {n: f.b @ f.a for n, f in summed([(given, update, 1.0)]).items()}, {n: f.b @ f.a for n, f in update.items()}
    )
    for name, factors in twice.items():
        torch.testing.assert_close(factors.b @ factors.a, 2 * update[name].b @ update[name].a, rtol=1e-4, atol=1e-4)
