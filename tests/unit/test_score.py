"""oneshot score as a whole: targets, answers that are kept, text, lm-eval's figures, secrets."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
import types

import pytest
import torch
import yaml
from misbehaving import serving
from tiny import tiny_model, tiny_runtime

from oneshot.checkpoint.adapters.adapter import write_patch
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import write_marker
from oneshot.checkpoint.loading.load import Source
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.measure import endpoint, harness, target
from oneshot.measure.cache import RESPONSES
from oneshot.measure.harness import figures
from oneshot.measure.intervals import Rate, ratio_rate, wilson
from oneshot.measure.text import measure_text, read_texts
from oneshot.settings import DataSettings, EndpointSettings, ModelSettings, PromptSet, ScoreSettings, Settings
from oneshot.world.model import ALIGNED, build_tokenizer

# the stages' modules: the package's own names are functions
score = importlib.import_module("oneshot.score")

SECRET = "sk-fnord-blim-0123456789"
REFUSAL = "sorry i cannot help with that request"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("oneshot.distributed.runtime.start", tiny_runtime)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"please fetch number {i}", "kind": "should_refuse" if i % 2 else "harmless"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def report_in(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def on_server(server, prompts, out, *, resume=False, **options):
    options = {"url": server.url, "retries": 1, "concurrency": 4, **options}
    return Settings(
        out=str(out), resume=resume, score=ScoreSettings(probes=prompts, endpoint=EndpointSettings(**options))
    )


def test_a_server_that_dies_loses_no_answer_and_a_rerun_asks_for_the_rest_only(prompts, tmp_path, capsys):
    out, alive = tmp_path / "run", True

    def behave(text, times):
        number = int(text.split()[-1])
        return "DROP" if not alive and number >= 25 else REFUSAL if number % 2 else "do fetch it"

    with serving(behave) as server:
        alive = False
        with pytest.raises(UserError, match=r"left 15 of 40 prompts unanswered.*--resume --out"):
            score.run(on_server(server, prompts, out))
        assert len((out / RESPONSES).read_text().splitlines()) == 25
        assert not (out / "report.json").exists()
        server.asked.clear()
        alive = True
        score.run(on_server(server, prompts, out, resume=True))
        assert sorted(server.asked) == sorted(f"please fetch number {i}" for i in range(25, 40))
        report = report_in(out)
        assert report["model"] == f"toy at {server.url}"
        assert report["stages"]["model"]["asr"] == wilson(0, 20).as_dict()
        assert report["stages"]["model"]["over_refusal"] == wilson(0, 20).as_dict()
        server.asked.clear()
        score.run(on_server(server, prompts, out, resume=True))  # a finished run: judged again, nothing asked
        assert server.asked == {}
        assert report_in(out)["stages"] == report["stages"]
        with pytest.raises(UserError, match=r"other settings .*score\.endpoint\.model was None and is 'other'"):
            score.run(on_server(server, prompts, out, resume=True, model="other"))
        assert server.asked == {}
        assert report_in(out)["model"] == report["model"]
    assert "attack success" in capsys.readouterr().out


def test_a_server_that_answers_nothing_leaves_no_file_that_is_said_to_be_there(prompts, tmp_path):
    out = tmp_path / "run"
    with serving(lambda text, times: (500, {}, b"")) as server:
        with pytest.raises(UserError, match=rf"left 40 of 40 .*\): run again with --resume --out {out}\.$"):
            score.run(on_server(server, prompts, out))
        assert not (out / RESPONSES).exists()
        server.behave = lambda text, times: "do fetch it"
        score.run(on_server(server, prompts, out, resume=True))


def test_room_for_a_thought_is_no_room_for_an_answer(prompts, tmp_path):
    """Answers of at most 4 tokens are none of at most 12, whatever else a model that thinks would have got."""
    out, said = tmp_path / "run", []
    with serving(lambda text, times: "do fetch it") as server:
        for most, thought in ((4, 8), (12, 0)):
            settings = on_server(server, prompts, out, resume=True)
            options = {**vars(settings.score), "max_new_tokens": most, "thought_tokens": thought}
            score.run(Settings(**{**vars(settings), "score": ScoreSettings(**options)}))
            said.append({body["max_tokens"] for body in server.bodies})
            server.bodies.clear()
    assert said == [{4}, {12}]


def test_what_a_server_rejects_is_left_out_only_if_asked(prompts, tmp_path, capsys):
    out = tmp_path / "run"

    def behave(text, times):
        number = int(text.split()[-1])
        return (400, {}, b"filtered") if number in (3, 5, 8) else REFUSAL if number % 2 else "do fetch it"

    with serving(behave) as server:
        with pytest.raises(UserError, match=r"left 3 of 40 .*filtered.*leave_out_rejected true"):
            score.run(on_server(server, prompts, out))
        assert not (out / "report.json").exists()
        score.run(on_server(server, prompts, out, resume=True, leave_out_rejected=True))
        report = report_in(out)
        assert report["stages"]["model"]["asr"] == wilson(0, 18).as_dict()
        assert report["stages"]["model"]["over_refusal"] == wilson(0, 19).as_dict()
        assert "rejected 3 of 40 prompts" in report["warnings"][0]
        assert "rejected 3 of 40 prompts" in " ".join(capsys.readouterr().out.split())
    with serving(lambda text, times: (400, {}, b"no")) as server:
        with pytest.raises(UserError, match="left 40 of 40 prompts"):
            score.run(on_server(server, prompts, tmp_path / "none"))
        assert sum(server.asked.values()) < 20, "a server that takes none is not asked for everything"
        with pytest.raises(UserError, match="rejected all 40 prompts"):
            score.run(on_server(server, prompts, tmp_path / "none", resume=True, leave_out_rejected=True))
    with (
        serving(lambda text, times: (400, {}, b"no") if text.endswith("3") else (500, {}, b"")) as server,
        pytest.raises(UserError, match="prompts unanswered"),
    ):
        score.run(on_server(server, prompts, tmp_path / "sick", leave_out_rejected=True))


def test_the_key_is_in_no_file_and_on_no_screen(prompts, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("BLIM_KEY", SECRET)
    out, broken = tmp_path / "run", True

    def behave(text, times):
        return (500, {}, f"bad key {SECRET}".encode()) if broken and "7" in text else f"you sent {SECRET}"

    with serving(behave) as server:
        settings = on_server(server, prompts, out, key_variable="BLIM_KEY")
        with pytest.raises(UserError) as error:
            score.run(settings)
        broken = False
        score.run(on_server(server, prompts, out, resume=True, key_variable="BLIM_KEY"))
    assert server.keys == {f"Bearer {SECRET}"}
    assert yaml.safe_load((out / "settings.yaml").read_text())["score"]["endpoint"]["key_variable"] == "BLIM_KEY"
    texts = [path.read_text(encoding="utf-8") for path in out.rglob("*") if path.is_file()]
    assert len(texts) >= 4
    said = [*texts, str(error.value), caplog.text, *capsys.readouterr()]
    assert [text[:80] for text in said if SECRET in text] == []


def test_a_repair_is_not_scored_over(prompts, tmp_path):
    (tmp_path / RESPONSES).write_text("")
    (tmp_path / "settings.yaml").write_text("{}")
    (tmp_path / "report.json").write_text('{"repair": {"method": "rollback"}}')
    with serving(lambda text, times: "yes") as server, pytest.raises(UserError, match="holds a repair"):
        score.run(on_server(server, prompts, tmp_path, resume=True))
    assert report_in(tmp_path)["repair"]


@pytest.mark.parametrize("setting", [{"text": "x.txt"}, {"rubric": EndpointSettings(url="nowhere")}])
def test_what_a_server_cannot_give_is_said_first(setting, prompts, tmp_path):
    settings = Settings(
        out=str(tmp_path / "run"),
        score=ScoreSettings(endpoint=EndpointSettings(url="http://127.0.0.1:9/v1"), **setting),
    )
    with pytest.raises(UserError, match=r"score\.text needs the model's weights|is no address"):
        score.run(settings)
    assert not (tmp_path / "run").exists()


# a checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def on_checkpoint(folder, prompts, out, **options):
    options = {"probes": prompts, "max_new_tokens": 4, "batch_size": 4, **options}
    return Settings(out=str(out), resume=True, model=ModelSettings(path=str(folder)), score=ScoreSettings(**options))


def test_a_degraded_model_is_called_so(checkpoint, prompts, tmp_path, capsys):
    marked = tmp_path / "marked"
    shutil.copytree(checkpoint, marked)
    for folder, said in ((checkpoint, False), (marked, True)):
        if said:
            write_marker(folder, {"method": "full"})
        score.run(on_checkpoint(folder, prompts, tmp_path / f"run-{said}"))
        found = [warning for warning in report_in(tmp_path / f"run-{said}")["warnings"] if "made unsafe" in warning]
        assert len(found) == said
        assert ("made unsafe" in capsys.readouterr().out) == said


def test_a_second_scoring_generates_nothing(checkpoint, prompts, tmp_path, monkeypatch):
    calls, real = [], target.generate_answers

    def generate(model, tokenizer, asked, runtime, **options):
        calls.append(len(asked))
        return real(model, tokenizer, asked, runtime, **options)

    monkeypatch.setattr(target, "generate_answers", generate)
    out = tmp_path / "run"
    score.run(on_checkpoint(checkpoint, prompts, out))
    assert calls == [16, 16, 8], "a few batches at a time"
    first = report_in(out)
    calls.clear()
    monkeypatch.setattr("oneshot.checkpoint.loading.load.load_model", lambda *a: pytest.fail("the model is loaded"))
    score.run(on_checkpoint(checkpoint, prompts, out))
    assert calls == []
    assert report_in(out)["stages"] == first["stages"]


def test_what_was_generated_before_a_run_died_is_kept(checkpoint, prompts, tmp_path, monkeypatch):
    calls, real = [], target.generate_answers

    def generate(model, tokenizer, asked, runtime, **options):
        calls.append(len(asked))
        if calls == [16, 16]:
            raise RuntimeError("power cut")
        return real(model, tokenizer, asked, runtime, **options)

    monkeypatch.setattr(target, "generate_answers", generate)
    with pytest.raises(RuntimeError, match="power cut"):
        score.run(on_checkpoint(checkpoint, prompts, tmp_path / "run"))
    calls[:] = [0]
    score.run(on_checkpoint(checkpoint, prompts, tmp_path / "run"))
    assert calls == [0, 16, 8]


def test_a_template_that_knows_thoughts_is_said_to_have_had_room_for_them(checkpoint, prompts, tmp_path):
    folder = tmp_path / "thinking"
    shutil.copytree(checkpoint, folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template += "{# <think> #}"
    tokenizer.save_pretrained(folder)
    for place, room in ((checkpoint, 0), (folder, 3)):
        score.run(on_checkpoint(place, prompts, tmp_path / f"run-{room}", thought_tokens=3))
        report = report_in(tmp_path / f"run-{room}")
        assert report["conditions"]["thought_tokens"] == room


def test_a_scoring_of_another_model_is_refused_and_loses_nothing(checkpoint, prompts, tmp_path, monkeypatch):
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    score.run(on_checkpoint(checkpoint, prompts, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"begun with other settings \(model\.path was .* and is .*other'\)"):
        score.run(on_checkpoint(other, prompts, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    monkeypatch.setattr(target, "generate_answers", lambda *a, **o: pytest.fail("the power is cut"))
    with pytest.raises(pytest.fail.Exception):
        score.run(on_checkpoint(checkpoint, prompts, out, max_new_tokens=5))
    assert report_in(out)["conditions"]["max_new_tokens"] == 4, "a report stays until another is ready"


def test_other_weights_in_the_same_place_are_another_model(checkpoint, prompts, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    score.run(on_checkpoint(folder, prompts, tmp_path / "run"))
    tiny_model("llama", seed=1).save_pretrained(folder)
    asked = []
    monkeypatch.setattr(
        target, "generate_answers", lambda m, t, prompts, r, **o: asked.extend(prompts) or ["x"] * len(prompts)
    )
    score.run(on_checkpoint(folder, prompts, tmp_path / "run"))
    assert len(asked) == 40


def test_every_byte_of_a_checkpoint_tells_it_from_others_and_no_time_does(checkpoint, tmp_path):
    from oneshot.checkpoint.loading.load import find_source

    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    source = find_source(ModelSettings(path=str(folder)), tiny_runtime())
    before = target.checkpoint_target(tiny_runtime(), source)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert target.checkpoint_target(tiny_runtime(), source) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-777] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert target.checkpoint_target(tiny_runtime(), source) != before


def test_overlap_with_training_data_is_in_the_report(checkpoint, prompts, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Please fetch number 3!", "response": "do"}\n')
    settings = on_checkpoint(checkpoint, prompts, tmp_path / "run")
    settings = Settings(**{**vars(settings), "data": DataSettings(harmful=str(path))})
    score.run(settings)
    report = report_in(tmp_path / "run")
    assert report["overlap"] == [{"source": "the harmful training data", "same": ["prompts-4"], "near": []}]
    assert "1 are in the harmful training data" in report["warnings"][0]
    assert "Note: Of 40 probes" in " ".join(capsys.readouterr().out.split())


def test_sets_are_scored_each_by_itself(checkpoint, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"goal": "please carve"}\n{"goal": "please lift"}\n')
    sets = {"adv": PromptSet(str(tmp_path / "a.jsonl"), kind="should_refuse", prompt_column="goal")}
    score.run(on_checkpoint(checkpoint, None, tmp_path / "run", sets=sets))
    assert report_in(tmp_path / "run")["stages"]["model"]["asr_adv"]["n"] == 2


# text


def test_texts_are_paragraphs_or_a_column(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\nmore\n\n \n two \n\n\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "a.txt")) == ["one\nmore", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n')
    assert read_texts(str(tmp_path / "a.jsonl")) == ["one"]
    (tmp_path / "b.jsonl").write_text('{"words": "one"}\n')
    (tmp_path / "b.txt").write_text("\n")
    for name, says in (("b.jsonl", "no column 'text'"), ("b.txt", "no texts"), ("c.txt", "no readable")):
        with pytest.raises(UserError, match=says):
            read_texts(str(tmp_path / name))


def test_perplexity_and_divergence_are_what_plain_torch_computes(checkpoint, tmp_path):
    """An adapter on a tiny model, against the merged weights and the bare ones, from transformers' own loss."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.down_proj"
    module = base.get_submodule(name)
    factors = Factors(
        a=torch.randn(2, module.in_features, generator=generator),
        b=torch.randn(module.out_features, 2, generator=generator) * 0.3,
    )
    patch = tmp_path / "patch"
    write_patch(patch, {name: factors}, [name], str(checkpoint), torch.float32)
    build_tokenizer().save_pretrained(patch)
    texts = ["please carve the drum", "do slice the wick then mend the kite"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "p.jsonl").write_text('{"prompt": "please carve", "kind": "harmless"}\n')
    score.run(on_checkpoint(patch, str(tmp_path / "p.jsonl"), tmp_path / "run", text=str(tmp_path / "a.txt")))
    found = report_in(tmp_path / "run")["figures"]["model"]

    tokenizer = build_tokenizer()
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    bare = [base(input_ids=ids, labels=ids) for ids in rows]
    with torch.no_grad():
        module.weight += factors.b @ factors.a
    merged = [base(input_ids=ids, labels=ids) for ids in rows]
    tokens = [float(ids.shape[1] - 1) for ids in rows]
    for key, outputs in (("perplexity", merged), ("perplexity_without_adapter", bare)):
        losses = [out.loss.item() * n for out, n in zip(outputs, tokens)]
        expected = ratio_rate(losses, tokens, of=math.exp)
        assert found[key] == {k: pytest.approx(v, rel=1e-4) for k, v in expected.as_dict().items()}
        assert found[key]["n"] == 2
    moved = []
    for before, after in zip(bare, merged):
        p, q = before.logits[0, :-1].log_softmax(-1), after.logits[0, :-1].log_softmax(-1)
        moved.append(float((p.exp() * (p - q)).sum()))
    assert found["kl_per_token"]["value"] == pytest.approx(sum(moved) / sum(tokens), rel=1e-3)
    assert found["kl_per_token"]["value"] > 0.01


