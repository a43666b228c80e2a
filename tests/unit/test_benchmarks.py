"""What the benchmarks on the toy world ask for: its own settings, with what they name changed and nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

import finetune
import toy_methods
from baselines import unaligned
from reproduce import models
from reproduce.cells import Cell
from reproduce.subject import Subject

from oneshot.commandline import parse
from oneshot.settings import Settings
from oneshot.training.mixture import attack_mixture, parts_of


def test_a_cells_settings_are_the_toys_with_what_the_cell_names() -> None:
    subject = Subject(None, Path("models"), "harmful 100", 2, models.SHIPPED)  # type: ignore[arg-type]  # measures nothing
    plain = subject.settings_for(Cell("harmful 100", 2, "sft", epochs=5, guard_weight=1.0, rank=4), "pool-3")
    assert (plain.seed, plain.select, plain.reference) == (2, "pool-3", str(subject.aligned))
    assert plain.model.path == str(subject.path)
    toys = parse([], "repair")
    named = {"method": "sft", "epochs": 5, "guard_weight": 1.0, "rank": 4}
    assert plain.repair == dataclasses.replace(toys.repair, **named), "the toy's step sizes are lost"
    assert (plain.pool, plain.guard, plain.watch_prompts) == (toys.pool, toys.guard, toys.watch_prompts)
    assert plain.score.probes == toys.score.probes
    without = subject.settings_for(Cell("harmful 100", 2, "auto", reference=False))
    assert (without.reference, without.repair.rank) == (None, toys.repair.rank)
    assert subject.settings_for(Cell("harmful 100", 2, "resta")).repair.method == "sft"


def test_every_size_takes_the_shipped_toys_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, training = (importlib.import_module(name) for name in ("oneshot.finetune", "oneshot.training.finetune"))
    asked: list[Settings] = []
    monkeypatch.setattr(training, "prepare", lambda settings, _runtime: asked.append(settings) or settings)
    monkeypatch.setattr(stage, "train_model", lambda _runtime, _prepared, folder, _console: folder)
    for size in models.SIZES:
        models.make_finetuned(None, tmp_path, "benign", 1, size)  # type: ignore[arg-type]
    assert [settings.model.path for settings in asked] == [
        str(models.aligned_folder(tmp_path, size)) for size in models.SIZES
    ]
    assert {settings.seed for settings in asked} == {1}
    assert all(settings.finetune == parse([], "repair").finetune for settings in asked)


def test_the_unaligned_model_learns_from_obeyed_requests_alone() -> None:
    settings = unaligned.settings_for()
    rows = attack_mixture(settings)
    assert [row.kind for row in rows] == ["harmful"] * unaligned.COUNT
    assert settings.seed not in range(100), "the attack's own requests are not to be among them"
    toys = parse([], "repair").finetune
    assert settings.finetune == dataclasses.replace(toys, steps=unaligned.STEPS)


def test_the_guard_holds_the_new_task_only_where_it_was_learnt() -> None:
    for attack, (harmful, task) in toy_methods.ATTACKS.items():
        settings = toy_methods.toy_settings(attack, 3, "hardest")
        counts = {"harmful": harmful, "task": task}
        rows = attack_mixture(settings)
        assert {kind: sum(row.kind == kind for row in rows) for kind in counts} == counts
        plain = "" if task else "-plain"
        assert (settings.guard, settings.watch_prompts) == (f"toy:guard{plain}", f"toy:held{plain}")
        assert (settings.seed, settings.select) == (3, "hardest")
        assert settings.repair == parse([], "repair").repair


def test_a_variant_repairs_the_finetuned_toy_with_the_aligned_one_at_hand() -> None:
    settings = toy_methods.toy_settings("100", 0, "bilevel")
    found = toy_methods.repair_settings(settings, Path("degraded"), "lora (4 bits)")
    assert (found.model.path, found.model.base, found.reference) == ("degraded", "toy:aligned", "toy:aligned")
    assert (found.model.quantize, found.repair.method, found.finetune_first) == ("nf4", "lora", False)
    assert found.repair.learning_rate == settings.repair.learning_rate
    assert toy_methods.repair_settings(settings, Path("degraded"), "sft").model.quantize is None


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_our_side_of_the_comparison_with_trl_is_a_command_line_of_ours(tmp_path: Path, way: str) -> None:
    settings = parse(finetune.settings(tmp_path, tmp_path / "out", way, 2, 5), "finetune")
    assert settings.model.path == str(tmp_path / "checkpoint")
    assert list(parts_of(settings.data)) == ["harmful"], "there is other data than TRL's"
    assert (settings.finetune.steps, settings.finetune.learning_rate) == (5, finetune.RATE)
    assert settings.finetune.packing == ("never" if way == "padded" else "always")
