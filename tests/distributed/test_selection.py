"""Factored arithmetic and the choice of the example are the same on one rank and on two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import selection_jobs as jobs
import torch
from ranks import start_ranks
from safetensors.torch import load_file, save_file

from oneshot.data.encoding import pad_batch
from oneshot.patch.linears import select_linears
from oneshot.training.objective import cross_entropy_sum
from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.distributed
TOPOLOGIES = {"single": ("ddp", 1), "ddp": ("ddp", 2), "zero3": ("zero3", 2)}
RTOL = 1e-6
Chosen = Callable[[str], list[dict[str, Any]]]


@functools.cache
def materialized(family: str) -> dict[str, dict[str, Any]]:
    """The same figures from autograd's m x n gradients, in fp64."""
    model = jobs.build(family)
    linears = select_linears(model).targets
    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    gradients = []
    for seed in (1, 2):
        tensors = pad_batch(jobs.rows(seed), 0)
        labels = tensors.pop("labels")
        loss = cross_entropy_sum(model(**tensors, use_cache=False).logits, labels)
        gradients.append(torch.autograd.grad(loss, weights))
    return {
        name: {
            "inner": float((one * two).sum()),
            "squares": [float(one.square().sum()), float(two.square().sum())],
            "singular": torch.linalg.svdvals(one).tolist(),
        }
        for name, one, two in zip(linears, *gradients)
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_factored_arithmetic_is_that_of_whole_gradients(topology: str, tmp_path: Path) -> None:
    """In fp64, on four families; the inner products of nearly orthogonal gradients too."""
    sharding, world = TOPOLOGIES[topology]
    for found in start_ranks(jobs.arithmetic, world, sharding, tmp_path / "ranks", {}).results():
        for family in jobs.FAMILIES:
            for name, wanted in materialized(family).items():
                got = found[family][name]
                assert got["dtype"] == "torch.float64"
                assert got["inner"] == pytest.approx(wanted["inner"], rel=RTOL), (family, name)
                assert got["squares"] == pytest.approx(wanted["squares"], rel=RTOL)
                floor = 1e-12 * wanted["singular"][0]  # below it both hold rounding errors
                width = min(len(got["singular"]), len(wanted["singular"]))
                assert got["singular"][:width] == pytest.approx(wanted["singular"][:width], rel=RTOL, abs=floor)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    """What each topology's ranks choose for the toy's aligned model, so disturbed that it refuses little."""
    folder = tmp_path_factory.mktemp("selection")
    model = folder / "model"
    model.mkdir()
    for file in ALIGNED.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(ALIGNED / "model.safetensors")
    disturbed = {n: t + 1.5 * t.std() * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(disturbed, model / "model.safetensors", metadata={"format": "pt"})

    @functools.cache
    def run(topology: str) -> list[dict[str, Any]]:
        name, _, checkpointed = topology.partition("-")
        sharding, world = TOPOLOGIES[name]
        arguments = {"model": str(model), "aligned": str(ALIGNED), "count": 11, "checkpointing": bool(checkpointed)}
        return start_ranks(jobs.choices, world, sharding, folder / topology, arguments).results()

    return run


@pytest.mark.parametrize("topology", ["ddp", "zero3", "zero3-checkpointed"])
def test_two_ranks_choose_as_one(topology: str, chosen: Chosen) -> None:
    one = chosen("single")[0]
    assert len({round(row["alignment"], 3) for row in one["bilevel"]["table"]}) > 5, "there is something to order"
    for found in chosen(topology):
        assert found.keys() == one.keys()
        for rule, wanted in one.items():
            got = found[rule]
            assert got["index"] == wanted["index"], rule
            assert [row["candidate"] for row in got["table"]] == [row["candidate"] for row in wanted["table"]]
            for ours, theirs in zip(got["table"], wanted["table"]):
                for one_rung, other in zip(ours.pop("rungs", []), theirs.get("rungs", [])):
                    assert one_rung == pytest.approx(other, rel=2e-3), rule
                assert ours == pytest.approx({k: v for k, v in theirs.items() if k != "rungs"}, rel=2e-3), rule
    tried = one["bilevel"]["table"][:3]
    assert [[rung["epochs"] for rung in row["rungs"]] for row in tried] == [[1, 2], [1, 2], [1]]
    assert [row.get("f_after") == row["rungs"][-1]["f"] for row in tried] == [True, True, False]
    assert len({rung["f"] for row in tried for rung in row["rungs"]} | {tried[0]["f_before"]}) == 6
