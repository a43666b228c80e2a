"""What rollback learns of an adapter: a matrix of its directions, which mixes and shortens and never lengthens."""

import pytest
import torch
from test_expert_hook import mixture
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.checkpoint.adapters.carrier import halves
from oneshot.checkpoint.adapters.update import Factors
from oneshot.patch.directions import adapter_directions, update_factors
from oneshot.patch.linears import select_linears
from oneshot.patch.method import finished
from oneshot.patch.methods import rollback
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer
from oneshot.patch.undoing import Cores, learnt_of


def cores(ranks):
    model = tiny_model("llama")
    layers = targets_of(model)
    update = tiny_update(layers, ranks=ranks, scale=0.2)
    directions = adapter_directions(update, "cpu")
    learnt = learnt_of(layers, directions, torch.device("cpu"), kept=True)
    assert isinstance(learnt, Cores)
    return learnt, directions, update


def matrices(learnt, flat):
    added = learnt.added(flat)
    return {name: added[learnt.layout.own(name)].view(rank, rank) for name, rank in learnt.ranks.items()}


def test_nothing_learnt_is_the_adapter_and_all_undone_is_nothing():
    learnt, directions, update = cores((1, 3, 8))
    flat = torch.zeros(sum(learnt.layout.sizes))
    for name, core in matrices(learnt, flat).items():
        found = update_factors(directions[name], core.flatten())
        torch.testing.assert_close(found.b @ found.a, update[name].b @ update[name].a, rtol=1e-4, atol=1e-5)
    assert all(not core.any() for core in matrices(learnt, learnt.ones).values())
    everything = torch.ones_like(flat, dtype=torch.bool)
    assert (learnt.undone(flat, everything), learnt.undone(learnt.ones, everything)) == (0, 1)
    assert float(learnt.pull(flat, everything)) == pytest.approx(1)
    assert float(learnt.pull(learnt.ones, everything)) == 0


def test_what_would_lengthen_is_shortened_and_the_rest_stays():
    learnt, _, _ = cores((1, 3, 8))
    torch.manual_seed(0)
    flat = torch.randn(sum(learnt.layout.sizes), requires_grad=True)
    before = {name: core.detach() for name, core in matrices(learnt, flat).items()}
    after = matrices(learnt, learnt.keep_within(flat))
    assert torch.equal(learnt.added(flat.detach()), torch.cat([core.flatten() for core in after.values()]))
    shortened = 0
    for name, core in after.items():
        u, s, vt = torch.linalg.svd(before[name])
        torch.testing.assert_close(core, (u * s.clamp(max=1)) @ vt, rtol=1e-4, atol=1e-5)
        shortened += float(s.max()) > 1
    assert shortened
    flat = torch.full_like(flat, float("nan"))
    assert learnt.keep_within(flat).isnan().all(), "a loss that is no number is found by the loss"


def test_directions_are_mixed_as_far_as_the_files_form_has_them():
    """Single experts have factors of gate and up of their own: mixed, neither would fit its rank any more."""
    model = mixture("qwen3_moe")
    layers = {name: x for name, x in select_linears(model).targets.items() if "experts.1." in name}
    update = tiny_update(layers, scale=0.2)
    name = next(name for name in layers if name.endswith("gate_up_proj"))
    m, half = layers[name].out_features, layers[name].out_features // 2
    b = torch.block_diag(torch.randn(half, 2), torch.randn(m - half, 2))
    update[name] = Factors(b, torch.randn(4, layers[name].in_features))
    directions = adapter_directions(update, "cpu")
    learnt = learnt_of(layers, directions, torch.device("cpu"), kept=True)
    torch.manual_seed(0)
    flat = torch.randn(sum(learnt.layout.sizes))
    added = learnt.added(learnt.keep_within(flat))
    for other in layers:
        found = update_factors(directions[other], added[learnt.layout.own(other)])
        assert (halves(other, found) is not None) == (other == name)
        core = added[learnt.layout.own(other)]
        assert (core == 0).any() == (other == name), "all others are mixed"


def test_an_adapters_directions_are_mixed_by_the_repair():
    model = tiny_model("llama").requires_grad_(False)
    layers, batch = targets_of(model), tiny_batch(model, 4)
    directions = adapter_directions(tiny_update(layers, scale=0.2), "cpu")
    recipe = recipe_of("rollback", epochs=6, learning_rate=0.3, noise=0.0, undo=0.0)
    path = rollback.learn(tiny_runtime(), model, directions, batch, Attempt(Tracer(), 1.0), recipe, kept=True)
    weights, _ = finished(path)
    for name, own in weights.items():
        rank = len(directions[name].s)
        core = own.view(rank, rank)
        assert float(torch.linalg.matrix_norm(core, 2)) <= 1 + 1e-5
        assert float((core - core.diag().diag()).abs().max()) > 0.01


def test_an_adapters_matrices_that_are_no_targets_stay_as_they_are():
    model = tiny_model("llama").requires_grad_(False)
    layers, batch = targets_of(model), tiny_batch(model, 4)
    directions = adapter_directions(tiny_update(layers, scale=0.2), "cpu")
    recipe = recipe_of("rollback", epochs=3, learning_rate=0.3, noise=0.0, undo=0.3, targets=r"layers\.0\..*q_proj")
    weights, _ = finished(
        rollback.learn(tiny_runtime(), model, directions, batch, Attempt(Tracer(), 1.0), recipe, kept=True)
    )
    for name, own in weights.items():
        rank = len(directions[name].s)
        assert torch.equal(own.view(rank, rank), torch.eye(rank)) == ("layers.0." not in name or "q_proj" not in name)


@pytest.mark.parametrize("kept", [False, True], ids=["checkpoint", "adapter"])
@pytest.mark.parametrize("undo", [0.0, 0.3], ids=["no pull", "pull"])
def test_learning_begins_on_the_way_to_undone_unless_nothing_pulls_there(kept, undo):
    """Without a pull, what neither example nor guard minds is to stay as the fine-tune left it."""
    model = tiny_model("llama").requires_grad_(False)
    layers, batch = targets_of(model), tiny_batch(model, 4)
    directions = adapter_directions(tiny_update(layers, scale=0.2), "cpu")
    recipe = recipe_of("rollback", epochs=1, learning_rate=1e-4, noise=0.0, undo=undo)
    tracer = Tracer()
    weights, _ = finished(
        rollback.learn(tiny_runtime(), model, directions, batch, Attempt(tracer, 1.0), recipe, kept=kept)
    )
    share = (0.5 if kept else 0.75) if undo else 0.0
    assert tracer.records[0]["undone"] == pytest.approx(share, abs=1e-3)
    for name, own in weights.items():
        rank = len(directions[name].s)
        left = (1 - share) * torch.eye(rank).flatten() if kept else torch.full((rank,), -share)
        torch.testing.assert_close(own, left, rtol=0, atol=1e-3)
