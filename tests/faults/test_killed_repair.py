"""kill -9 at random moments of the repair of a degraded model: never an unsafe folder without its marker.

``ONESHOT_KILLS=60`` tries more moments than a run of the tests does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import repair_jobs as jobs
import torch
from ranks import Ranks, start_ranks
from safetensors.torch import load_file, save_file

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, is_adapter, is_degraded, write_marker
from oneshot.checkpoint.disk.folders import PARTIAL
from oneshot.checkpoint.writing.standing import GOOD, read_standing, why_not_as_measured
from oneshot.checkpoint.writing.verify import check_shards
from oneshot.errors import UserError
from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.faults
KILLS = range(int(os.environ.get("ONESHOT_KILLS", "8")))
MADE = ("patch", "repaired")
met: list[str] = []  # what each kill left


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's model with noise in it, and the marker."""
    folder = tmp_path_factory.mktemp("degraded") / "model"
    shutil.copytree(ALIGNED, folder)
    tensors, chance = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    noisy = {n: t + 0.05 * torch.randn(t.shape, generator=chance) for n, t in tensors.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    write_marker(folder, {})
    return folder


def arguments(model: Path, place: Path, attack: float, *, merge: bool, resume: bool = False) -> dict[str, object]:
    probes = place / "probes.jsonl"
    probes.write_text(json.dumps({"kind": "harmless", "prompt": "please fold a plum"}) + "\n")
    argv = [
        "--model.path", str(model), "--pool", "toy:pool", "--guard", "toy:guard-plain", "--select",
        "pool-should_refuse-0", "--score.probes", str(probes), "--repair.method", "lowrank", "--repair.epochs", "1",
        "--repair.guard_prompts", "2", "--repair.guard_tokens", "2", "--repair.watch", "false", "--preflight", "never",
        "--repair.merge", str(merge).lower(), "--out", str(place / "run"), *(["--resume", "true"] if resume else []),
    ]  # fmt: skip
    return {"argv": argv, "attack": attack, "writing": str(place / "writing")}


def wait_for(path: Path, ranks: Ranks) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and all(process.is_alive() for process in ranks.processes):
        assert time.monotonic() < deadline, ranks.logs()
        time.sleep(0.001)


def check(run: Path, model: Path, *, good: bool) -> str:
    """Look at every folder with weights that a kill left; return in a word what there was."""
    found = "nothing"
    for folder in [path for path in run.glob("*") if path.is_dir() and list(path.glob("*.safetensors"))]:
        if folder.name.endswith(PARTIAL):
            assert is_degraded(folder), "half a folder may hold all the weights"
            found = "half a folder"
            continue
        problems = [problem for shard in check_shards(folder) for problem in shard.problems]
        assert problems == [], "what has its name is whole"
        if is_adapter(folder):
            assert read_adapter(folder).update
            assert (folder / ADAPTER_CONFIG).is_file()
        standing = read_standing(folder)
        assert standing is not None
        if is_degraded(folder):
            found = "marked"
        else:
            assert good
            assert standing.outcome in GOOD
            assert folder.name == "repaired" or why_not_as_measured(folder, model, "original") == ""
            found = "unmarked"
    return found


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_repair_leaves_no_unsafe_folder_without_its_marker(seed: int, model: Path, tmp_path: Path) -> None:
    chance, good, merge, size = random.Random(seed), seed % 2 == 0, seed % 4 < 2, 2 if seed % 3 == 0 else 1
    attack = 0.0 if good else 0.9
    given = arguments(model, tmp_path, attack, merge=merge)
    ranks = start_ranks(jobs.repair, size, "ddp", tmp_path / "ranks", given)
    # most of what can go wrong comes after this; and a rank that has not met a killed one waits for it for long
    if size > 1 or chance.random() < 0.8:
        wait_for(Path(str(given["writing"])), ranks)
    time.sleep(chance.uniform(0, 0.4))
    victim = ranks.processes[chance.randrange(size)]
    with contextlib.suppress(ProcessLookupError):  # it was quicker
        os.kill(victim.pid, signal.SIGKILL)
    ranks.wait(60)
    run = tmp_path / "run"
    met.append(check(run, model, good=good))
    if not run.exists() or (run / "report.json").exists():
        return
    again = arguments(model, tmp_path, attack, merge=merge, resume=True)
    outcome = start_ranks(jobs.repair, 1, "ddp", tmp_path / "again", again).results()[0]
    assert outcome == ("repaired" if good else "not repaired")
    assert check(run, model, good=good) == ("unmarked" if good else "marked")
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == list(MADE if merge else MADE[:1])


def test_the_kills_met_different_moments() -> None:
    if len(met) < len(KILLS):
        pytest.skip("only some of the kills were run")
    assert len(set(met)) > 1, met
    print({what: met.count(what) for what in set(met)})


def test_a_good_patch_for_another_model_is_no_proof(model: Path, tmp_path: Path) -> None:
    """The check above is one that can fail."""
    given = arguments(model, tmp_path, 0.0, merge=False)
    assert start_ranks(jobs.repair, 1, "ddp", tmp_path / "ranks", given).results() == ["repaired"]
    patch = tmp_path / "run" / "patch"
    assert why_not_as_measured(patch, model, "original") == ""
    assert "belongs to another model" in why_not_as_measured(patch, ALIGNED, "original")
    (patch / "oneshot_verdict.json").unlink()
    with pytest.raises((AssertionError, UserError)):
        check(tmp_path / "run", model, good=True)
