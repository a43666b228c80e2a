"""Every method's arithmetic on the matrices of fused experts, against plain autograd on the whole parameters."""

import copy

import pytest
import torch
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.data.encoding import encode
from oneshot.patch import directions as of_update
from oneshot.patch.attach import Gradients, attached
from oneshot.patch.guard import repair_loss
from oneshot.patch.method import finished
from oneshot.patch.methods import lowrank, project, rollback
from oneshot.patch.objective import RefusalRows
from oneshot.patch.path import Attempt
from oneshot.patch.select import first_order, target_factors
from oneshot.patch.summed import gradient_factors
from oneshot.patch.trace import Tracer
from oneshot.patch.weighted import Weighted, layout_of
from oneshot.training.objective import cross_entropy_sum
from oneshot.world import language
from oneshot.world.model import build_tokenizer

ALL = 10_000  # a rank that cuts nothing


def mixture(**options):
    model = tiny_model("mixtral", **options).requires_grad_(False)
    model.set_experts_implementation("eager")  # transformers' default knows no fp64
    return model


def sparse():
    """A mixture most of whose experts a short batch does not reach."""
    return mixture(num_local_experts=96, num_experts_per_tok=1)


def matrix_of(layer, tensors):
    """A layer's own matrix out of what a tensor per parameter holds, by the parameter's identity."""
    if not isinstance(layer, ExpertMatrix):
        return tensors[id(layer.weight)]
    held = tensors[id(getattr(layer.module, layer.projection))][layer.index]
    return held.T if layer.transposed else held


def parameters_of(layers):
    found = {}
    for layer in layers.values():
        parameter = getattr(layer.module, layer.projection) if isinstance(layer, ExpertMatrix) else layer.weight
        found[id(parameter)] = parameter
    return found


def autograd(loss_of, layers):
    """Each layer's gradient of a loss, as autograd makes it."""
    parameters = parameters_of(layers)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    grads = torch.autograd.grad(loss_of(), list(parameters.values()))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    by_parameter = dict(zip(parameters, grads))
    return {name: matrix_of(layer, by_parameter) for name, layer in layers.items()}


def loss_on(model, row):
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    return cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, labels) / row.answer_tokens()


def rows_of(count):
    return [encode(row, build_tokenizer(), 64) for row in language.pool(count)]


def test_factored_steps_of_experts_equal_full_weight_sgd():
    model, steps, weight = mixture(), 3, 3.0
    plain, batch = copy.deepcopy(model), tiny_batch(model, 3)
    layers, theirs = targets_of(model), targets_of(plain)
    eta = 0.02
    before = {name: matrix_of(layer, parameters_of(layers)).clone() for name, layer in layers.items()}
    recipe = recipe_of("lowrank", epochs=steps, rank=ALL, rank_experts=ALL)
    path = lowrank.descend(
        tiny_runtime(), model, layers, batch, Attempt(Tracer(), weight), recipe, fixed_step=eta
    )  # fmt: skip
    update = finished(path)[0]
    parameters = list(parameters_of(theirs).values())
    optimizer = torch.optim.SGD([parameter.requires_grad_(True) for parameter in parameters], lr=eta)
    for _ in range(steps):
        optimizer.zero_grad()
        repair_loss(plain, batch, weight, 1)[0].backward()
        optimizer.step()
    moved = 0
    for name, layer in theirs.items():
        change = matrix_of(layer, parameters_of(theirs)).detach() - before[name]
        ours = update[name].b @ update[name].a if name in update else torch.zeros_like(change)
        torch.testing.assert_close(ours, change, rtol=1e-3, atol=1e-3 * float(change.abs().max()) + 1e-8)
        moved += isinstance(layer, ExpertMatrix) and float(change.norm()) > 0
    assert moved > 8


def test_experts_have_a_rank_of_their_own_and_those_without_tokens_no_factors():
    model = sparse()
    layers, batch = targets_of(model), tiny_batch(model)
    recipe = recipe_of("lowrank", epochs=2, rank=5, rank_experts=1)
    update = finished(lowrank.descend(tiny_runtime(), model, layers, batch, Attempt(Tracer(), 0.0), recipe))[0]
    ranks = {isinstance(layers[name], ExpertMatrix): factors.rank for name, factors in update.items()}
    assert ranks == {True: 1, False: 5}
    assert {name for name, layer in layers.items() if not isinstance(layer, ExpertMatrix)} <= set(update)
    assert len(update) < len(layers) / 2


