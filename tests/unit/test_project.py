import math

import pytest
import torch
from test_spectrum import FAMILIES, gradient
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime

from oneshot.data.encoding import encode
from oneshot.errors import UserError
from oneshot.patch.attach import attached
from oneshot.patch.guard import repair_loss
from oneshot.patch.method import finished
from oneshot.patch.methods import project
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer
from oneshot.world import language
from oneshot.world.model import build_tokenizer

EXAMPLE = encode(language.pool(1)[0], build_tokenizer(), 64)  # as in tiny_batch


def made(family="llama", guard=0):
    model = tiny_model(family).double().requires_grad_(False)
    return model, targets_of(model), tiny_batch(model, guard)


def solve(model, linears, batch, tracer=None, **changed):
    weight = changed.pop("guard_weight", 1.0)
    recipe = recipe_of("project", **{"epochs": 12, "rank": 4, **changed})
    path = project.step_along(tiny_runtime(), model, linears, batch, Attempt(tracer or Tracer(), weight), recipe)
    return finished(path)


def losses(model, batch, update=None, linears=None):
    with torch.no_grad(), attached(linears or {}, update or {}):
        _, example, kl = repair_loss(model, batch, 1.0, 1)
    return float(example), float(kl)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_is_the_truncated_gradient(family):
    model, linears, _ = made(family)
    directions = project.example_directions(tiny_runtime(), model, linears, EXAMPLE)
    wanted = gradient(model, linears, EXAMPLE)
    for rank in (1, 3, 20):
        update = project.projected(directions, 0.7, rank)
        assert set(update) == set(linears)
        for name, found in update.items():
            u, s, vt = torch.linalg.svd(wanted[name], full_matrices=False)
            cut = -0.7 * (u[:, :rank] * s[:rank]) @ vt[:rank]
            torch.testing.assert_close(found.b @ found.a, cut, rtol=1e-6, atol=1e-6 * float(cut.abs().max()))
    energy = sum(float(torch.linalg.svdvals(g)[:3].square().sum()) for g in wanted.values())
    assert project.energy_within(directions, 3) == pytest.approx(energy, rel=1e-6)


def test_a_patched_model_is_one_whose_weights_were_stepped():
    model, linears, batch = made()
    update, facts = solve(model, linears, batch, rank=20, learning_rate=0.05)
    assert facts["step_size"] == 0.05
    assert facts["energy_of_directions"] == pytest.approx(1.0)
    patched = losses(model, batch, update, linears)
    step = gradient(model, linears, EXAMPLE)
    with torch.no_grad():
        for name, module in linears.items():
            module.weight -= 0.05 * step[name]
    assert losses(model, batch) == pytest.approx(patched, rel=1e-6)


def test_the_search_lowers_the_loss_and_beats_every_step_it_tried():
    model, linears, batch = made(guard=3)
    tracer = Tracer()
    update, facts = solve(model, linears, batch, tracer)
    example, kl = losses(model, batch, update, linears)
    assert example < losses(model, batch)[0]
    tried = {row["step_size"]: row["loss"] + row["guard_kl"] for row in tracer.records}
    assert 2 < len(tried) <= 12
    assert tried[facts["step_size"]] == min(tried.values()) == pytest.approx(example + kl, rel=1e-5)
    best = math.inf
    for row in tracer.records:
        total = row["loss"] + row["guard_kl"]
        assert row["accepted"] == (total < min(best, losses(model, batch)[0]))
        best = min(best, total)


def test_the_first_step_aims_at_a_tenth_of_the_loss():
    model, linears, batch = made()
    tracer = Tracer()
    solve(model, linears, batch, tracer, epochs=1)
    energy = sum(float(torch.linalg.svdvals(g)[:4].square().sum()) for g in gradient(model, linears, EXAMPLE).values())
    assert tracer.records[0]["step_size"] == pytest.approx(0.1 * losses(model, batch)[0] / energy, rel=1e-5)


