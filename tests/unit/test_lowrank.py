import copy

import pytest
import torch
from tiny import FAMILIES, recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.checkpoint.adapters.update import Factors
from oneshot.patch.attach import Gradients, attached
from oneshot.patch.guard import repair_loss
from oneshot.patch.method import finished
from oneshot.patch.methods import lowrank
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer

STEPS, GUARD_WEIGHT = 4, 3.0
ALL = 10_000  # a rank that cuts nothing


def frozen(model):
    return model.requires_grad_(False)


def explicit_gradients(model, linears, batch, weight):
    """Weight gradients as autograd makes them."""
    frozen(model)
    for module in linears.values():
        module.weight.requires_grad_(True)
    loss = repair_loss(model, batch, weight, 1)[0]
    grads = torch.autograd.grad(loss, [module.weight for module in linears.values()])
    frozen(model)
    return float(loss.detach()), dict(zip(linears, grads))


def sgd(model, linears, batch, weight, eta):
    """Plain full-weight SGD on the same layers; returns the loss before each step."""
    frozen(model)
    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    optimizer = torch.optim.SGD(weights, lr=eta)
    losses = []
    for _ in range(STEPS):
        loss = repair_loss(model, batch, weight, 1)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    frozen(model)
    return losses


def step_size(model, linears, batch):
    loss, grads = explicit_gradients(model, linears, batch, 0.0)
    return 0.15 * loss / sum(float(g.square().sum()) for g in grads.values())


def solve(model, linears, batch, *, tracer=None, weight=0.0, epochs=STEPS, rank=ALL, **options):
    attempt, recipe = Attempt(tracer or Tracer(), weight), recipe_of("lowrank", epochs=epochs, rank=rank)
    return finished(lowrank.descend(tiny_runtime(), frozen(model), linears, batch, attempt, recipe, **options))[0]


