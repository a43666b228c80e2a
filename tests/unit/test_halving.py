"""Successive halving alone, on repairs that are made up; and real ones, stopped and gone on with."""

import dataclasses
import itertools
import math

import pytest
import torch
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.data.encoding import IGNORE
from oneshot.patch import directions as of_update
from oneshot.patch.guard import with_example
from oneshot.patch.halving import BUDGET, PASSING, Rung, Trial, halve, rungs, standing
from oneshot.patch.method import finished
from oneshot.patch.methods import lowrank, project, rollback
from oneshot.patch.objective import Distance
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer


@pytest.mark.parametrize("candidates", range(2, 40))
@pytest.mark.parametrize("epochs", [10, 20, 30, 80])
def test_those_left_behind_take_no_more_than_the_budget(candidates, epochs):
    ladder = rungs(candidates, epochs)
    counts = [rung.candidates for rung in ladder]
    assert counts[0] == candidates
    assert counts[-1] == 2 or ladder[-1].epochs == epochs, "whole repairs are compared, however many"
    assert all(after == math.ceil(before / 2) for before, after in itertools.pairwise(counts))
    lengths = [rung.epochs for rung in ladder]
    assert all(
        before < after and (after == epochs or after >= 2 * before) for before, after in itertools.pairwise(lengths)
    )
    left = [before - after for before, after in itertools.pairwise([*counts, 1])]
    spent = sum(count * length for count, length in zip(left, lengths))
    rounding = sum(left) / 2
    assert spent <= BUDGET * epochs + rounding or lengths[0] == 1, "an epoch is the least"
    assert spent > BUDGET * epochs / 2 - rounding


def test_there_is_no_rung_where_there_is_no_choice():
    assert rungs(1, 30) == []
    assert rungs(4, 30) == [Rung(4, 3), Rung(2, 8)]
    assert rungs(8, 30) == [Rung(8, 1), Rung(4, 2), Rung(2, 6)]
    assert rungs(2, 1) == [Rung(2, 1)]
    assert rungs(8, 1) == [Rung(8, 1)], "no rung that goes no epoch further"


def test_a_trial_that_goes_no_further_is_where_it_was():
    _, begin, _ = made_up(None)
    trial = begin(3)
    trial.advance(2)
    assert trial.advance(0) == {"at": (3, 2)}
    trial.finish()
    assert trial.advance(0) == trial.ended[0]


def made_up(values, length=20):
    """Candidates' rows, what begins their repairs, what judges them: F is ``values(candidate, epoch)``."""
    gone = {}

    def path(i):
        for gone[i] in range(1, length):
            yield {"at": (i, gone[i])}
        gone[i] = length
        return {"at": (i, length)}, {"of": i}

    def judge(update):
        return Distance(values(*update["at"]), 0.5)

    return gone, lambda i: Trial(path(i), Attempt(Tracer())), judge


def test_the_worse_half_is_left_behind_and_the_best_goes_on():
    gone, begin, judge = made_up(lambda i, epoch: abs(i - 2) / epoch)
    rows = [{"candidate": i} for i in range(5)]
    best, trial = halve(rows, [Rung(5, 2), Rung(3, 4), Rung(2, 8)], begin, judge)
    assert best["candidate"] == 2
    assert gone == {0: 2, 1: 8, 2: 8, 3: 4, 4: 2}
    assert [row["epochs"] for row in rows] == [2, 8, 8, 4, 2]
    assert [("f_after" in row) for row in rows] == [False, True, True, False, False]
    assert best["rungs"] == [{"epochs": e, "f": 0.5, "f_harm": 0.0, "f_task": 0.5} for e in (2, 4, 8)]
    assert sorted(rows, key=standing)[0] is best
    assert trial.finish() == ({"at": (2, 20)}, {"of": 2})
    assert gone[2] == 20


def test_only_those_that_are_compared_last_are_watched():
    looked = []

    class Watching:
        pass

    def path(i, attempt):
        for epoch in range(1, 9):
            if attempt.watch is not None:
                looked.append((i, epoch))
            yield {"at": i}
        return {"at": i}, {}

    def begin(i):
        attempt = Attempt(Tracer())
        return Trial(path(i, attempt), attempt, Watching)

    rows = [{"candidate": i} for i in range(3)]
    _, trial = halve(rows, [Rung(3, 1), Rung(2, 4)], begin, lambda update: Distance(update["at"], 0.0))
    assert looked == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    assert trial.watched() is trial.attempt.watch


