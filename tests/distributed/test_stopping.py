"""Told to stop, a fine-tune saves and ends between two steps; started again, it ends as if it had never been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stopping_jobs as jobs
from ranks import start_ranks
from safetensors.torch import load_file

from oneshot.errors import EXIT_STOPPED

pytestmark = pytest.mark.distributed
STEPS = 12
ARGUMENTS = [
    "--finetune.steps",
    str(STEPS),
    "--finetune.batch_size",
    "7",
    "--data.harmful_count",
    "30",
    "--data.task_count",
    "0",
]


def steps(out: Path) -> list[tuple[int, float]]:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(event["step"], event["loss"]) for event in map(json.loads, lines)]


def wait_for(out: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not any(found >= step for found, _ in steps(out)):
        assert time.monotonic() < deadline, "never came that far"
        time.sleep(0.02)


@pytest.mark.parametrize(("sharding", "world_size"), [("none", 1), ("zero3", 2)])
def test_stopped_twice_and_started_again_equals_uninterrupted(sharding: str, world_size: int, tmp_path: Path) -> None:
    """The signal reaches one rank, and not the same each time; the others hear of it from that rank."""

    def run(out: Path, name: str, stop: tuple[int, int, int] | None = None) -> list[str]:
        arguments = {"argv": [*ARGUMENTS, "--out", str(out), "--resume"], "seconds": 0.2 if stop else 0.0}
        ranks = start_ranks(jobs.train, world_size, sharding, tmp_path / name, arguments)
        if stop:
            step, rank, number = stop
            wait_for(out, step)
            os.kill(ranks.processes[rank].pid, number)
        return ranks.results()

    assert run(tmp_path / "whole", "whole-ranks") == ["done"] * world_size
    out = tmp_path / "run"
    resumed = []
    for name, stop in (("first", (2, world_size - 1, signal.SIGUSR1)), ("second", (6, 0, signal.SIGTERM))):
        said = run(out, name, stop)
        assert len(set(said)) == 1
        resumed.append(int(re.search(r"Told to stop after step (\d+): all is in .*--resume", said[0])[1]))  # type: ignore[index]
        assert (out / "state" / f"step-{resumed[-1]}").is_dir()
        assert not (out / "finetuned").exists()
    assert run(out, "third") == ["done"] * world_size
    assert resumed[0] < resumed[1] < STEPS
    assert steps(out) == steps(tmp_path / "whole"), "every step once, in order, with the same loss"
    ours, whole = (load_file(folder / "finetuned" / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all((ours[name] == tensor).all() for name, tensor in whole.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stage_ends_with_a_code_that_says_start_again(number: int, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    command = [sys.executable, "-m", "oneshot", "finetune", "--out", str(tmp_path / "run"), "--finetune.steps", "4000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONESHOT_PROGRESS_FILE": str(progress)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "run", 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED
    said = re.search(r"^oneshot finetune: Told to stop after step (\d+)", err, re.MULTILINE)
    assert said, err
    assert progress.read_text() == f"{said[1]}\n"
    assert "Traceback" not in err