@pytest.mark.parametrize("guard", [0, 3], ids=["example", "example+guard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_factored_steps_equal_full_weight_sgd(family, guard):
    model = tiny_model(family)
    batch = tiny_batch(model, guard)
    plain, linears = copy.deepcopy(model), targets_of(model)
    before = {name: module.weight.clone() for name, module in linears.items()}
    eta, weight = step_size(model, linears, batch), GUARD_WEIGHT if guard else 0.0
    tracer = Tracer()

    update = solve(model, linears, batch, tracer=tracer, weight=weight, fixed_step=eta)
    losses = sgd(plain, targets_of(plain), batch, weight, eta)

    assert losses[-1] < 0.95 * losses[0]
    assert set(update) == set(linears)
    for name, module in targets_of(plain).items():
        ours = before[name] + update[name].b @ update[name].a
        torch.testing.assert_close(ours, module.weight.detach(), rtol=1e-4, atol=1e-6)
        moved = (module.weight - before[name]).norm()
        assert moved > 0, name
        assert (ours - module.weight).norm() < 1e-3 * moved, f"{name}: the step itself differs"
        torch.testing.assert_close(linears[name].weight, before[name], rtol=0, atol=0)  # untouched
    assert (max(record["guard_kl"] for record in tracer.records) > 1e-4) == bool(guard)


def test_the_guard_changes_the_steps():
    model = tiny_model("llama")
    batch, linears = tiny_batch(model, 3), targets_of(model)
    eta = step_size(model, linears, batch)
    free, held = (solve(model, linears, batch, weight=w, fixed_step=eta) for w in (0.0, GUARD_WEIGHT))
    name = next(iter(linears))
    change = free[name].b @ free[name].a
    assert (held[name].b @ held[name].a - change).norm() > 0.01 * change.norm()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt_neox"])
def test_captured_pairs_are_the_explicit_gradients(family):
    model = tiny_model(family)
    batch, linears = tiny_batch(model, 2), targets_of(model)
    update = tiny_update(linears)  # with an update in place the pair is the gradient of the effective weight
    gradients = Gradients(linears)
    frozen(model)
    with attached(linears, update), gradients.capturing(model):
        example, kl, pairs = lowrank.gradient(tiny_runtime(), model, gradients, batch, GUARD_WEIGHT)
    for name, module in linears.items():
        module.weight.add_(update[name].b @ update[name].a)
    loss, grads = explicit_gradients(model, linears, batch, GUARD_WEIGHT)
    assert example + GUARD_WEIGHT * kl == pytest.approx(loss, rel=1e-4)
    assert kl > 1e-3
    for name, grad in grads.items():
        x, delta = pairs[name]
        assert (delta.T @ x - grad).norm() < 1e-3 * grad.norm(), name


def test_hooks_are_gone_afterwards():
    model = tiny_model("llama")
    batch, linears = tiny_batch(model), targets_of(model)
    before = repair_loss(model, batch, 0.0, 1)[1]
    solve(model, linears, batch, fixed_step=step_size(model, linears, batch))
    assert repair_loss(model, batch, 0.0, 1)[1] == before
    assert not any(module._forward_hooks for module in model.modules())
    assert not repair_loss(model, batch, 0.0, 1)[0].requires_grad


def test_gradient_checkpointing_gives_the_same_pairs():
    batch, found, forwards = None, [], []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        batch = batch or tiny_batch(model, 2)
        linears, gradients = targets_of(model), Gradients(targets_of(model))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        name, first = next(iter(linears.items()))
        calls = []
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with attached(linears, tiny_update(linears)), gradients.capturing(frozen(model)):
            found.append(lowrank.gradient(tiny_runtime(), model, gradients, batch, GUARD_WEIGHT)[2])
        forwards.append(len(calls))
    assert forwards == [1, 2], "checkpointing runs each layer again"
    for name, (x, delta) in found[0].items():
        assert delta.norm() > 0
        torch.testing.assert_close(found[1][name], (x, delta))


@pytest.mark.parametrize(("m", "n", "k"), [(40, 30, 12), (30, 40, 12), (9, 40, 12), (40, 9, 12)])
def test_compress_is_the_best_approximation(m, n, k):
    torch.manual_seed(0)
    factors = Factors(torch.randn(m, k), torch.randn(k, n))
    product = factors.b @ factors.a
    u, s, vt = torch.linalg.svd(product, full_matrices=False)
    for rank in (1, 3, 7):
        small = lowrank.compress(factors, rank)
        assert small.b.shape == (m, rank)
        assert small.a.shape == (rank, n)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(small.b @ small.a, best, rtol=1e-4, atol=1e-4)
    for rank in (k, k + 5, None):
        same = lowrank.compress(factors, rank)
        assert same.rank <= min(m, n, k)
        torch.testing.assert_close(same.b @ same.a, product, rtol=1e-4, atol=1e-4)


def test_rank_bounds_the_update_and_full_rank_loses_nothing():
    model = tiny_model("llama")
    batch, linears = tiny_batch(model, 2), targets_of(model)
    eta = step_size(model, linears, batch)
    whole = solve(model, linears, batch, weight=1.0, fixed_step=eta)
    full = solve(model, linears, batch, weight=1.0, fixed_step=eta, rank=48)
    cut = solve(model, linears, batch, weight=1.0, fixed_step=eta, rank=2)
    for name in linears:
        product = whole[name].b @ whole[name].a
        assert cut[name].rank == 2
        assert (full[name].b @ full[name].a - product).norm() < 1e-3 * product.norm()
        assert (cut[name].b @ cut[name].a - product).norm() > 1e-3 * product.norm()


def test_a_step_that_raises_the_loss_is_taken_back(monkeypatch):
    model = tiny_model("llama")
    batch, linears = tiny_batch(model), targets_of(model)
    for name, factors in solve(model, linears, batch, epochs=15).items():  # where there is far to fall
        linears[name].weight.data += factors.b @ factors.a
    start = float(repair_loss(model, batch, 0.0, 1)[1])
    assert start < 2.0
    monkeypatch.setattr(lowrank, "FIRST_DECREASE", 100.0)  # a first step that overshoots
    tracer = Tracer()
    assert solve(model, linears, batch, tracer=tracer, epochs=1) == {}
    assert [record["accepted"] for record in tracer.records] == [False]
    assert tracer.records[0]["loss"] > start

    tracer = Tracer()
    update = solve(model, linears, batch, tracer=tracer, epochs=12)
    with attached(linears, update):
        end = float(repair_loss(model, batch, 0.0, 1)[1])
    taken = [record["loss"] for record in tracer.records if record["accepted"]]
    assert taken
    assert end == pytest.approx(taken[-1], rel=1e-3)
    assert end < start
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("rows", "m", "n"), [(5, 12, 9), (20, 12, 9), (1, 12, 9)])
def test_steepest_moves_every_direction_of_the_gradient_alike(rows, m, n, rank):
    torch.manual_seed(0)
    x, delta = torch.randn(rows, n), torch.randn(rows, m)
    right, left, nuclear = lowrank.steepest(x, delta, rank)
    held = min(rows, rank or rows)
    assert right.shape == (held, n)
    assert left.shape == (held, m)
    u, s, vt = torch.linalg.svd(delta.T @ x, full_matrices=False)
    kept = min(rows, m, n, rank or rows)
    length = s[:kept] / (s[:kept] + 1e-3 * s[0])  # noise, a thousandth of the largest, is not blown up
    if kept < min(rows, m, n):
        length = length * (s[:kept] - s[kept]) / (s[:kept] - 0.99 * s[kept])  # nor what barely made the cut
    torch.testing.assert_close(left.T @ right, u[:, :kept] * length @ vt[:kept], rtol=1e-4, atol=1e-4)
    assert nuclear == pytest.approx(float((s[:kept] * length).sum()), rel=1e-4)


def test_steepest_of_nothing_is_nothing():
    right, left, nuclear = lowrank.steepest(torch.zeros(4, 6), torch.zeros(4, 5), 3)
    assert not (left.T @ right).any()
    assert nuclear == 0.0


def test_a_loss_that_is_no_number_stops_the_repair():
    from oneshot.training.loop import Diverged

    model = tiny_model("llama")
    batch, linears = tiny_batch(model), targets_of(model)
    next(iter(linears.values())).weight.data[0, 0] = float("nan")
    with pytest.raises(Diverged, match="epoch 0"):
        solve(model, linears, batch)


def test_a_cut_between_equal_singular_values_is_steady_and_one_that_drops_nothing_is_exact():
    torch.manual_seed(0)
    q, p = (torch.linalg.qr(torch.randn(30, 6))[0] for _ in range(2))
    sizes = torch.tensor([1.0, 0.9, 0.5, 0.5, 0.5, 0.3])  # the third to the fifth are told apart by rounding alone
    found = []
    for noise in (1e-6, -1e-6):
        nudged = sizes + noise * torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0, 0.0])
        found.append(lowrank.compress(Factors(q * nudged, p.T), 3, steady=True))
    one, two = (f.b @ f.a for f in found)
    assert float((one - two).norm() / one.norm()) < 1e-3
    assert torch.linalg.svdvals(one)[:2].tolist() == pytest.approx([1.0, 0.9], rel=0.02)
    whole = lowrank.compress(Factors(torch.cat([q * sizes, q], dim=1), torch.cat([p.T, 0 * p.T])), 6, steady=True)
    assert torch.allclose(whole.b @ whole.a, (q * sizes) @ p.T, atol=1e-6)
