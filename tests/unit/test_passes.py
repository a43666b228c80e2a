"""A repair's step in several passes: the same loss and gradient, and each pass's activations gone before the next."""

import dataclasses
import weakref

import pytest
import torch
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime

from oneshot.patch import dealing
from oneshot.patch.attach import Gradients, attached
from oneshot.patch.dealing import passes_of
from oneshot.patch.directions import Directions, update_factors
from oneshot.patch.guard import repair_loss, with_example
from oneshot.patch.methods import lowrank, rollback
from oneshot.patch.steering import Course

GUARD = 4


def in_parts(batch, count):
    return dataclasses.replace(batch, count=count)


@pytest.fixture
def model():
    return tiny_model("llama").requires_grad_(False)


@pytest.fixture
def batch(model):
    """Held to other logits than the model's own, or the guard's gradient would be 0."""
    batch = tiny_batch(model, GUARD)
    assert batch.reference is not None
    return dataclasses.replace(batch, reference=batch.reference * 1.3)


@pytest.mark.parametrize("count", [2, 3, GUARD + 2])
def test_shares_add_up_over_the_passes(model, batch, count):
    parts = in_parts(batch, count).parts
    assert len(parts) == count
    assert sum(len(part.guard) for part in parts) == GUARD
    assert [len(part.targets) for part in parts] == [len(batch.targets), *[0] * (count - 1)]
    whole, split = repair_loss(model, batch, 2.0, 2), [repair_loss(model, part, 2.0, 2) for part in parts]
    for one, several in zip(whole, zip(*split)):
        assert float(sum(several)) == pytest.approx(float(one), rel=1e-5)


@pytest.mark.parametrize("count", [2, GUARD + 2])
def test_lowrank_sees_the_same_gradient(model, batch, count):
    linears, found = targets_of(model), []
    for each in (batch, in_parts(batch, count)):
        gradients = Gradients(linears)
        with gradients.capturing(model):
            found.append(lowrank.gradient(tiny_runtime(), model, gradients, each, 2.0))
    (loss, kl, pairs), (loss_too, kl_too, pairs_too) = found
    assert (loss_too, kl_too) == pytest.approx((loss, kl), rel=1e-5)
    assert min(loss, kl) > 0.01
    assert pairs.keys() == pairs_too.keys() == linears.keys()
    for name, (x, delta) in pairs.items():
        x_too, delta_too = pairs_too[name]
        torch.testing.assert_close(delta_too.T @ x_too, delta.T @ x, rtol=1e-4, atol=1e-6)


def of_coefficients(model, batch, noise=0.5):
    """The gradient that rollback takes, of coefficients along random directions."""
    linears = targets_of(model)
    torch.manual_seed(1)
    directions = {
        name: Directions(torch.randn(m.out_features, 3) / 9, torch.rand(3), torch.randn(3, m.in_features) / 9, 1.0)
        for name, m in linears.items()
    }
    flat = torch.full((3 * len(linears),), 0.2, requires_grad=True)
    pieces = zip(directions, flat.split(3))
    with attached(linears, {name: update_factors(directions[name], -c) for name, c in pieces}):
        draw = torch.Generator().manual_seed(0)
        losses = rollback._backward(tiny_runtime(), model, batch, Course(2.0, noise, 0.0, 0.1), 1.5, draw)
    return flat.grad, list(losses)


@pytest.mark.parametrize("count", [2, GUARD + 2])
def test_rollback_sees_the_same_gradient(model, batch, count):
    (whole, losses), (split, losses_too) = (of_coefficients(model, each) for each in (batch, in_parts(batch, count)))
    assert losses_too == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)
    assert whole.abs().max() > 1e-4


def most_saved(run):
    """The most bytes that autograd kept at any time."""
    now, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, size = tensor.detach(), tensor.nbytes  # with its graph it would keep itself
            now += size
            most = max(most, now)
            weakref.finalize(self, gone, size)

    def gone(size):
        nonlocal now
        now -= size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return most


def test_a_pass_is_gone_before_the_next(model):
    batch = tiny_batch(model, 12)
    whole, split = (most_saved(lambda b=b: of_coefficients(model, b, 0.0)) for b in (batch, in_parts(batch, 4)))
    assert split < 0.6 * whole  # rows are padded, and the update's own factors are kept throughout


def test_passes_are_as_many_as_their_room_asks_for(model, batch, monkeypatch):
    runtime = tiny_runtime()
    assert passes_of(runtime, model, len(batch.real), GUARD) == 1, "a tiny model has room enough"
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    held = len(batch.real) * 4 * sum(m.in_features + m.out_features for m in layers)
    monkeypatch.setitem(dealing.ROOM, "cpu", held // 2)
    assert passes_of(runtime, model, len(batch.real), GUARD) in (2, 3)
    monkeypatch.setitem(dealing.ROOM, "cpu", 1)
    weights = 4 * sum(p.numel() for p in model.parameters())
    most = min(-(-held // (weights // 2)), GUARD)
    assert passes_of(runtime, model, len(batch.real), GUARD) == most, "never less than half of what the weights take"
    shorter = with_example(in_parts(batch, 3), batch.example)
    assert shorter.count == 3


def test_the_methods_solve_in_passes(model, batch):
    """The paths end alike, whatever the number of passes."""
    from oneshot.patch.method import finished
    from oneshot.patch.path import Attempt
    from oneshot.patch.trace import Tracer

    linears, ends = targets_of(model), []
    for each in (batch, in_parts(batch, 3)):
        recipe = recipe_of("lowrank", epochs=4, rank=4)
        update, _ = finished(lowrank.descend(tiny_runtime(), model, linears, each, Attempt(Tracer(), 0.3), recipe))
        ends.append(update)
    for name, factors in ends[0].items():
        other = ends[1][name]
        torch.testing.assert_close(other.b @ other.a, factors.b @ factors.a, rtol=1e-3, atol=1e-6)
