"""An interrupted fine-tune goes on as if nothing had happened: same ranks, other ranks, other sharding."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import stopping_jobs as jobs
from ranks import start_ranks
from safetensors.torch import load_file

from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.disk.folders import PARTIAL

pytestmark = pytest.mark.distributed
STEPS, SAVED = 9, 4
WRITERS = {"single": ("none", 1), "ddp": ("ddp", 2), "zero2": ("zero2", 2), "zero3": ("zero3", 2)}


def finetune(sharding: str, processes: int, out: Path, *arguments: str, code: int = 0) -> str:
    """Run the stage on so many ranks, all of which end with ``code``; returns what they printed."""
    argv = ["--finetune.steps", str(STEPS), "--finetune.batch_size", "7", "--finetune.save_every", str(SAVED)]
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix="ranks-")) / "ranks"
    ranks = start_ranks(jobs.train, processes, sharding, folder, {"argv": [*argv, "--out", str(out), *arguments]})
    codes = ranks.wait(120)
    assert codes == [code] * processes, ranks.logs()
    return ranks.logs()


def losses(out: Path) -> list[tuple[int, float]]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [(event["step"], event["loss"]) for event in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted fine-tune by each kind of run."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (sharding, processes) in WRITERS.items():
        finetune(sharding, processes, folder / name)
    return {name: folder / name for name in WRITERS}


def interrupted(whole: Path, to: Path) -> Path:
    """The run folder as it was when the run died after its first saved state."""
    shutil.copytree(whole, to)
    shutil.rmtree(to / "finetuned")
    for state in (to / "state").iterdir():
        if state.name != f"step-{SAVED}":
            shutil.rmtree(state)
    return to


def test_resumed_from_moments_in_bf16_is_almost_the_uninterrupted_run(whole: dict[str, Path], tmp_path: Path) -> None:
    option = ("--finetune.state_moments", "bf16")
    finetune("zero3", 2, tmp_path / "whole", *option)
    assert losses(tmp_path / "whole") == losses(whole["zero3"]), "saving changed the training"
    out = interrupted(tmp_path / "whole", tmp_path / "run")
    finetune("zero3", 2, out, "--resume", *option)
    resumed, uninterrupted = dict(losses(out)), dict(losses(whole["zero3"]))
    assert resumed == pytest.approx(uninterrupted, rel=2e-3)


@pytest.mark.parametrize("name", WRITERS)
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    sharding, processes = WRITERS[name]
    out = interrupted(whole[name], tmp_path / "run")
    said = finetune(sharding, processes, out, "--resume")
    assert f"Resumed at step {SAVED} " in said
    assert losses(out) == losses(whole[name])
    written, expected = (load_file(p / "finetuned" / "model.safetensors") for p in (out, whole[name]))
    assert all(written[key].equal(expected[key]) for key in expected)
    assert written.keys() == expected.keys()


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("zero3", ("none", 1)),
        ("single", ("zero3", 3)),
        ("zero2", ("zero3", 2)),
        ("zero3", ("zero2", 3)),
        ("ddp", ("zero2", 2)),
    ],
)
def test_resume_elsewhere_continues_the_same_loss_curve(
    writer: str, reader: tuple[str, int], whole: dict[str, Path], tmp_path: Path
) -> None:
    out = interrupted(whole[writer], tmp_path / "run")
    finetune(*reader, out, "--resume")
    resumed, expected = losses(out), losses(whole[writer])
    assert [step for step, _ in resumed] == [step for step, _ in expected]
    for (_, loss), (_, wanted) in zip(resumed, expected):
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_only_the_last_states_are_kept(whole: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune("none", 1, out, "--finetune.save_every", "2", "--finetune.keep", "1")
    assert [path.name for path in (out / "state").iterdir()] == ["step-8"]


def test_a_half_written_state_is_passed_over_and_removed(whole: dict[str, Path], tmp_path: Path) -> None:
    out = interrupted(whole["single"], tmp_path / "run")
    left = out / "state" / f"step-7{PARTIAL}"  # of a save that no later one repeats
    model = out / f"finetuned{PARTIAL}"
    for half in (left, model):
        half.mkdir()
    assert f"Resumed at step {SAVED} " in finetune("none", 1, out, "--resume")
    assert not left.exists()
    assert not model.exists()


@pytest.mark.parametrize("reader", [("zero3", 2), ("none", 1)])
def test_an_altered_state_is_refused(reader: tuple[str, int], whole: dict[str, Path], tmp_path: Path) -> None:
    out = interrupted(whole["zero3"], tmp_path / "run")
    alter(out / "state" / f"step-{SAVED}")
    said = finetune(*reader, out, "--resume", code=1)
    assert "is whole" in said
    assert "model.safetensors was altered: exp_avg.model.norm.weight" in said
    assert not (out / "finetuned").exists()


def alter(state: Path) -> None:
    data = bytearray((state / "model.safetensors").read_bytes())
    data[list_tensors(state)["exp_avg.model.norm.weight"].offset + 9] ^= 0x10
    (state / "model.safetensors").write_bytes(data)


def test_for_an_altered_state_an_older_one_is_taken(whole: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole["zero3"], tmp_path / "run"))
    shutil.rmtree(out / "finetuned")
    alter(out / "state" / f"step-{2 * SAVED}")
    said = finetune("zero3", 2, out, "--resume")
    assert said.count(f"Passed over {out}/state/step-{2 * SAVED}: ") == 1
    assert f"Resumed at step {SAVED} " in said
    assert losses(out) == losses(whole["zero3"])
    assert sorted(path.name for path in (out / "state").iterdir()) == [f"step-{SAVED}", f"step-{2 * SAVED}"]


def test_resume_with_other_settings_is_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    out = interrupted(whole["single"], tmp_path / "run")
    said = finetune("none", 1, out, "--resume", "--seed", "7", code=1)
    assert "seed was 0 and is 7" in said
    assert "No saved state: starting anew" in finetune("none", 1, tmp_path / "none", "--resume")
    assert "is finished" in finetune("none", 1, whole["single"], "--resume", code=1)
