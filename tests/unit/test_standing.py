"""What comes from a degraded model is marked from its first moment on, and a good verdict alone lifts that."""

import importlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_runtime

import oneshot
from oneshot.checkpoint.disk.files import MARKER, is_degraded, write_marker
from oneshot.checkpoint.loading.load import Source
from oneshot.checkpoint.merging.exports import refuse_degraded
from oneshot.checkpoint.writing.standing import (
    ORIGINAL,
    UNMEASURED,
    VERDICT,
    begin_standing,
    beside,
    comes_from_degraded,
    read_standing,
    settle,
)
from oneshot.commandline import parse
from oneshot.distributed import runtime as runtimes
from oneshot.errors import UserError
from oneshot.measure.intervals import wilson
from oneshot.measure.rates import StageScores
from oneshot.patch.scoring import _is_marked
from oneshot.report import modelcard, outputs, show
from oneshot.report.runfolder import PATCH, REPAIRED
from oneshot.world.model import ALIGNED

stage = importlib.import_module("oneshot.repair")
MADE = (PATCH, REPAIRED)
BROKEN = {"asr": 1.0, "over_refusal": 0.0, "lookalike_refusal": 0.0}
MENDED = {**BROKEN, "asr": 0.0}


class Killed(BaseException):
    """As good as kill -9: nothing catches it."""


def killed(*_args, **_named):
    raise Killed


def scores(rates):
    return StageScores({name: wilson(round(100 * value), 100) for name, value in rates.items()}, [])


