"""Training states: kept until a newer one is on the disk, passed over when damaged, cleaned up after a crash."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_runtime

from oneshot.checkpoint.disk.files import MANIFEST, SINGLE, list_tensors, resolve, stored_bytes
from oneshot.checkpoint.disk.folders import OLD, PARTIAL, clean_inside, put_back
from oneshot.checkpoint.writing import state
from oneshot.checkpoint.writing.state import States, load_state, newest_whole
from oneshot.distributed.engine import TrainingEngine, start_training
from oneshot.distributed.optimizer_state import held_state
from oneshot.errors import UserError


@pytest.fixture
def engine() -> TrainingEngine:
    model = tiny_model("llama")
    return start_training(
        tiny_runtime(), model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(states: States, engine: TrainingEngine, step: int) -> None:
    """A state all of whose numbers are the step."""
    state.allocate(engine)
    for piece in held_state(engine):
        piece.values.fill_(step)
    states.save(engine, step)


def damage(target: Path, tensor: str = "exp_avg.model.norm.weight") -> None:
    path = target / SINGLE
    data = bytearray(path.read_bytes())
    data[list_tensors(target)[tensor].offset + 5] ^= 8
    path.write_bytes(data)


def test_a_state_comes_back_and_only_the_last_ones_stay(engine, tmp_path):
    states = States(tiny_runtime(), tmp_path / "state", keep=2)
    for step in (1, 2, 3, 10):
        save(states, engine, step)
    states.finish()
    assert names(tmp_path / "state") == ["step-10", "step-3"]
    for piece in held_state(engine):
        piece.values.fill_(0.5)
    newest = newest_whole(tiny_runtime(), tmp_path / "state")
    assert newest == tmp_path / "state" / "step-10"
    assert load_state(engine, newest) == 10
    assert {float(value) for piece in held_state(engine) for value in piece.values.unique()} == {10.0}


def test_moments_in_bf16_take_half_the_bytes_and_masters_stay_exact(engine, tmp_path):
    torch.manual_seed(0)
    given = {}
    for moments in ("fp32", "bf16"):
        states = States(tiny_runtime(), tmp_path / moments, keep=1, moments=moments)
        states.save(engine, 1)  # allocates
        for piece in held_state(engine):
            given[piece.kind, piece.name] = piece.values.copy_(torch.rand(len(piece.values))).clone()
        saved = states.save(engine, 2)
        states.finish()
        for piece in held_state(engine):
            piece.values.fill_(0.5)
        assert newest_whole(tiny_runtime(), tmp_path / moments) == saved
        assert load_state(engine, saved) == 2
        for piece in held_state(engine):
            wanted = given[piece.kind, piece.name]
            rounded = moments == "bf16" and piece.kind != "master"
            assert torch.equal(piece.values, wanted.bfloat16().float() if rounded else wanted), piece.name
    sizes = [stored_bytes(tmp_path / moments / "step-2") for moments in ("fp32", "bf16")]
    assert sizes[0] * 2 == sizes[1] * 3


def test_an_older_state_stays_until_the_newer_one_is_on_the_disk(engine, tmp_path, monkeypatch):
    real, go = os.fsync, threading.Event()
    go.set()
    synced: list[str] = []

    def slow(descriptor: int) -> None:
        assert go.wait(20)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    folder = tmp_path / "state"
    states = States(tiny_runtime(), folder, keep=1)
    save(states, engine, 1)
    states.finish()
    go.clear()
    synced.clear()
    save(states, engine, 2)  # comes back though the disk does nothing
    assert names(folder) == ["step-1", "step-2"]
    threading.Timer(0.1, go.set).start()
    states.finish()
    assert names(folder) == ["step-2"]
    wanted = [folder / "step-2" / name for name in (SINGLE, MANIFEST, "random-rank0.safetensors")]
    assert {*map(str, wanted), str(folder / "step-2"), str(folder)} <= set(synced)


@pytest.mark.parametrize("then", ["finish", "save"])
def test_a_disk_that_fails_behind_the_training_is_an_error_later(then, engine, tmp_path, monkeypatch):
    folder = tmp_path / "state"
    states = States(tiny_runtime(), folder, keep=1)
    save(states, engine, 1)
    states.finish()

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        save(states, engine, 2)
        assert states._syncing is not None
        states._syncing[1].exception(20)  # it has failed by now
    with pytest.raises(UserError, match=rf"syncing the training state .*step-2 failed .*Input/output.*{SINGLE}"):
        states.finish() if then == "finish" else save(states, engine, 3)
    assert "step-1" in names(folder), "what is on the disk stays"
    states.finish()  # said once


def test_a_save_that_fails_leaves_the_older_states(engine, tmp_path, monkeypatch):
    folder = tmp_path / "state"
    states = States(tiny_runtime(), folder, keep=1)
    save(states, engine, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UserError, match=f"No space left on device.*{SINGLE}"):
            save(states, engine, 2)
        assert len(os.listdir("/proc/self/fd")) <= before, "no descriptor stays open"
    assert names(folder) == ["step-1"]
    save(states, engine, 3)
    states.finish()
    assert names(folder) == ["step-3"]


def _flip(target: Path) -> None:
    damage(target)


def _zero_manifest(target: Path) -> None:
    path = target / MANIFEST
    path.write_bytes(bytes(path.stat().st_size))


def _no_manifest(target: Path) -> None:
    (target / MANIFEST).unlink()


def _cut(target: Path) -> None:
    os.truncate(target / SINGLE, 1000)


def _zero_generators(target: Path) -> None:
    path = target / "random-rank0.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [_flip, _zero_manifest, _no_manifest, _cut, _zero_generators]


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_a_damaged_state_is_passed_over_for_an_older_one(harm, engine, tmp_path, capsys):
    folder = tmp_path / "state"
    states = States(tiny_runtime(), folder, keep=3)
    for step in (1, 2, 4):
        save(states, engine, step)
    states.finish()
    harm(folder / "step-4")
    assert newest_whole(tiny_runtime(), folder) == folder / "step-2"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"Passed over {folder / 'step-4'}: ")
    # the run goes on from there: what lies ahead of it never counts as one of the kept
    states = States(tiny_runtime(), folder, keep=2)
    save(states, engine, 3)
    states.finish()
    assert names(folder) == ["step-2", "step-3"]


def test_with_no_whole_state_there_is_nothing_to_resume_from(engine, tmp_path):
    folder = tmp_path / "state"
    assert newest_whole(tiny_runtime(), folder) is None
    states = States(tiny_runtime(), folder, keep=2)
    for step in (1, 2):
        save(states, engine, step)
    states.finish()
    for step in (1, 2):
        damage(folder / f"step-{step}")
    with pytest.raises(UserError, match=r"No state in .*state is whole.*step-2/model.safetensors was altered: exp_avg"):
        newest_whole(tiny_runtime(), folder)


def test_a_state_of_another_model_is_named(engine, tmp_path):
    save(States(tiny_runtime(), tmp_path / "state", keep=1), engine, 1)
    other = start_training(
        tiny_runtime(),
        tiny_model("llama", hidden_size=64),
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
        micro_batch_size=1,
    )
    with pytest.raises(UserError, match="belongs to another model or method"):
        load_state(other, tmp_path / "state" / "step-1")


# --- what interrupted saves leave ------------------------------------------------------------------------------------


def folder_of(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def test_a_model_that_was_moved_aside_is_put_back_when_it_is_looked_for(tmp_path):
    folder_of(tmp_path / f"model{OLD}", "whole")
    found = resolve(str(tmp_path / "model"))
    assert (found / "config.json").read_text() == "whole"
    assert names(tmp_path) == ["model"]
    put_back(tmp_path / "model")  # a second rank finds it done


def test_a_model_that_is_there_is_left_alone(tmp_path):
    folder_of(tmp_path / "model", "new")
    folder_of(tmp_path / f"model{OLD}", "old")
    folder_of(tmp_path / f"model{PARTIAL}", "half")  # perhaps another run's, which is writing now
    assert (resolve(str(tmp_path / "model")) / "config.json").read_text() == "new"
    assert len(names(tmp_path)) == 3


def test_what_interrupted_saves_left_in_a_run_folder_is_cleaned_up(tmp_path):
    clean_inside(tmp_path / "none")
    for name in ("patch", f"patch{PARTIAL}", f"finetuned{PARTIAL}", f"repaired{OLD}", f"other{OLD}", "other"):
        folder_of(tmp_path / name, name)
    (tmp_path / "events.jsonl").write_text("mine")
    clean_inside(tmp_path)
    assert names(tmp_path) == ["events.jsonl", "other", "patch", "repaired"]
    assert (tmp_path / "other" / "config.json").read_text() == "other"


def test_of_a_state_that_was_moved_aside_the_resume_makes_use(engine, tmp_path):
    folder = tmp_path / "state"
    states = States(tiny_runtime(), folder, keep=1)
    save(states, engine, 5)
    states.finish()
    (folder / "step-5").rename(folder / f"step-5{OLD}")
    folder_of(folder / f"step-7{PARTIAL}", "half")
    assert newest_whole(tiny_runtime(), folder) == folder / "step-5"
    assert names(folder) == ["step-5"]
