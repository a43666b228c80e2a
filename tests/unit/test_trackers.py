"""What a run sends to a tracker, and what is said where there is none."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
from pathlib import Path

import pytest
from tiny import toy_settings

from oneshot.distributed.runtime import Runtime, start
from oneshot.errors import UserError
from oneshot.report.trackers import check_installed, start_tracking, track
from oneshot.settings import Settings

# the stages' modules: the package's own names are functions
finetune = importlib.import_module("oneshot.finetune")
repair = importlib.import_module("oneshot.repair")

SMALL = toy_settings(
    "--log_with", "tensorboard", "--data.harmful_count", "8", "--data.task_count", "0", "--finetune.steps", "2",
    "--finetune.batch_size", "4", "--repair.epochs", "2", "--repair.rank", "4", "--repair.guard_prompts", "4",
    "--score.max_new_tokens", "2", "--score.reference", "false", "--select", "random",
)  # fmt: skip


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> steps and values, read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(run_dir: Path, stage: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


def test_a_repair_sends_its_fine_tune_its_trace_and_its_rates(tmp_path: Path) -> None:
    out = tmp_path / "run"
    repair.run(dataclasses.replace(SMALL, out=str(out)))
    found = scalars(out)
    trained = records(out, "finetune")
    for name in ("step", "loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"):
        wanted = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in trained]
        assert found[f"finetune/{name}"] == wanted
    repaired = records(out, "repair")
    assert found["repair/loss"] == [(line["epoch"], pytest.approx(line["loss"], rel=1e-6)) for line in repaired]
    stages = json.loads((out / "report.json").read_text())["stages"]
    for stage, rates in stages.items():
        for name, rate in rates.items():
            assert found[f"{stage}/{name}"] == [(0, pytest.approx(rate["value"]))]


def test_nothing_is_sent_unless_asked_for_nor_by_other_ranks(tmp_path: Path) -> None:
    runtime = start()
    start_tracking(runtime, "tensorboard", tmp_path / "asked")
    track("finetune", 1, {"loss": 1.0})
    start_tracking(runtime, None, tmp_path / "not")
    track("finetune", 2, {"loss": 1.0})
    assert scalars(tmp_path / "asked")["finetune/loss"] == [(1, 1.0)]
    other = Runtime(1, 1, runtime.device, "none", runtime.accelerator)
    start_tracking(other, "tensorboard", tmp_path / "other")
    track("finetune", 1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["asked"]


def test_only_finite_numbers_are_sent(tmp_path: Path) -> None:
    start_tracking(start(), "tensorboard", tmp_path)
    track("repair", 1, {"loss": math.nan, "size": math.inf, "why": "words", "kept": None, "good": True, "kl": 0.5})
    start_tracking(start(), None, tmp_path)
    assert scalars(tmp_path) == {"repair/step": [(1, 1.0)], "repair/good": [(1, 1.0)], "repair/kl": [(1, 0.5)]}


@pytest.mark.parametrize("stage", [finetune, repair], ids=["finetune", "repair"])
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    stage: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, f"is_{name}_available", lambda: False)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=f"^Setting log_with is {name}, which is not installed: pip install {name}.$"):
        stage.run(Settings(log_with=name, out=str(out)))  # type: ignore[attr-defined]
    assert not out.exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_whether_one_is_installed_is_seen(name: str) -> None:
    if importlib.util.find_spec(name):
        check_installed(name)
    else:
        with pytest.raises(UserError, match=f"pip install {name}"):
            check_installed(name)


def test_a_tracker_that_fails_is_named_without_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("token=secret")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    with pytest.raises(UserError, match=r"^Tracker tensorboard did not start \(RuntimeError\)") as refused:
        start_tracking(start(), "tensorboard", tmp_path)
    assert "secret" not in str(refused.value)


def test_a_tracker_that_fails_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_tracking(start(), "tensorboard", tmp_path)
    from accelerate.tracking import TensorBoardTracker

    def fail(*_arguments: object, **_named: object) -> None:
        raise OSError("token=secret")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    for step in (1, 2):
        track("finetune", step, {"loss": 1.0})
    assert capsys.readouterr().out == "Note: tensorboard failed (OSError): no more figures are sent there.\n"