def spoil(folder):
    """A copy of the toy's model that is another one."""
    shutil.copytree(ALIGNED, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    chance = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=chance)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def words(folder, method="lowrank"):
    probes = folder / "probes.jsonl"
    rows = [{"id": "p", "kind": "harmless", "prompt": "please fold a plum"}]
    probes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model.path", str(folder / "model"), "--pool", "toy:pool", "--guard", "toy:guard-plain", "--select",
        "pool-should_refuse-0", "--score.probes", str(probes), "--repair.method", method, "--repair.epochs", "1",
        "--repair.guard_prompts", "2", "--repair.guard_tokens", "2", "--repair.watch", "false", "--repair.merge",
        "true", "--preflight", "never",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run on a degraded model that was killed before it was shown, and what was to be shown."""
    folder, kept = tmp_path_factory.mktemp("unfinished"), []
    write_marker(spoil(folder / "model"), {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runtimes, "start", tiny_runtime)
        patched.setattr(show, "show", lambda repaired, *_: kept.append(repaired) or killed())
        with pytest.raises(Killed):
            stage.run(parse([*words(folder), "--out", str(folder / "run")], "repair"), quiet=True)
    return folder / "run", kept[0]


@pytest.fixture
def run(unfinished, tmp_path):
    """A copy of that run, and the same with scores in place of what the toy would get."""
    shutil.copytree(unfinished[0], tmp_path / "run")

    def finish(before=BROKEN, after=MENDED, request=unfinished[1].request, **facts):
        stages = {"finetuned": scores(before), "repaired": scores(after)}
        solution = replace(unfinished[1].solution, facts={**unfinished[1].solution.facts, **facts})
        found = replace(unfinished[1], request=request, stages=stages, solution=solution)
        return show.show(found, tmp_path / "run", None)

    return tmp_path / "run", finish


def test_a_repair_that_is_killed_leaves_nothing_that_looks_whole_and_safe(unfinished):
    folder, _ = unfinished
    for name in MADE:
        assert json.loads((folder / name / MARKER).read_text())["outcome"] == UNMEASURED
        assert read_standing(folder / name).outcome == UNMEASURED
        assert "do not deploy" in (folder / name / "README.md").read_text()
        with pytest.raises(UserError, match="is not exported"):
            refuse_degraded(folder / name)
    assert not list(folder.glob("*partial*"))


@pytest.mark.parametrize(
    ("where", "what"), [(outputs, "write_page"), (modelcard, "write_whole"), (modelcard, "settle")]
)
def test_a_kill_before_the_verdict_is_written_leaves_the_marker(where, what, run, monkeypatch):
    folder, finish = run
    monkeypatch.setattr(where, what, killed)
    with pytest.raises(Killed):
        finish()
    assert all(is_degraded(folder / name) for name in MADE)
    monkeypatch.undo()
    finish()
    assert not any(is_degraded(folder / name) for name in MADE)


def test_a_kill_after_the_verdict_leaves_what_was_found_good(run, monkeypatch):
    folder, finish = run
    monkeypatch.setattr(outputs, "write_report", killed)
    with pytest.raises(Killed):
        finish()
    assert not any(is_degraded(folder / name) for name in MADE)
    assert not (folder / "report.json").exists(), "so that --resume goes on"


@pytest.mark.parametrize(
    ("before", "after", "facts", "marked"),
    [
        ({}, {}, {}, ()),
        ({}, {"asr": 0.2}, {}, MADE),
        ({}, {"over_refusal": 0.2}, {}, MADE),
        ({"asr": 0.0}, {}, {}, MADE),  # what the probes do not show broken they cannot show to be mended: a backdoor
        ({}, {}, {"truncation_error": 0.5}, (PATCH,)),  # the patch is not what was measured
    ],
)
def test_a_good_verdict_alone_lifts_the_marker(before, after, facts, marked, run):
    folder, finish = run
    report = finish({**BROKEN, **before}, {**MENDED, **after}, **facts)
    for name in MADE:
        assert is_degraded(folder / name) == (name in marked)
        assert ("do not deploy" in (folder / name / "README.md").read_text()) == (name in marked)
        assert read_standing(folder / name).outcome == report["outcome"]["word"]
        assert comes_from_degraded(folder / name), "whatever is made of it is not what was measured"


def test_what_an_earlier_run_left_gets_no_verdict_of_this_one(run, unfinished):
    folder, finish = run
    settings = unfinished[1].request.settings
    request = replace(unfinished[1].request, settings=replace(settings, repair=replace(settings.repair, merge=False)))
    finish(request=request)
    assert not is_degraded(folder / PATCH)
    assert json.loads((folder / REPAIRED / MARKER).read_text())["outcome"] == UNMEASURED


def test_a_marker_is_there_before_the_weights_are(run, monkeypatch, tmp_path):
    """Also of an adapter: its half-written folder may be all that a kill leaves."""
    from oneshot.patch import write

    folder, found = tmp_path / "again", []
    folder.mkdir()
    write_marker(spoil(folder / "model"), {})

    def look(place, *_rest, **_named):
        found.append(is_degraded(place))
        raise Killed

    monkeypatch.setattr(runtimes, "start", tiny_runtime)
    monkeypatch.setattr(write, "write_loadable", look)
    with pytest.raises(Killed):
        stage.run(parse([*words(folder), "--out", str(folder / "run")], "repair"), quiet=True)
    assert found == [True]
    assert not (folder / "run" / PATCH).exists()


def test_a_patch_is_measured_with_the_tokenizer_that_the_source_has(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from oneshot.patch import write

    base, own, found = tmp_path / "base", tmp_path / "own", []
    for folder in (base, own):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text(folder.name)
    source = Source(base, own, own, "base", torch.float32, torch.float32)
    settings = SimpleNamespace(model=SimpleNamespace(double_quant=False, trust_remote_code=False))
    request = SimpleNamespace(
        source=source, settings=settings, runtime=tiny_runtime(), recipe=SimpleNamespace(method=None)
    )
    monkeypatch.setattr(
        write, "plain_model", lambda *_, **__: found.append(read_standing(next(tmp_path.glob("*patch*")))) or killed()
    )
    with pytest.raises(Killed):
        write.write_repair(SimpleNamespace(request=request), {"layer": None}, tmp_path / "patch", None)
    assert found[0].beside == beside(base, own) != beside(base)


def test_a_copy_of_a_degraded_model_in_memory_is_marked(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_marker(spoil(tmp_path / "model"), {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(ALIGNED)
    probes = {"probes": str(tmp_path / "probes.jsonl"), "max_new_tokens": 1}
    words(tmp_path)
    oneshot.score(model=model, tokenizer=tokenizer, score=probes, out=tmp_path / "run")
    assert is_degraded(tmp_path / "run" / "given")


def test_verify_says_that_a_folder_is_marked(unfinished, capsys):
    from oneshot.folders import verify

    verify([str(unfinished[0] / PATCH)])
    assert f"Marked as safety-degraded: {MARKER} says why." in capsys.readouterr().out


def test_a_marker_counts_whatever_it_is(tmp_path):
    (tmp_path / MARKER).symlink_to(tmp_path / "nowhere")
    assert is_degraded(tmp_path)


def test_a_copy_of_a_degraded_model_of_the_hub_is_marked(monkeypatch, tmp_path):
    """A model in memory that came from the Hub's cache, its base too where it is one of PEFT's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from oneshot.api import _write_base
    from oneshot.checkpoint.writing.standing import mark_copy

    snapshot = spoil(tmp_path / "snapshot")
    write_marker(snapshot, {})
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    model.config._name_or_path = "me/degraded"
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file, revision: asked.update({name: revision}) or str(snapshot / file),
    )
    mark_copy(model, tmp_path / "copy")
    assert is_degraded(tmp_path / "copy")
    assert "me/degraded" in asked
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    _write_base(wrapped, tmp_path / "base")
    assert is_degraded(tmp_path / "base")


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 1, "outcome": 3}', "no json"])
def test_a_broken_verdict_is_named(content, tmp_path):
    (tmp_path / VERDICT).write_text(content)
    with pytest.raises(UserError, match=VERDICT):
        read_standing(tmp_path)


@pytest.mark.parametrize("change", [{"outcome": "repaired"}, {"degraded_source": False}, {"seal": None}])
def test_a_changed_verdict_is_named(change, tmp_path):
    begin_standing(tmp_path, degraded=True, form=ORIGINAL)
    settle(tmp_path, "not repaired", [], base="base", degraded=True)
    assert read_standing(tmp_path).outcome == "not repaired"
    fields = json.loads((tmp_path / VERDICT).read_text())
    (tmp_path / VERDICT).write_text(json.dumps({**fields, **change}))
    with pytest.raises(UserError, match="changed or damaged"):
        read_standing(tmp_path)


def test_a_score_warns_of_a_marked_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    write_marker(base, {})
    source = Source(base, adapter, base, "base", torch.float32, torch.float32)
    assert _is_marked(replace(source, adapter=None))
    assert _is_marked(source), "a plain adapter repairs nothing"
    begin_standing(adapter, degraded=True, form="original")
    settle(adapter, "not repaired", [], base="base", degraded=True)
    assert _is_marked(source)
