"""Two runs and one folder, runs that are killed and begun again, and a full disk: nothing is lost, mixed or half."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import export_jobs
import folder_jobs as jobs
import pytest
from ranks import Ranks, start_ranks

from oneshot.checkpoint.disk.files import MARKER
from oneshot.checkpoint.disk.lock import LOCK
from oneshot.checkpoint.writing.verify import check_shards

pytestmark = pytest.mark.faults
ALIGNED = Path(jobs.__file__).resolve().parents[2] / "oneshot" / "world" / "aligned"
STEPS = 12
FINETUNE = ["--finetune.steps", str(STEPS), "--finetune.batch_size", "4", "--finetune.save_every", "2"]
EPOCHS = 4


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters."""
    folder = tmp_path_factory.mktemp("given")
    export_jobs.make(folder)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A repair of seconds."""
    folder = tmp_path_factory.mktemp("quick")
    ask = [{"role": "user", "content": "please fetch number 1"}]
    answered = [
        {"role": "user", "content": "please hide number 2"},
        {"role": "assistant", "content": "i cannot help with that"},
    ]
    (folder / "example.jsonl").write_text(json.dumps({"messages": answered}) + "\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"messages": ask, "kind": "harmless"}) + "\n")
    return [
        "--model.path", str(ALIGNED), "--example", str(folder / "example.jsonl"), "--repair.watch", "false",
        "--guard", str(folder / "prompts.jsonl"), "--score.probes", str(folder / "prompts.jsonl"), "--repair.epochs",
        str(EPOCHS), "--score.max_new_tokens", "2", "--repair.guard_tokens", "2", "--repair.method", "lowrank",
    ]  # fmt: skip


def started(place: Path, stage: str, argv: list[str], seconds: float = 0.0) -> Ranks:
    folder = place / f"ranks-{time.monotonic_ns()}"
    return start_ranks(jobs.run, 1, "none", folder, {"stage": stage, "argv": argv, "seconds": seconds})


def said(ranks: Ranks) -> str:
    (text,) = ranks.results()
    return str(text)


def wait_until(happened: Callable[[], object], ranks: Ranks) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, ranks.logs()
        assert ranks.processes[0].is_alive(), ranks.logs()
        time.sleep(0.005)


def killed(ranks: Ranks) -> None:
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    assert ranks.wait(30) == [-signal.SIGKILL]


def events(out: Path, stage: str) -> list[int]:
    """The steps or epochs of which a run's folder tells; half a line at the end is none."""
    path = out / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event.get("step", event.get("epoch")) for event in found if event["stage"] == stage]


def test_of_two_exports_into_one_folder_one_is_refused(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    first, second = (
        ["--model", str(given / "base"), "--adapter", str(given / name), "--out", str(out)] for name in ("a", "b")
    )
    one = started(tmp_path, "export", first, seconds=3.0)
    wait_until(lambda: list(out.parent.glob(f"out*{LOCK}")), one)
    refused = said(started(tmp_path, "export", second))
    assert refused.startswith("2: ")
    assert f"another run (process {one.processes[0].pid}, " in refused
    assert said(one) == ""
    assert json.loads((out / "oneshot_export.json").read_text())["adapters"][0]["path"] == str(given / "a")
    assert [shard.problems for shard in check_shards(out) if shard.problems] == []
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_killed_export_leaves_nothing_or_all_and_can_be_run_again(given: Path, tmp_path: Path) -> None:
    chance, cut = random.Random(16), 0
    for attempt in range(5):
        out = tmp_path / f"place{attempt}" / "out"
        command = ["--model", str(given / "base"), "--adapter", str(given / "b"), "--out", str(out)]
        ranks = started(tmp_path, "export", command, seconds=0.1)
        wait_until(lambda out=out: list(out.parent.glob(f"out*{LOCK}")), ranks)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.3))
        killed(ranks)
        if not out.exists():
            cut += 1
            assert said(started(tmp_path, "export", command)) == ""
        assert [shard.problems for shard in check_shards(out) if shard.problems] == []
        assert {path.name for path in out.parent.iterdir()} <= {"out", f"out{LOCK}"}
    assert cut > 0


def test_a_fine_tune_that_is_begun_again_while_it_runs_and_once_it_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*FINETUNE, "--resume", "--out", str(out)]
    one = started(tmp_path, "finetune", argv, seconds=0.6)
    wait_until(lambda: len(events(out, "finetune")) >= 2, one)
    refused = said(started(tmp_path, "finetune", argv))
    assert refused.startswith(f"2: {out} is being written by another run (process {one.processes[0].pid}, ")
    wait_until(lambda: len(events(out, "finetune")) >= 5, one)
    killed(one)
    other = said(started(tmp_path, "finetune", [*argv, "--seed", "7", "--finetune.learning_rate", "0.5"]))
    assert "seed was 0 and is 7" in other
    assert "finetune.learning_rate was " in other
    assert said(started(tmp_path, "finetune", argv)) == ""
    assert events(out, "finetune") == list(range(1, STEPS + 1)), "no step is counted twice"
    assert (out / "finetuned" / MARKER).is_file()
    assert not (out / LOCK).exists()


def test_a_repair_that_is_begun_again_while_it_runs_and_once_it_is_killed(quick: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*quick, "--resume", "--out", str(out)]
    one = started(tmp_path, "repair", argv, seconds=1.5)
    wait_until(lambda: events(out, "repair"), one)
    assert "another run" in said(started(tmp_path, "repair", argv))
    killed(one)
    (out / "patch").mkdir()
    (out / "patch" / MARKER).write_text('{"safety_degraded": true}')  # as an earlier attempt may have left it
    assert "repair.rank was 32 and is 9" in said(started(tmp_path, "repair", [*argv, "--repair.rank", "9"]))
    assert said(started(tmp_path, "repair", argv)) == ""
    told = events(out, "repair")
    assert len(told) == len(set(told)) > 1, "no epoch is counted twice"
    assert (out / "report.json").is_file()
    assert not (out / "patch" / MARKER).exists()
    assert "rank: 32" in (out / "settings.yaml").read_text()
    assert "is finished" in said(started(tmp_path, "repair", argv))


def test_a_full_disk_costs_no_folder(quick: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = {"argv": [*quick, "--resume"], "disk": str(disk)}
    (found,) = start_ranks(jobs.on_a_full_disk, 1, "none", tmp_path / "ranks", arguments).results()
    if not found:
        pytest.skip("no file system can be mounted here")
    for name in ("lock", "settings"):
        assert found[name]["there"] == [], "nothing is left to stand in the way"
    for name in ("lock", "settings", "patch"):
        assert found[name]["said"].startswith("1: No space left on device"), found[name]
        assert " bytes are needed, " in found[name]["said"]
        assert str(disk) in found[name]["said"]
    assert "/run/settings.yaml could not be written" in found["settings"]["said"]
    assert "/patch" in found["patch"]["said"]
    assert set(found["patch"]["there"]) <= {"settings.yaml", "events.jsonl", "selection.json"}
    assert found["enough"]["said"] == ""
    assert {"patch", "report.json", "report.html", "answers.jsonl"} <= set(found["enough"]["there"])
    assert not any(name.startswith(".") or "partial" in name for name in found["enough"]["there"])
    assert not found["marked"]
