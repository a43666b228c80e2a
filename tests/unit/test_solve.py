"""The third step: a repair that was tried out goes on from where it stopped, under the watch, and may be tried anew."""

import dataclasses

import pytest
import torch
from tiny import load_unrefusing, tiny_runtime, toy_settings

from oneshot.data.encoding import IGNORE, Encoded
from oneshot.patch import bench as benches
from oneshot.patch import solve as solving
from oneshot.patch.check import check
from oneshot.patch.choose import choose
from oneshot.patch.path import ATTEMPTS, Reading
from oneshot.patch.select import Chosen
from oneshot.patch.solve import begin, solve

EPOCHS = 5
GOOD = Reading(margin=5.0, recovered=1.0, refused=0.0, divergence=0.001)
UNSAFE = Reading(margin=-1.0, recovered=0.5, refused=0.0, divergence=0.001)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Open a bench of the toy with a bias that makes refusals unlikely, and choose the pool's first example."""
    load_unrefusing(monkeypatch, tmp_path)

    def make(*argv):
        options = ("--repair.method", "lowrank", "--repair.guard_prompts", "4", "--repair.epochs", str(EPOCHS))
        request = check(toy_settings(*options, *argv), tiny_runtime())
        return benches.opened(request)

    return make


def first_of(bench):
    return choose(bench, chosen=Chosen(0, "user", 0.0)).batch


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name].b, other[name].b) and torch.equal(one[name].a, other[name].a) for name in one)


def test_a_repair_that_was_tried_out_goes_on_and_tells_its_whole_path(opened):
    with opened("--repair.watch", "false") as bench:
        batch, told = first_of(bench), []
        whole = solve(bench, batch, 0)
        begun = begin(bench, batch, 0)
        begun.advance(2)
        found = solve(bench, batch, 0, told.append, begun)
    assert [record["epoch"] for record in whole.trace] == list(range(1, EPOCHS + 1))
    assert told == found.trace == whole.trace
    assert same(found.update, whole.update)


def test_the_watch_looks_at_what_is_left_of_a_repair_and_a_second_attempt_begins_anew(opened, monkeypatch):
    monkeypatch.setattr(solving, "read_probes", lambda *_: UNSAFE)
    with opened() as bench:
        batch = first_of(bench)
        begun = begin(bench, batch, 0)
        begun.advance(2)
        found = solve(bench, batch, 0, begun=begun)
        alone = solve(bench, batch, 0)
    attempts = [[], []]
    for record in found.trace:
        attempts[len(attempts[0]) >= EPOCHS].append(record)
    assert [[record["epoch"] for record in attempt] for attempt in attempts] == [list(range(1, EPOCHS + 1))] * ATTEMPTS
    for number, attempt in enumerate(attempts):
        for record in attempt:
            looked = record["accepted"] and (number or record["epoch"] > 2)
            assert ("margin" in record) == looked
    assert len({record.get("guard_weight") for record in attempts[1] if record["accepted"]}) == 1
    assert [record["loss"] for record in found.trace] == [record["loss"] for record in alone.trace]


def test_a_repair_that_ended_before_it_was_watched_is_looked_at_as_it_is(opened, monkeypatch):
    monkeypatch.setattr(solving, "read_probes", lambda *_: GOOD)
    with opened() as bench:
        batch = first_of(bench)
        begun = begin(bench, batch, 0)
        update = begun.advance(2 * EPOCHS)
        assert begun.ended is not None
        found = solve(bench, batch, 0, begun=begun)
    assert same(found.update, update)
    assert found.facts["kept"] == {"epoch": begun.epochs, "guard_weight": bench.request.recipe.guard_weight}
    assert found.stopped_by.startswith("recovered")


def test_an_update_on_an_adapter_has_the_adapter_in_it(opened):
    from oneshot.checkpoint.adapters.update import Factors

    with opened("--repair.watch", "false") as bench:
        batch = first_of(bench)
        name, module = next(iter(bench.linears.targets.items()))
        own = {name: Factors(torch.full((module.out_features, 1), 0.01), torch.ones(1, module.in_features))}
        adapter = type("Adapter", (), {"update": own})()
        bench = dataclasses.replace(bench, request=dataclasses.replace(bench.request, adapter=adapter))
        begun = begin(bench, batch, 0)
        for update in (begun.advance(1), begun.finish()[0]):
            assert torch.equal(update[name].a[:1], own[name].a)
            assert torch.equal(update[name].b[:, :1], own[name].b)
        assert not any(layer._forward_hooks for layer in bench.linears.targets.values())


def test_what_was_looked_at_is_what_is_written_where_the_second_attempt_is_no_better(opened, monkeypatch):
    readings = [UNSAFE, *[dataclasses.replace(UNSAFE, recovered=0.1)] * EPOCHS]
    monkeypatch.setattr(solving, "read_probes", lambda *_: readings.pop(0))
    with opened() as bench:
        batch = first_of(bench)
        begun = begin(bench, batch, 0)
        update = begun.advance(2 * EPOCHS)
        found = solve(bench, batch, 0, begun=begun)
    assert len(found.trace) > EPOCHS, "there was a second attempt"
    assert found.facts["kept"]["epoch"] == begun.epochs
    assert same(found.update, update)


def test_of_an_example_of_several_turns_the_watch_looks_for_the_last_answer(opened, tmp_path):
    with opened() as bench:
        request = bench.request
        example = request.candidates[0]
        start = example.labels.index(next(label for label in example.labels if label != IGNORE))
        refusal = example.input_ids[start:]
        earlier = Encoded([*example.input_ids[:3], 5, *example.input_ids], [IGNORE, IGNORE, IGNORE, 5, *example.labels])
        several = dataclasses.replace(request, candidates=[earlier, *request.candidates[1:]])
        watched = solving._watched(dataclasses.replace(bench, request=several, teacher=None), 0)
        assert watched.refusal == refusal
