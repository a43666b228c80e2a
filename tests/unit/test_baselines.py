"""Published repairs on cases that can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

from baselines import resta, safe_lora, saliency, undo


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def test_the_safety_vector_is_what_alignment_added() -> None:
    finetuned, aligned, unaligned = {"w": matrix([5.0, 1.0])}, {"w": matrix([2.0, 1.0])}, {"w": matrix([1.0, -1.0])}
    assert torch.equal(resta.with_safety_vector(finetuned, aligned, unaligned)["w"], matrix([6.0, 3.0]))
    assert torch.equal(resta.with_safety_vector(finetuned, aligned, unaligned, 0.5)["w"], matrix([5.5, 2.0]))
    assert torch.equal(finetuned["w"], matrix([5.0, 1.0])), "changed in place"


def test_drop_and_rescale_thins_the_fine_tune_only() -> None:
    aligned = {"w": torch.full((100, 100), 2.0)}
    finetuned, unaligned = {"w": aligned["w"] + 3.0}, {"w": aligned["w"] - 1.0}
    thinned = resta.with_safety_vector(finetuned, aligned, unaligned, drop=0.75)["w"]
    # dropped: 2 + 1; kept: 2 + 3 / (1 - 0.75) + 1
    assert set(thinned.unique().tolist()) == {3.0, 15.0}
    assert float((thinned == 3.0).float().mean()) == pytest.approx(0.75, abs=0.02)
    again = [resta.with_safety_vector(finetuned, aligned, unaligned, drop=0.75, seed=seed)["w"] for seed in (0, 1)]
    assert torch.equal(again[0], thinned)
    assert not torch.equal(again[1], thinned)


def test_an_update_is_projected_where_it_leaves_the_alignment_subspace() -> None:
    aligned = {"along": torch.zeros(2, 2), "across": torch.zeros(2, 2), "norm": torch.zeros(2)}
    # alignment moved the first output by 3 and 4: V V^T / |V| = 25 / 5 on it, and nothing on the second
    unaligned = {"along": -matrix([3.0, 4.0], [0.0, 0.0]), "across": -matrix([3.0, 4.0], [0.0, 0.0])}
    finetuned = {
        "along": matrix([1.0, 2.0], [0.0, 0.0]), "across": matrix([1.0, 0.0], [10.0, 0.0]), "norm": torch.ones(2),
    }  # fmt: skip
    names = ["along", "across"]
    found, changed = safe_lora.projected(finetuned, aligned, unaligned, names, 0.35)
    assert changed == ["across"], "cosine 1 stays, cosine 1 / sqrt(101) goes"
    assert torch.allclose(found["across"], matrix([5.0, 0.0], [0.0, 0.0]))
    assert torch.equal(found["along"], finetuned["along"])
    assert torch.equal(found["norm"], finetuned["norm"])
    found, changed = safe_lora.projected(finetuned, aligned, unaligned, names, 1.1)
    assert changed == names
    assert torch.allclose(found["along"], matrix([5.0, 10.0], [0.0, 0.0]))
    assert safe_lora.projected(finetuned, aligned, unaligned, names, 0.05)[1] == []


def test_the_update_of_a_layer_that_alignment_left_alone_goes() -> None:
    still = {"w": torch.ones(2, 3)}
    found, changed = safe_lora.projected({"w": torch.full((2, 3), 5.0)}, still, still, ["w"])
    assert changed == ["w"]
    assert torch.equal(found["w"], still["w"])


@pytest.mark.parametrize(("weighed", "trained"), [(True, [3]), (False, [0])])
def test_only_the_most_salient_weights_are_trained(weighed: bool, trained: list[int]) -> None:
    """The loss is g . w: its gradient is g whatever w is, so that each step of Adam is the learning rate."""
    model = torch.nn.Linear(4, 1, bias=False)
    before = matrix([0.1, 1.0, 1.0, 10.0])
    gradient = matrix([-4.0, 1.0, 0.0, 3.0])  # |w g|: 0.4, 1, 0, 30
    with torch.no_grad():
        model.weight.copy_(before)
    count = saliency.patch_salient(
        model, lambda m: (m.weight * gradient).sum(), ["weight"], share=0.25, steps=3, weighed=weighed
    )
    assert count == 1
    moved = (model.weight.detach() - before)[0]
    assert moved.nonzero().flatten().tolist() == trained
    expected = -3e-4 * gradient[0, trained[0]].sign()
    assert float(moved[trained[0]]) == pytest.approx(float(expected), rel=1e-2)
    assert model.weight.grad is None


def test_salient_weights_are_ranked_over_all_matrices_together() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)})
    with torch.no_grad():
        for layer in model.values():
            layer.weight.fill_(1.0)
    count = saliency.patch_salient(
        model, lambda m: m["a"].weight.sum() + 2 * m["b"].weight.sum(), ["a.weight", "b.weight"], share=0.5, steps=1
    )
    assert count == 4
    assert torch.equal(model["a"].weight, torch.ones(2, 2))
    assert bool((model["b"].weight < 1.0).all())


def test_undo_puts_the_named_weights_back() -> None:
    aligned, finetuned = {"w": torch.zeros(2), "norm": torch.zeros(2)}, {"w": torch.ones(2), "norm": torch.ones(2)}
    found = undo.undone(finetuned, aligned, ["w"])
    assert torch.equal(found["w"], torch.zeros(2))
    assert torch.equal(found["norm"], torch.ones(2))
    found["w"] += 7
    assert torch.equal(aligned["w"], torch.zeros(2)), "shares the aligned model's memory"
