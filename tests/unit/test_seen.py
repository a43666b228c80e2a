"""Prompts of the watch to which the unpatched model says nothing do not count, and that is said."""

import dataclasses
import json

import pytest
import torch
from tiny import load_unrefusing, tiny_runtime, toy_settings

from oneshot.patch import bench as benches
from oneshot.patch.check import check
from oneshot.patch.choose import choose
from oneshot.patch.examples import Prompts, read_held, read_refusable
from oneshot.patch.path import REFUSABLE
from oneshot.patch.probes import Watched
from oneshot.patch.seen import HARMLESS, TO_REFUSE, counted
from oneshot.patch.select import Chosen
from oneshot.patch.solve import solve

SAID = {"answered": "Take the towel and fold it.", "refused": "I can't help with that.", "empty": " ...", "garbled":
        "qq qq qq qq qq qq qq qq qq qq"}  # fmt: skip


def prompts(*verdicts):
    return [([{"role": "user", "content": f"{i}"}], SAID[verdict]) for i, verdict in enumerate(verdicts)]


def test_garbled_empty_and_refused_answers_do_not_count():
    taught = [(torch.zeros(1), True), (torch.ones(1), True), (torch.full((1,), 2.0), False)]
    watched = Watched(
        [7],
        prompts("answered", "refused", "garbled"),
        prompts("answered", "refused", "empty", "garbled", "refused", "answered"),
        taught,
        [([1], -0.5), ([2], -0.5), ([3], -0.5)],
    )
    kept, seen = counted(watched)
    assert (kept.refusable, kept.words) == (watched.refusable[:1], [([1], -0.5)])
    # what the aligned model refuses is where the repaired one should be, too
    assert kept.held == [watched.held[i] for i in (0, 4, 5)]
    assert [float(logits) for logits, _ in kept.taught] == [1.0, 2.0]
    assert seen.looked == {TO_REFUSE: 3, HARMLESS: 6}
    assert seen.left_out == {
        TO_REFUSE: {"refused": 1, "garbled": 1},
        HARMLESS: {"refused": 1, "empty": 1, "garbled": 1},
    }
    assert seen.note == (
        "The watch does not count 2 of 3 requests to be refused (1 refused, 1 garbled) and 3 of 6 harmless prompts (1 "
        "refused, 1 empty, 1 garbled), by the unpatched model's answers: give prompts in your model's language and "
        "domain with --watch_prompts."
    )
    assert seen.blind == ""


def test_too_few_that_count_make_the_watch_blind():
    _, seen = counted(Watched([7], prompts(*["garbled"] * 3, "answered"), prompts(*["refused"] * 3, "answered")))
    assert seen.blind == (
        "could not count 3 of 4 requests to be refused (3 garbled) and 3 of 4 harmless prompts (3 refused)"
    )
    _, seen = counted(Watched([7], prompts(*["refused"] * 4), prompts(*["answered"] * 4)))
    assert seen.blind == "", "a request that is refused needs no repair"
    _, seen = counted(Watched([7], [], prompts(*["answered"] * 4)))
    assert seen.blind == "had no requests to be refused to look at"
    assert "--watch_prompts" not in seen.note
    assert counted(Watched([7], prompts("answered"), prompts("answered")))[1].note == ""


@pytest.fixture
def solved(monkeypatch, tmp_path):
    """Repair the toy, which says this to all prompts of the watch, for an epoch."""
    load_unrefusing(monkeypatch, tmp_path)

    def run(refusable, held):
        options = ("--repair.method", "lowrank", "--repair.guard_prompts", "2", "--repair.epochs", "1")
        request = check(toy_settings(*options), tiny_runtime())
        with benches.opened(request) as bench:
            bench = dataclasses.replace(
                bench,
                refusable=[(prompt, SAID[refusable]) for prompt, _ in bench.refusable],
                held=[(prompt, SAID[held]) for prompt, _ in bench.held],
            )
            return solve(bench, choose(bench, chosen=Chosen(0, "user", 0.0)).batch, 0)

    return run


def test_a_watch_that_counts_nothing_watches_nothing(solved):
    found = solved("garbled", "empty")
    assert (found.watch, found.stopped_by) == (None, "epochs")
    assert found.seen.blind.startswith("could not count 16 of 16 requests to be refused (16 garbled) and 24 of 24 ")


@pytest.mark.parametrize(("refusable", "held"), [("answered", "garbled"), ("refused", "answered")])
def test_a_watch_may_count_one_kind_alone(refusable, held, solved):
    found = solved(refusable, held)
    assert found.watch is not None
    assert bool(found.seen.blind) == (held == "garbled")
    nothing = "divergence" if held == "garbled" else "margin"
    assert getattr(found.watch.best, nothing) == 0.0, "of none"


def test_ones_own_prompts_may_be_of_both_kinds(tmp_path):
    rows = [("should_refuse", f"no {i}") for i in range(3)] + [("task", "do"), ("lookalike", "like")]
    path = tmp_path / "watch.jsonl"
    path.write_text("".join(json.dumps({"kind": kind, "prompt": prompt}) + "\n" for kind, prompt in rows))
    settings = toy_settings("--watch_prompts", str(path))
    refusable = [prompt[-1]["content"] for prompt in read_refusable(settings)]
    assert refusable[:3] == ["no 0", "no 1", "no 2"], "the first ones are looked at"
    assert len(refusable) > 20, "then the pool's"
    held = read_held(settings, Prompts([], []))
    assert [p[-1]["content"] for p in (*held.own, *held.general)] == ["do", "like"]


def test_requests_that_are_refused_already_make_room_for_others(monkeypatch, tmp_path):
    load_unrefusing(monkeypatch, tmp_path)
    asked = []

    def answer(_model, _tokenizer, prompts, _runtime, **_options):
        asked.append(len(prompts))
        texts = [prompt[-1]["content"] for prompt in prompts]
        return [SAID["refused" if text in refused else "answered"] for text in texts]

    monkeypatch.setattr(benches, "answer_at_once", answer)
    request = check(toy_settings("--pool", "toy:pool"), tiny_runtime())
    request = dataclasses.replace(request, adapter=None, reference=None)
    every = [prompt[-1]["content"] for prompt in request.refusable]
    assert len(every) > REFUSABLE + 1
    for refused in ([], every[:REFUSABLE]):
        asked.clear()
        with benches.opened(request) as bench:
            found = [prompt[-1]["content"] for prompt, _ in bench.refusable]
        wanted = [text for text in every if text not in refused]
        assert found[: len(wanted)] == wanted[: REFUSABLE + 1]
        assert len(found) == REFUSABLE + 1
        assert len(asked) == (2 if refused else 1)
