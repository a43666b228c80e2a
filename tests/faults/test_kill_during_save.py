"""kill -9 of a rank at random moments of repeated saves: the checkpoint is always one complete, right one."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import checkpoint_jobs as jobs
import pytest
import torch
from ranks import Ranks, start_ranks
from safetensors.torch import load_file

from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.disk.folders import OLD, PARTIAL
from oneshot.checkpoint.writing.state import newest_whole
from oneshot.distributed.runtime import Runtime

pytestmark = pytest.mark.faults
KILLS = [("ddp", seed) for seed in range(20)] + [("zero3", seed) for seed in range(20, 23)]
LARGER = {"hidden_size": 96, "intermediate_size": 400, "head_dim": 48, "vocab_size": 1501}  # writing takes a while
left_half: list[bool] = []  # of each kill, whether it left half a folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    jobs.make("kill", "Llama", LARGER, "float32", folder, max_shard_size="1GB")
    return folder


@pytest.fixture(scope="module")
def saved(memory: Path) -> dict[str, Path]:
    """A folder per sharding that all its runs save to, one after the other: each finds what a killed one left."""
    return {sharding: memory / sharding / "saved" for sharding in ("ddp", "zero3")}


def step_of(folder: Path) -> int:
    """The save that a folder holds, having made sure that it is whole: every weight of every tensor is its number."""
    entries = list_tensors(folder)
    found = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert found.keys() == entries.keys()
    assert len(found) > 20
    values = {float(value) for tensor in found.values() for value in torch.unique(tensor)}
    assert len(values) == 1, f"a mixture of saves: {values}"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).stat().st_size > 10
    return int(values.pop())


def last_said(folder: Path) -> int:
    """The number of the last save that rank 0 has said to be done."""
    try:
        return int(Path(f"{folder}.step").read_text().split()[-1])
    except (FileNotFoundError, IndexError):  # none yet, or just opened
        return 0


def wait_for_saves(ranks: Ranks, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while last_said(folder) < count:
        assert time.monotonic() < deadline, ranks.logs()
        assert all(process.is_alive() for process in ranks.processes), ranks.logs()
        time.sleep(0.002)


@pytest.mark.parametrize(("sharding", "seed"), KILLS)
def test_a_killed_rank_costs_no_checkpoint(
    sharding: str, seed: int, source: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    chance, folder = random.Random(seed), saved[sharding]
    folder.parent.mkdir(exist_ok=True)
    Path(f"{folder}.step").unlink(missing_ok=True)
    ranks = start_ranks(jobs.counting, 2, sharding, tmp_path / "ranks", {"folder": str(folder), "source": str(source)})
    wait_for_saves(ranks, folder, 2)
    beside = [path.name for path in folder.parent.iterdir() if path.name.endswith(OLD)]
    assert beside == [], "what the last killed run left was cleaned up"
    time.sleep(chance.uniform(0, 0.2))
    victim = chance.randrange(2)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    codes = ranks.wait(30)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, "the other rank ends by itself, with an error"

    said = last_said(folder)
    found = step_of(folder)
    assert found in (said, said + 1), "the last complete save, or one that was complete but not yet said to be"
    names = {path.name for path in folder.parent.iterdir()} - {"saved", "saved.step"}
    assert all(re.fullmatch(rf"saved\.[0-9a-f]{{8}}{PARTIAL}", name) for name in names), "nothing else stays behind"
    assert len(names) <= 1
    left_half.append(bool(names))


STATE_KILLS = [("ddp", seed) for seed in range(4)] + [("zero2", 4), ("zero3", 5), ("zero3", 6)]


@pytest.mark.parametrize(("sharding", "seed"), STATE_KILLS)
def test_a_killed_rank_costs_no_training_state(
    sharding: str, seed: int, source: Path, memory: Path, tmp_path: Path
) -> None:
    """Whether it was writing, or the last state was still being synced, or an older one being removed."""
    chance, folder = random.Random(seed), memory / f"state-{sharding}"
    Path(f"{folder}.step").unlink(missing_ok=True)
    arguments = {"folder": str(folder), "source": str(source)}
    ranks = start_ranks(jobs.counting_states, 2, sharding, tmp_path / "ranks", arguments)
    wait_for_saves(ranks, folder, 2)
    time.sleep(chance.uniform(0, 0.3))
    victim = chance.randrange(2)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    codes = ranks.wait(30)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, "the other rank ends by itself, with an error"

    said = last_said(folder)
    state = newest_whole(Runtime(0, 1, torch.device("cpu"), "none", accelerator=None), folder)  # type: ignore[arg-type]
    assert state is not None
    assert state.name in (f"step-{said}", f"step-{said + 1}")
    found = {name: t for shard in state.glob("model*.safetensors") for name, t in load_file(shard).items()}
    assert found.keys() == list_tensors(state).keys()
    assert {f"step-{float(value):.0f}" for t in found.values() for value in t.unique()} == {state.name}


def test_the_kills_met_saves_in_progress() -> None:
    if len(left_half) < len(KILLS):
        pytest.skip("only some of the kills were run")
    assert 2 <= sum(left_half) < len(KILLS), left_half
    print(f"{sum(left_half)} of {len(KILLS)} kills left half a folder")


def test_what_a_killed_save_left_is_cleaned_up(source: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    """A kill of rank 0 within a save leaves half a folder, which the next save removes."""
    folder = tmp_path / "saved"
    for attempt in range(10):
        arguments = {"folder": str(folder), "source": str(source)}
        ranks = start_ranks(jobs.counting, 2, "ddp", tmp_path / f"ranks{attempt}", arguments)
        wait_for_saves(ranks, folder, 1)
        deadline = time.monotonic() + 20
        while not (found := list(folder.parent.glob(f"saved.*{PARTIAL}/*.safetensors"))):
            assert time.monotonic() < deadline
        half = found[0].parent
        os.kill(ranks.processes[0].pid, signal.SIGKILL)
        ranks.wait(30)
        if half.exists():
            break
        Path(f"{folder}.step").unlink()
    before = step_of(folder)
    assert half.exists()
    (half / "left.behind").write_text("by the killed run")
    arguments = {"source": str(source), "target": str(folder)}
    start_ranks(jobs.roundtrip, 2, "ddp", tmp_path / "again", arguments).results()
    assert not half.exists()
    assert not (folder / "left.behind").exists()
    assert before >= 1
    assert torch.equal(
        load_file(folder / "model.safetensors")["lm_head.weight"],
        load_file(source / "model.safetensors")["lm_head.weight"],
    ), "and the folder holds what was saved last"
