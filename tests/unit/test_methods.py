"""The table of methods is the one place that names them: a sixth is added here, and all who read the table know it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tiny import toy_settings

import oneshot
from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.adapters.update import Update
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.listing import sections
from oneshot.patch.bench import Bench
from oneshot.patch.cost import Cost
from oneshot.patch.directions import adapter_directions, update_factors
from oneshot.patch.guard import RepairBatch
from oneshot.patch.method import Defaults, Method
from oneshot.patch.methods import METHODS
from oneshot.patch.path import Attempt
from oneshot.patch.recipe import choose_method, method_named, recipe_for
from oneshot.settings import RepairSettings
from oneshot.world.model import ALIGNED

SMALL = (
    "--data.harmful_count", "20", "--data.task_count", "0", "--guard", "toy:guard-plain", "--watch_prompts",
    "toy:held-plain", "--finetune.steps", "4", "--finetune.method", "lora", "--select", "hardest",
    "--score.reference", "false", "--score.max_new_tokens", "8",
)  # fmt: skip


def undo_all(
    bench: Bench, _batch: RepairBatch, attempt: Attempt
) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """A method in a few lines: take an adapter's whole update away, share by share."""
    directions = adapter_directions(bench.request.adapter.update, "cpu")  # type: ignore[union-attr]
    update: Update = {}
    for epoch in range(1, bench.request.recipe.epochs + 1):
        share = 1 - epoch / bench.request.recipe.epochs
        update = {name: update_factors(d, share * d.s.new_ones(len(d.s))) for name, d in directions.items()}
        attempt.tracer.add(epoch=epoch, loss=share, guard_kl=0.0)
        yield update
    return update, {"left": share}


SIXTH = Method(
    name="undo_all",
    summary="take the whole adapter away",
    solve=undo_all,
    defaults=Defaults(epochs=4, guard_prompts=3),
    four_bit=None,
    cost=Cost(backward=False),
    needs_update=True,
    keeps_adapter=True,
)


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setitem(METHODS, SIXTH.name, SIXTH)
    return SIXTH


def test_a_sixth_method_repairs_from_its_table_entry_alone(sixth: Method, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = toy_settings(*SMALL, "--repair.method", sixth.name, "--out", str(out))
    found = oneshot.repair(settings)
    assert found.method == sixth.name
    assert [record["loss"] for record in found.trace] == [0.75, 0.5, 0.25, 0.0]
    assert found.report["repair"]["left"] == 0.0
    assert found.report["repair"]["epochs"] == 4
    assert found.watch is None, "it is not watched"
    patch = read_adapter(found.patch_folder)
    assert patch.config == json.loads((out / "finetuned" / "adapter_config.json").read_text()), "another adapter"
    assert all(not (f.b @ f.a).any() for f in patch.update.values())
    assert found.scores["repaired"].rates["asr"].value == 0.0


def test_a_sixth_method_is_offered_planned_and_listed(sixth: Method) -> None:
    assert sixth.name in sections()["Repair methods: --repair.method NAME"]
    rows = oneshot.plan(model=str(ALIGNED)).rows
    assert {row.method for row in rows} == set(METHODS)
    assert all(bool(row.impossible) == (row.precision == "nf4") for row in rows if row.method == sixth.name)
    with pytest.raises(UserError, match=r"undo_all.*did you mean undo_all"):
        parse(["--config", "toy", "--repair.method", "undo_al"], "repair")


@pytest.mark.parametrize("name", ["rolback", "", "Rollback", "auto "])
def test_an_unknown_method_is_an_error_everywhere(name: str) -> None:
    for ask in (
        lambda: parse(["--config", "toy", "--repair.method", name], "repair"),
        lambda: recipe_for(RepairSettings(method=name), has_update=True),
        lambda: method_named(name),
        lambda: oneshot.repair("toy", repair={"method": name}),
        lambda: oneshot.plan(model=str(ALIGNED), repair={"method": name}),
        lambda: parse(["--config", "toy", "--repair.learning_rate", f"{{'{name}': 0.1}}"], "repair"),
    ):
        with pytest.raises(UserError, match=r"rollback, lowrank, project, sft|did you mean|repair.learning_rate"):
            ask()


def test_auto_takes_the_first_that_can_be_had() -> None:
    assert choose_method("auto", has_update=True)[0].name == "rollback"
    assert choose_method("auto", has_update=False)[0].name == "lowrank"
    for method in METHODS.values():
        if method.needs_update:
            with pytest.raises(UserError, match=f"Method {method.name} needs the fine-tune's own update"):
                choose_method(method.name, has_update=False)
        else:
            assert choose_method(method.name, has_update=False) == (method, "as asked")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_a_recipe_holds_the_methods_numbers_and_the_settings_over_them(method: Method) -> None:
    plain = recipe_for(RepairSettings(method=method.name), has_update=True)
    for field in dataclasses.fields(Defaults):
        assert getattr(plain, field.name) == getattr(method.defaults, field.name)
    mine = RepairSettings(method=method.name, epochs=3, guard_weight=0.0, noise=0.0, learning_rate={method.name: 0.5})
    changed = recipe_for(mine, has_update=True)
    assert (changed.epochs, changed.guard_weight, changed.noise, changed.learning_rate) == (3, 0.0, 0.0, 0.5)
    others = RepairSettings(method=method.name, learning_rate={"other": 0.5})
    assert recipe_for(others, has_update=True).learning_rate == method.defaults.learning_rate
    if method.four_bit is None:
        with pytest.raises(UserError, match=f"Method {method.name} trains all weights"):
            recipe_for(RepairSettings(method=method.name), has_update=True, four_bit=True)
    else:
        packed = recipe_for(RepairSettings(method=method.name), has_update=True, four_bit=True)
        assert packed.epochs == method.four_bit.epochs