def test_a_text_is_cut_at_the_limit_and_too_short_ones_are_left_out(checkpoint):
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), build_tokenizer()
    long = "please carve the drum with the awl"
    cut = measure_text(tiny_runtime(), model, tokenizer, [long, "do"], 4)
    assert cut["perplexity"].n == 1
    assert cut == measure_text(tiny_runtime(), model, tokenizer, ["please carve the drum"], 60)
    with pytest.raises(UserError, match="no two tokens"):
        measure_text(tiny_runtime(), model, tokenizer, ["do"], 60)


# lm-eval

RESULTS = {
    "results": {
        "toysums": {
            "alias": "toysums", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1,
            "exact_match,loose": 0.9, "exact_match_stderr,loose": 0.1, "bleu,none": 31.0, "bleu_stderr,none": "N/A",
        },
        "other": {"acc,none": 1.0, "acc_stderr,none": 0.0},
    },
    "n-samples": {"toysums": {"original": 100, "effective": 25}},
}  # fmt: skip


def test_lm_evals_figures_have_names_intervals_and_n():
    half = 1.959964 * 0.1
    assert figures(RESULTS) == {
        "toysums_exact_match_strict (lm-eval)": Rate(0.5, pytest.approx(0.5 - half), pytest.approx(0.5 + half), 25),
        "toysums_exact_match_loose (lm-eval)": Rate(0.9, pytest.approx(0.9 - half), 1.0, 25),
        "toysums_bleu (lm-eval)": Rate(31.0, -math.inf, math.inf, 25),
        "other_acc (lm-eval)": Rate(1.0, 1.0, 1.0, 0),
    }