def test_of_equal_ones_the_first_of_the_list_is_taken():
    _, begin, judge = made_up(lambda i, epoch: 1.0)
    rows = [{"candidate": i} for i in (3, 0, 2)]
    assert halve(rows, [Rung(3, 1), Rung(2, 2)], begin, judge)[0]["candidate"] == 3


def test_what_the_guard_takes_back_later_does_not_count():
    _, begin, _ = made_up(None)
    moved = {0: (0.3, 0.01), 1: (0.1, PASSING + 5.0), 2: (0.1, PASSING + 0.1), 3: (0.1, PASSING / 2)}
    rows = [{"candidate": i} for i in moved]
    halve(rows, [Rung(4, 1)], begin, lambda update: Distance(*moved[update["at"][0]]))
    assert [row["candidate"] for row in sorted(rows, key=standing)] == [3, 1, 2, 0]
    assert rows[1]["f_after"] == pytest.approx(5.1 + PASSING)


def test_what_is_no_number_loses():
    _, begin, judge = made_up(lambda i, epoch: math.nan if i == 0 else 9.0)
    rows = [{"candidate": i} for i in (0, 1)]
    assert halve(rows, [Rung(2, 1)], begin, judge)[0]["candidate"] == 1


def test_a_repair_that_ends_early_is_judged_by_what_it_came_to():
    _, begin, judge = made_up(lambda i, epoch: epoch + i, length=3)
    best, trial = halve([{"candidate": i} for i in range(2)], [Rung(2, 8)], begin, judge)
    assert (best["candidate"], best["epochs"], best["f_harm"]) == (0, 2, 3)
    assert trial.finish() == ({"at": (0, 3)}, {"of": 0})


def test_one_candidate_is_taken_untried():
    row = {"candidate": 7}
    assert halve([row], [], None, None) == (row, None)
    assert row == {"candidate": 7}


def begun(method, model, batch):
    """A path of a method on a tiny model."""
    attempt, linears = Attempt(Tracer(), 1.0), targets_of(model)
    if method == "rollback":
        directions = of_update.adapter_directions(tiny_update(linears, scale=0.2), "cpu")
        path = rollback.learn(tiny_runtime(), model, directions, batch, attempt, recipe_of(method, epochs=9))
    else:
        solve = {"lowrank": lowrank.descend, "project": project.step_along}[method]
        path = solve(tiny_runtime(), model, linears, batch, attempt, recipe_of(method, epochs=9, rank=4))
    return Trial(path, attempt)


def flat(found):
    return {
        name: torch.cat([part.flatten() for part in (each.b, each.a)]) if hasattr(each, "b") else each
        for name, each in (found[0] if isinstance(found, tuple) else found).items()
    }


@pytest.mark.parametrize("method", ["rollback", "lowrank", "project"])
def test_a_path_that_stopped_while_others_went_on_is_the_path_that_never_stopped(method):
    model = tiny_model("llama").requires_grad_(False)
    batch = tiny_batch(model, 3)
    shorter = dataclasses.replace(batch.example, labels=[*batch.example.labels[:-1], IGNORE])
    batches = [batch, with_example(batch, shorter)]
    whole = [begun(method, model, batch) for batch in batches]
    wanted = [flat(finished(trial.path)) for trial in whole]
    assert not any(torch.equal(wanted[0][name], wanted[1][name]) for name in wanted[0])

    trials = [begun(method, model, batch) for batch in batches]
    for epochs in (2, 1, 3):
        for trial in trials:
            trial.advance(epochs)
            assert not any(module._forward_hooks for module in model.modules()), "nothing stays attached"
    for trial, alone, found in zip(trials, whole, wanted):
        got = flat(trial.finish())
        assert all(torch.equal(got[name], found[name]) for name in found)
        assert trial.attempt.tracer.records == alone.attempt.tracer.records
