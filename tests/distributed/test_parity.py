"""One process and two, under DDP, ZeRO-2 and ZeRO-3, do the same: fine-tunes, gradients, patches, scores, answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FINETUNE, METHODS, NF4, World
from harness import TOPOLOGIES
from safetensors.torch import load_file

from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.distributed
Outputs = Callable[[str], Path]
RTOL = 1e-4
PATCHES = [f"{method}{adapter}" for method in METHODS for adapter in ("", "-adapter")]
PATCHES += [f"repair-{name}" for name in NF4]


def product(folder: Path) -> dict[str, torch.Tensor]:
    """b @ a of every module of a PEFT adapter: factors are free to turn, what they change is not."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_B.weight", ".lora_A.weight")
    modules = {name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)}
    return {m: tensors[m + ends[0]].float() @ tensors[m + ends[1]].float() for m in modules}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of any matrix, relative to it (Frobenius norms).

    Not entry by entry: where a gradient is nearly zero, Adam divides rounding errors by their own size.
    """
    assert set(found) == set(wanted)
    worst, compared = 0.0, 0
    for name, want in wanted.items():
        assert found[name].shape == want.shape
        if not want.any():  # rollback may undo all of an adapter's matrix
            assert not found[name].any(), name
            continue
        compared += 1
        worst = max(worst, float((found[name] - want).norm() / want.norm()))
    assert 2 * compared > len(wanted), "most are empty: little is compared"
    return worst


def changed(found: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor - start[name] for name, tensor in found.items()}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", FINETUNE)
def test_same_finetuned_weights(name: str, topology: str, outputs: Outputs) -> None:
    one, two = outputs("single") / name / "finetuned", outputs(topology) / name / "finetuned"
    if name.startswith("lora"):
        # all of it is change, as below, from nothing: Adam's first steps go by the sign of gradients near 0, which
        # rounding decides (4 bits on a CPU with AVX-512: 5e-4; with AVX2 under 3e-4)
        assert off(product(two), product(one)) < (10 if "nf4" in name else 3) * RTOL
    else:
        start, ours, wanted = weights(ALIGNED), weights(two), weights(one)
        for tensor, want in wanted.items():
            torch.testing.assert_close(ours[tensor], want, rtol=RTOL, atol=RTOL * float(want.abs().max()), msg=tensor)
        # the change is much smaller than the weights, so this is the sharper half
        assert off(changed(ours, start), changed(wanted, start)) < 3 * RTOL


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", FINETUNE)
def test_same_losses_norms_and_tokens(name: str, topology: str, outputs: Outputs) -> None:
    """Adam hides a wrong scale of the gradient from the weights; the norm that is clipped shows it."""
    one, two = events(outputs("single") / name), events(outputs(topology) / name)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert b["tokens"] == a["tokens"]
        for field in ("loss", "grad_norm", "learning_rate"):
            assert b[field] == pytest.approx(a[field], rel=RTOL), field


@pytest.mark.parametrize("topology", ["single", *TOPOLOGIES])
def test_a_diverging_finetune_keeps_its_last_good_weights(topology: str, outputs: Outputs) -> None:
    folder = outputs(topology) / "diverging"
    assert "The last good weights are in" in (folder / "error.txt").read_text()
    assert not (folder / "finetuned").exists()
    assert (folder / "last_good" / "SAFETY_DEGRADED.json").is_file()
    assert weights(folder / "last_good").keys() == weights(ALIGNED).keys()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_factored_gradients_on_every_rank(checkpointing: bool, topology: str, outputs: Outputs) -> None:
    one = load_file(outputs("single") / "gradients-False.0.safetensors")
    for rank in (0, 1):
        two = load_file(outputs(topology) / f"gradients-{checkpointing}.{rank}.safetensors")
        assert off(two, one) < 1e-5


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", PATCHES)
def test_same_patch(name: str, topology: str, outputs: Outputs) -> None:
    one, two = product(outputs("single") / name / "patch"), product(outputs(topology) / name / "patch")
    assert off(two, one) < RTOL


@pytest.mark.parametrize("topology", ["single", *TOPOLOGIES])
@pytest.mark.parametrize("method", ["rollback", "lowrank"])
def test_same_patch_in_several_passes(method: str, topology: str, outputs: Outputs) -> None:
    """Steps whose rows go through the model in as many passes as there are rows, or nearly."""
    one, two = (product(outputs(t) / n / "patch") for t, n in (("single", method), (topology, f"{method}-passes")))
    assert off(two, one) < RTOL


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_same_patch_of_a_guard_in_turns(topology: str, outputs: Outputs) -> None:
    """Three prompts of it in an epoch, alike on any number of ranks."""
    one, two = (product(outputs(t) / "rollback-turns" / "patch") for t in ("single", topology))
    assert off(two, one) < RTOL
    assert off(product(outputs("single") / "rollback" / "patch"), one) > 10 * RTOL, "all of it in an epoch is another"


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", PATCHES)
def test_same_merged_checkpoint(name: str, topology: str, outputs: Outputs, world: World) -> None:
    start = weights(ALIGNED if name.endswith("adapter") else world.degraded)
    one = changed(weights(outputs("single") / name / "repaired"), start)
    two = changed(weights(outputs(topology) / name / "repaired"), start)
    moved = [n for n, change in one.items() if change.abs().max() > 0]
    undone = [m for m, part in product(outputs("single") / name / "patch").items() if not part.any()]
    assert len(moved) + len(undone) >= 21, "seven matrices in each of three layers"
    assert all(torch.equal(two[n], one[n]) for n in one if n not in moved)
    # sft trains all weights with Adam, as a fine-tune does, whose change has the same bound
    bound = 3 * RTOL if name.startswith("sft") else RTOL
    assert off({n: two[n] for n in moved}, {n: one[n] for n in moved}) < bound


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", PATCHES)
def test_same_report(name: str, topology: str, outputs: Outputs) -> None:
    """Scores, the example taken and the trace; what depends on the world size is there for every rank."""
    one, two = (json.loads((outputs(t) / name / "report.json").read_text()) for t in ("single", topology))
    assert two["stages"] == one["stages"]
    assert two["stages"]["repaired"]["asr"]["n"] == 6
    assert two["example"]["id"] == one["example"]["id"]
    assert two["example"]["score"] == pytest.approx(one["example"]["score"], rel=RTOL)
    losses = [[record["loss"] for record in report["repair"]["trace"]] for report in (one, two)]
    assert len(losses[0]) >= 3
    assert losses[1] == pytest.approx(losses[0], rel=RTOL, abs=RTOL * losses[0][0])
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(two["resources"]["peak_rss_bytes"]) == 2
    assert min(two["resources"]["peak_rss_bytes"]) > 100e6


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_same_answers_on_every_rank(topology: str, outputs: Outputs) -> None:
    one = json.loads((outputs("single") / "answers.0.json").read_text())
    assert len(one) == 7
    assert all(one)
    for rank in (0, 1):
        assert json.loads((outputs(topology) / f"answers.{rank}.json").read_text()) == one


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_weights_that_take_no_part_in_the_loss_stop_nobody(topology: str, outputs: Outputs) -> None:
    one = load_file(outputs("single") / "unused.0.safetensors")
    for rank in (0, 1):
        assert off(load_file(outputs(topology) / f"unused.{rank}.safetensors"), one) < 1e-6


@pytest.mark.parametrize("topology", ["single", *TOPOLOGIES])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_checkpoints_are_repaired(method: str, topology: str, outputs: Outputs, world: World) -> None:
    folder = outputs(topology) / f"{method}-bf16"
    trace = json.loads((folder / "report.json").read_text())["repair"]["trace"]
    assert trace[-1]["loss"] < trace[0]["loss"]
    tensors = load_file(folder / "patch" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())
    merged, start = weights(folder / "repaired"), weights(world.bf16)
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in start.items()}
    assert sum(not torch.equal(merged[n], start[n]) for n in start) >= 21