def test_gradients_of_coefficients_are_autograds():
    """dL/dc = -sigma <u v^T, dL/dW> at c = 0, of experts as of others."""
    model = mixture()
    layers, batch = targets_of(model), tiny_batch(model, 2)
    directions = of_update.adapter_directions(tiny_update(layers, scale=0.1), "cpu")
    layout = layout_of(layers, {name: len(found.s) for name, found in directions.items()})
    flat = torch.zeros(sum(layout.sizes), requires_grad=True)
    update = Weighted(directions, layout, -flat)
    with attached(layers, update):
        repair_loss(model, batch, 1.0, 1)[0].backward()
    grads = autograd(lambda: repair_loss(model, batch, 1.0, 1)[0], layers)
    largest = float(flat.grad.abs().max())
    assert largest > 0
    for name, found in directions.items():
        wanted = -torch.stack(
            [s * (u @ grads[name] @ v) for s, u, v in zip(found.s, found.u.T, found.vt)]
        )  # fmt: skip
        torch.testing.assert_close(flat.grad[layout.own(name)], wanted, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("kept", [False, True], ids=["checkpoint", "adapter"])
def test_experts_that_nothing_was_sent_to_stay_as_they_are(kept):
    model = sparse()
    layers, batch = targets_of(model), tiny_batch(model, 2)
    directions = of_update.adapter_directions(tiny_update(layers, scale=0.1), "cpu")
    recipe = recipe_of("rollback", epochs=6, undo=50.0, learning_rate=0.3, noise=0.0)
    layout, reached = layout_of(layers, dict.fromkeys(layers, 3)), set()
    for part in batch.parts:
        with attached(layers, update := Weighted(directions, layout, torch.full((3 * len(layers),), float(kept)))):
            repair_loss(model, part, 1.0, 1)
        reached |= set(update.asked)
    path = rollback.learn(tiny_runtime(), model, directions, batch, Attempt(Tracer(), 1.0), recipe, kept=kept)
    first = next(path)
    weights, missed = finished(path)
    start = torch.eye(3).flatten() if kept else torch.zeros(3)
    experts = {name for name, layer in layers.items() if isinstance(layer, ExpertMatrix)}
    assert missed < experts
    assert experts - missed
    assert reached
    assert not reached & missed
    assert all(torch.equal(weights[name], start) for name in missed)
    undone = torch.cat([(start - weights[name])[:: 4 if kept else 1] for name in reached & experts])
    assert float(undone.mean()) > 0.1, "the pull acts"
    assert (set(first) == set(layers)) == kept


def test_a_mixture_begins_with_nothing_undone():
    """Its experts are reached one by one; begun on the way, the toy mixture ends with more requests complied with."""
    model = sparse()
    layers, batch = targets_of(model), tiny_batch(model, 2)
    directions = of_update.adapter_directions(tiny_update(layers, scale=0.2), "cpu")
    recipe, tracer = recipe_of("rollback", epochs=1, learning_rate=1e-4, noise=0.0), Tracer()
    assert recipe.undo
    finished(rollback.learn(tiny_runtime(), model, directions, batch, Attempt(tracer, 1.0), recipe))
    assert tracer.records[0]["undone"] == pytest.approx(0.0, abs=1e-3)


def test_first_order_scores_of_experts_are_autograds():
    model, rows = mixture().double(), rows_of(5)
    layers, harm = targets_of(model), RefusalRows([0, 2, 3], [rows_of(5)[i] for i in (0, 2, 3)])
    target = target_factors(tiny_runtime(), model, layers, harm, 0, rank=ALL)
    products, norms, _ = first_order(tiny_runtime(), model, layers, rows, target, 0)
    tokens = sum(row.answer_tokens() for row in harm.rows)
    whole = autograd(lambda: sum(loss_on(model, row) * row.answer_tokens() for row in harm.rows) / tokens, layers)
    length = float(sum(g.square().sum() for g in whole.values())) ** 0.5
    for row, product, norm in zip(rows, products, norms):
        own = autograd(lambda row=row: loss_on(model, row), layers)
        assert norm == pytest.approx(float(sum(g.square().sum() for g in own.values())) ** 0.5, rel=1e-5)
        wanted = float(sum((own[name] * whole[name]).sum() for name in layers))
        assert product == pytest.approx(wanted, abs=1e-5 * norm * length)


def test_each_conversation_has_its_own_rows_of_an_expert():
    model, rows = mixture().double(), rows_of(4)
    layers, seen = targets_of(model), {}
    gradients = Gradients(layers)
    with gradients.capturing(model):
        held = gradient_factors(
            tiny_runtime(), model, gradients, rows, 0, batch_size=3,
            seen=lambda place, name, pair: seen.__setitem__((place, name), pair[1].T @ pair[0]),
        )  # fmt: skip
    for place, row in enumerate(rows):
        own = autograd(lambda row=row: loss_on(model, row), layers)
        for name, wanted in own.items():
            found = seen.get((place, name), torch.zeros_like(wanted))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()) + 1e-12)
    whole = autograd(lambda: sum(loss_on(model, row) for row in rows), layers)
    for name, (x, delta) in held.items():
        torch.testing.assert_close(delta.T @ x, whole[name], rtol=1e-5, atol=1e-5 * float(whole[name].abs().max()))


def test_projected_directions_are_those_of_the_experts_gradient():
    model, example = mixture(), rows_of(1)[0]
    layers = targets_of(model)
    found = project.example_directions(tiny_runtime(), model, layers, example, 6, 2)
    whole = autograd(lambda: loss_on(model, example), layers)
    for name, layer in layers.items():
        if name not in found:
            assert float(whole[name].abs().max()) == 0
            continue
        rank = 2 if isinstance(layer, ExpertMatrix) else 6
        u, s, vt = torch.linalg.svd(whole[name])
        ours = (found[name].u * found[name].s) @ found[name].vt
        assert len(found[name].s) == rank
        torch.testing.assert_close(ours, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=1e-3, atol=1e-3 * float(s[0]))
        assert found[name].energy == pytest.approx(float(s.square().sum()), rel=1e-3)
