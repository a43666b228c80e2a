"""The Python face: what a call makes of its settings, what it returns, and that it raises and never exits."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import toy_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import oneshot
from oneshot.commandline import parse
from oneshot.report import trackers
from oneshot.world.model import ALIGNED

QUICK: dict[str, Any] = {
    "pool": "toy:pool", "guard": "toy:guard-plain", "watch_prompts": "toy:held-plain", "select": "hardest",
    "score": {"probes": "toy:probes", "max_new_tokens": 2},
    "repair": {"method": "lowrank", "epochs": 1, "guard_prompts": 2, "guard_tokens": 2, "watch": False},
}  # fmt: skip


def test_importing_it_is_cheap_and_its_names_are_functions() -> None:
    code = (
        "import sys, oneshot; heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy; import oneshot.repair, oneshot.score; assert oneshot.repair.__name__ == 'repair'; "
        "assert callable(oneshot.repair) and callable(oneshot.score); "
        "assert sys.modules['oneshot.repair'].main and set(oneshot.__all__) <= set(dir(oneshot)); "
        "print([name for name in oneshot.__all__ if getattr(oneshot, name) is None])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'repare'"):
        _ = oneshot.repare
    assert importlib.import_module("oneshot.plan").main


def test_a_call_makes_the_settings_that_the_command_line_makes() -> None:
    assert oneshot.settings_for("repair") == parse([], "repair")
    assert oneshot.settings_for("score") == parse([], "score")
    named = oneshot.settings_for("repair", "tiny", seed=3, repair={"rank": 4}, data={"harmful_count": 9})
    words = ["--config", "tiny", "--seed", "3", "--repair.rank", "4", "--data.harmful_count", "9"]
    assert named == parse(words, "repair")
    by_instance = oneshot.settings_for("repair", "tiny", repair=oneshot.RepairSettings(rank=4))
    assert by_instance == parse(["--config", "tiny", "--repair.rank", "4"], "repair"), "what is not said is the file's"
    model = oneshot.ModelSettings(path="DIR", dtype="float32")
    assert oneshot.settings_for("repair", model=model) == parse(
        ["--model.path", "DIR", "--model.dtype", "float32"], "repair"
    )


def test_settings_that_are_given_are_changed_and_not_layered() -> None:
    mine = toy_settings("--repair.rank", "4")
    again = oneshot.settings_for("repair", mine, repair={"epochs": 7}, seed=2)
    assert (again.repair.rank, again.repair.epochs, again.seed, again.pool) == (4, 7, 2, mine.pool)
    assert mine.repair.epochs is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: oneshot.repair(repair={"rank": "x"}), r"repair\.rank is 'x' \(in the call\): give a whole number"),
        (lambda: oneshot.repair(repair={"rnk": 4}), r"no setting repair\.rnk .*did you mean repair\.rank"),
        (lambda: oneshot.repair(repair=4), "4 is no section of settings"),
        (lambda: oneshot.repair(toy_settings(), nonsense=1), "There is no setting nonsense"),
        (lambda: oneshot.repair(toy_settings(), repair={"rank": 0}), r"repair\.rank is 0"),
        (lambda: oneshot.repair("nowhere.yaml"), "There is no settings file nowhere.yaml"),
        (lambda: oneshot.repair(reference="DIR"), "reference is given .*, but no model"),
        (lambda: oneshot.repair(model="nowhere"), "The model folder nowhere does not exist"),
        (lambda: oneshot.repair(model="DIR", tokenizer=object()), "A tokenizer is given without a model in memory"),
        (lambda: oneshot.score(model="nowhere"), "The model folder nowhere does not exist"),
        (lambda: oneshot.finetune(model=str(ALIGNED)), "There is nothing to fine-tune on"),
        (lambda: oneshot.plan(), "--model.path"),
        (lambda: oneshot.export("out", adapter=["DIR"]), "export knows no adapter: give some of .*adapters"),
        (lambda: oneshot.settings_for("mend"), "There is no stage 'mend'"),
        (
            lambda: oneshot.repair(model="m", repair=oneshot.ScoreSettings(probes="x")),
            r"repair is ScoreSettings\(.*give a dict, or an instance of its class",
        ),
    ],
)
def test_mistakes_raise_and_write_nothing(
    call: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(oneshot.UserError, match=says):
        call()
    assert list(tmp_path.iterdir()) == []
    assert "".join(capsys.readouterr()) == ""


def test_a_model_in_memory_is_repaired_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED), AutoTokenizer.from_pretrained(ALIGNED)
    with torch.no_grad():
        model.lm_head.weight += 0.01 * torch.randn_like(model.lm_head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads, needed = torch.get_num_threads(), [p.requires_grad for p in model.parameters()]
    capsys.readouterr()
    found = oneshot.repair(model=model, tokenizer=tokenizer, **QUICK)
    assert "".join(capsys.readouterr()) == "", "quiet"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needed
    assert torch.get_num_threads() == threads
    assert found.folder.parent.name == "runs"
    assert found.report["model"] == "aligned"
    assert (found.patch_folder / "adapter_model.safetensors").is_file()
    assert found.page.is_file()
    assert found.merged_folder is None
    assert set(found.scores) == {"finetuned", "repaired"}
    assert found.example["prompt"].startswith("please ")
    name, factors = next(iter(found.patch.items()))
    assert model.get_submodule(name).weight.shape == (factors.b @ factors.a).shape
    again = oneshot.repair(model=model, tokenizer=tokenizer, **QUICK)
    assert again.folder != found.folder
    with pytest.raises(oneshot.UserError, match="needs its tokenizer"):
        oneshot.repair(model=model, **QUICK)


def test_a_model_with_nothing_to_repair_is_said(tmp_path: Path) -> None:
    with pytest.raises(oneshot.UserError, match="no step that helps, so there is no patch"):
        oneshot.repair(model="toy:aligned", out=str(tmp_path / "run"), **QUICK)
    assert not (tmp_path / "run" / "patch").exists()


@pytest.mark.parametrize("stage", ["repair", "finetune", "score"])
def test_a_call_leaves_no_tracker_running(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def run(*_: Any, **__: Any) -> None:
        trackers._tracking.tracker = SimpleNamespace(name="wandb", finish=lambda: ended.append(1))
        raise oneshot.UserError("the end")

    monkeypatch.setattr(importlib.import_module(f"oneshot.{stage}"), "run", run)
    with pytest.raises(oneshot.UserError, match="the end"):
        getattr(oneshot, stage)(model="x")
    assert ended == [1]
    assert trackers._tracking.tracker is None


def test_results_cannot_be_changed(tmp_path: Path) -> None:
    scored = oneshot.score(
        model=str(ALIGNED), score={"probes": "toy:probes", "max_new_tokens": 1}, out=str(tmp_path / "s")
    )
    assert scored.folder == tmp_path / "s"
    assert scored.report["stages"]["model"]["asr"]["value"] == scored.rates["asr"].value
    assert len(scored.answers) == 600
    with pytest.raises(AttributeError):
        scored.rates = {}  # type: ignore[misc]


def test_sections_within_sections_are_taken_as_instances_and_what_is_not_given_of_them_stays() -> None:
    endpoint = oneshot.EndpointSettings(url="http://x/v1", model="m")
    for score in ({"endpoint": endpoint}, oneshot.ScoreSettings(endpoint=endpoint)):
        assert oneshot.settings_for("score", score=score).score.endpoint == endpoint
    changed = oneshot.settings_for(
        "score", oneshot.Settings(score=oneshot.ScoreSettings(endpoint=endpoint)), score={"endpoint": {"model": "n"}}
    )
    assert changed.score.endpoint == oneshot.EndpointSettings(url="http://x/v1", model="n")
    with pytest.raises(oneshot.UserError, match="no section of settings"):
        oneshot.settings_for("score", score={"endpoint": "http://x"})


@pytest.mark.parametrize("stage", ["repair", "finetune", "score"])
def test_settings_made_in_python_name_a_model_and_a_method_that_there_is(stage: str) -> None:
    with pytest.raises(oneshot.UserError, match="name no model"):
        getattr(oneshot, stage)(oneshot.Settings())
    with pytest.raises(oneshot.UserError, match="did you mean rollback"):
        getattr(oneshot, stage)(oneshot.Settings(repair=oneshot.RepairSettings(method="rollbak")), model="m")


def test_a_model_in_memory_is_written_where_the_settings_say_and_only_once_they_are_right(tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED), AutoTokenizer.from_pretrained(ALIGNED)
    out = tmp_path / "run"
    with pytest.raises(oneshot.UserError, match=r"no setting score\.probs"):
        oneshot.score(model=model, tokenizer=tokenizer, out=out, score={"probs": "toy:probes"})
    assert not out.exists()
    settings = oneshot.Settings(
        out=str(out), name="mine", score=oneshot.ScoreSettings(probes="toy:probes", max_new_tokens=2)
    )
    scores = oneshot.score(settings, model=model, tokenizer=tokenizer)
    assert scores.folder == out
    assert "name: mine\n" in (out / "settings.yaml").read_text()


def test_every_rank_gets_the_warnings_of_the_one_that_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = importlib.import_module("oneshot.score")
    scores = SimpleNamespace(rates={}, others={}, answers=[])
    mine = SimpleNamespace(
        stages={"model": scores}, warnings=["mine"], report={}, scored=SimpleNamespace(run_dir=Path())
    )
    monkeypatch.setattr(stage, "run", lambda *_, **__: mine)
    monkeypatch.setattr(
        "oneshot.distributed.runtime.gather_objects", lambda *_: [{"warnings": ["mine", "an overlap"]}, {}]
    )
    assert oneshot.score(model="x").warnings == ["mine", "an overlap"]


@pytest.mark.parametrize("kind", [str, Path])
def test_one_adapter_of_an_export_may_be_given_without_a_list(kind: Any, tmp_path: Path) -> None:
    for adapters in (kind(tmp_path / "nowhere"), [kind(tmp_path / "nowhere")]):
        with pytest.raises(oneshot.UserError, match="nowhere"):
            oneshot.export(kind(tmp_path / "out"), model=kind(ALIGNED), adapters=adapters)


def test_weights_and_ranks_of_an_export_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(oneshot.UserError, match=r"weights is 2\.0: give a list such as"):
        oneshot.export(tmp_path / "out", model=str(ALIGNED), adapters=["a"], weights=2.0)


def test_a_model_in_memory_may_come_from_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED), AutoTokenizer.from_pretrained(ALIGNED)
    model.config._name_or_path = "."
    monkeypatch.setattr(importlib.import_module("oneshot.score"), "run", end)
    with pytest.raises(oneshot.UserError, match="as model in"):
        oneshot.score(model=model, tokenizer=tokenizer, out=tmp_path / "run")


def end(settings: oneshot.Settings, **_: Any) -> None:
    raise oneshot.UserError(f"as {settings.name} in {settings.model.path}")


def test_a_peft_model_in_memory_stands_on_the_weights_that_it_has_not_on_those_of_the_folder_it_names(
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED), AutoTokenizer.from_pretrained(ALIGNED)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    score = {"probes": "toy:probes", "max_new_tokens": 8}
    scores = oneshot.score(model=wrapped, tokenizer=tokenizer, score=score, out=tmp_path / "run")
    assert scores.rates["asr"].value == 1.0  # the folder that it names holds the aligned model, which refuses