def test_a_heavier_guard_keeps_the_model_nearer():
    model, linears, batch = made(guard=3)
    light, heavy = (
        losses(model, batch, solve(model, linears, batch, guard_weight=weight)[0], linears)[1] for weight in (0.0, 30.0)
    )
    assert heavy < light / 2


@pytest.mark.parametrize("rank", [21, 40])
def test_of_a_short_example_all_directions_are_taken_and_a_sweep_wants_as_many_as_it_names(rank):
    model, linears, batch = made()
    most = solve(*made(), rank=20)
    found = solve(model, linears, batch, rank=rank)
    assert all(torch.equal(found[0][name].b, factors.b) for name, factors in most[0].items())
    with pytest.raises(UserError, match=rf"spectrum\.ranks asks for {rank} directions"):
        project.sweep(tiny_runtime(), model, linears, batch, project.Sweep([1, rank], [1.0], [EXAMPLE]), 0)


def test_a_sweep_measures_what_each_patch_does():
    model, linears, batch = made(guard=2)
    other = encode(language.pool(2)[1], build_tokenizer(), 64)
    rows = project.sweep(tiny_runtime(), model, linears, batch, project.Sweep([1, 20], [0.1, 1.0], [other]), 0)
    assert [(row["rank"], row["alpha"]) for row in rows] == [(1, 0.1), (1, 1.0), (20, 0.1), (20, 1.0)]
    whole = gradient(model, linears, EXAMPLE)
    energy = sum(float(one.square().sum()) for one in whole.values())
    eta = losses(model, batch)[0] / energy
    seen = {}
    for row in rows:
        assert row["step"] == pytest.approx(row["alpha"] * eta, rel=1e-5)
        update, _ = solve(model, linears, batch, rank=row["rank"], learning_rate=row["step"])
        assert (row["loss"], row["guard_kl"]) == pytest.approx(losses(model, batch, update, linears), rel=1e-5)
        with attached(linears, update):
            seen[row["rank"], row["alpha"]] = project.hardest(tiny_runtime(), model, [other], 0)[0]
    assert [row["others_loss"] for row in rows] == pytest.approx(list(seen.values()), rel=1e-5)
    leading = sum(float(torch.linalg.svdvals(one)[0].square()) for one in whole.values())
    assert [row["energy"] for row in rows] == pytest.approx([leading / energy] * 2 + [1.0] * 2, rel=1e-5)
    alone = project.sweep(tiny_runtime(), model, linears, batch, project.Sweep([1], [1.0], []), 0)
    assert math.isnan(alone[0]["others_loss"])


# the search alone


def searched(curve, tries=20, first=1.0):
    tracer = Tracer()
    *_, step = project.search(lambda s: (curve(s), 0.0), first, curve(0.0), Attempt(tracer, 1.0), tries)
    return step, [row["step_size"] for row in tracer.records]


@pytest.mark.parametrize("best", [0.03, 0.9, 1.0, 7.0, 300.0])
@pytest.mark.parametrize("first", [0.01, 1.0])
def test_the_minimum_of_a_valley_is_found(best, first):
    step, tried = searched(lambda s: (s - best) ** 2, tries=40, first=first)
    assert step == pytest.approx(best, rel=0.1)
    assert len(tried) < 40, "it ends by itself"


def test_no_step_is_taken_where_none_helps():
    step, tried = searched(lambda s: s, tries=6)
    assert step == 0.0
    assert tried == sorted(tried, reverse=True)


def test_a_step_that_leaves_no_number_is_passed_over():
    step, _ = searched(lambda s: 1.0 - s if s < 3 else math.nan)
    assert 2 <= step < 3


def test_the_best_of_two_valleys_that_were_seen_is_taken():
    curve = {0.0: 5.0, 1.0: 3.0, 2.0: 4.0, 4.0: 1.0}
    step, tried = searched(lambda s: curve.get(s, 6.0), tries=9)
    assert tried[:3] == [1.0, 2.0, 4.0]
    assert step == 4.0