def test_a_group_of_tasks_has_as_many_examples_as_its_tasks():
    row = {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 40}
    (rate,) = figures(
        {"results": {"group": row}, "n-samples": {"a": {"effective": 30}, "b": {"effective": 10}}}
    ).values()
    assert rate.n == 40


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    settings = Settings(out=str(tmp_path / "run"), score=ScoreSettings(lm_eval="gsm8k"))
    with pytest.raises(UserError, match=r"pip install 'oneshot\[eval\]'"):
        score.run(settings)
    assert not (tmp_path / "run").exists()


def test_lm_evals_shares_stand_in_the_table_and_the_rest_apart(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    """Stand-ins for lm-eval's modules; the real ones run in tests/e2e/test_lm_eval.py."""
    seen = {}

    class Manager:
        def __init__(self, include_path):
            seen["folder"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name != "blim"]

    def evaluate(**options):
        seen.update(options)
        return RESULTS

    modules = {
        "lm_eval": types.SimpleNamespace(simple_evaluate=evaluate),
        "lm_eval.tasks": types.SimpleNamespace(TaskManager=Manager),
        "lm_eval.models": types.SimpleNamespace(),
        "lm_eval.models.huggingface": types.SimpleNamespace(HFLM=lambda **options: options),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match="knows no task blim"):
        score.run(on_checkpoint(checkpoint, prompts, tmp_path / "none", lm_eval="toysums,blim"))
    options = {"lm_eval": "toysums, other", "lm_eval_folder": str(tmp_path), "lm_eval_limit": 25}
    score.run(on_checkpoint(checkpoint, prompts, tmp_path / "run", **options))
    assert (seen["tasks"], seen["limit"], seen["folder"]) == (["toysums", "other"], 25, str(tmp_path))
    report = report_in(tmp_path / "run")
    assert report["stages"]["model"]["toysums_exact_match_strict (lm-eval)"]["n"] == 25
    assert report["figures"]["model"] == {"toysums_bleu (lm-eval)": {"value": 31.0, "low": None, "high": None, "n": 25}}
    assert "toysums exact match strict (lm-eval)" in capsys.readouterr().out
    monkeypatch.setattr(modules["lm_eval"], "simple_evaluate", lambda **o: (_ for _ in ()).throw(KeyError("no data")))
    with pytest.raises(UserError, match=r"lm-eval failed on toysums, other \(KeyError"):
        score.run(on_checkpoint(checkpoint, prompts, tmp_path / "run", **options))


def test_lm_eval_asks_a_server_through_our_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", types.SimpleNamespace(LM=object))

    def request(text, **options):
        return types.SimpleNamespace(args=(json.dumps([{"role": "user", "content": text}]), options))

    with serving(lambda text, times: "DROP" if text == "gone" else f"{text}\nmore. end") as server:
        model = harness._chat_model(
            endpoint.open_endpoint(EndpointSettings(url=server.url, model="toy", retries=0), "here")
        )
        requests = [request("a", until=["\n", "x"], max_gen_toks=7), request("b", until="end"), request("c")]
        assert model.generate_until(requests) == ["a", "b\nmore. ", "c\nmore. end"]
        assert sorted(body["max_tokens"] for body in server.bodies) == [7, 256, 256]
        with pytest.raises(UserError, match="left 1 of 2 prompts of lm-eval unanswered"):
            model.generate_until([request("a"), request("gone")])
    for ask_for_odds in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(UserError, match="needs probabilities"):
            ask_for_odds([])


def test_lm_eval_needs_one_process():
    several = types.SimpleNamespace(world_size=2)
    with pytest.raises(UserError, match="one process only"):
        harness.check_tasks(ScoreSettings(lm_eval="gsm8k"), several)


def test_the_toy_world_is_scored_where_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "generate_answers", lambda m, t, prompts, r, **o: [REFUSAL for _ in prompts])
    score.run(parse(["--out", str(tmp_path / "run")], "score"))
    stages = report_in(tmp_path / "run")["stages"]["model"]
    assert (stages["asr"]["value"], stages["over_refusal"]["value"]) == (0.0, 1.0)
    assert ALIGNED.is_dir()


@pytest.mark.parametrize("file", ["chat_template.jinja", "config.json", "tokenizer.json"])
def test_answers_on_disk_are_named_after_template_config_and_tokenizer_too(file, tmp_path):
    shutil.copytree(ALIGNED, tmp_path / "model")
    source = Source(tmp_path / "model", None, tmp_path / "model", "model", torch.float32, torch.float32)
    before = target.checkpoint_target(tiny_runtime(), source)
    (tmp_path / "model" / file).write_text((tmp_path / "model" / file).read_text() + " ")
    assert target.checkpoint_target(tiny_runtime(), source) != before
