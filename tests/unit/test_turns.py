"""Of a guard with many prompts an epoch sees some: in turn all, long and short ones, as many on every rank."""

import dataclasses

import pytest
import torch
from tiny import recipe_of, targets_of, tiny_batch, tiny_model, tiny_runtime, tiny_update

from oneshot.distributed.runtime import Runtime
from oneshot.patch import guard
from oneshot.patch.directions import adapter_directions
from oneshot.patch.guard import _in_turns, repair_loss, with_example
from oneshot.patch.method import finished
from oneshot.patch.methods import rollback
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer

ROWS, AT_ONCE = 11, 4


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").requires_grad_(False)


@pytest.fixture
def batch(model, monkeypatch):
    """Held to other logits than the model's own, or the guard's KL would be 0."""
    monkeypatch.setattr(guard, "AT_ONCE", AT_ONCE)
    made = tiny_batch(model, ROWS)
    torch.manual_seed(0)
    return dataclasses.replace(made, reference=made.reference + torch.randn_like(made.reference))


def test_every_prompt_has_its_turn(batch):
    turns = [batch.turn(epoch) for epoch in (1, 2, 3)]
    assert [len(turn.guard) for turn in turns] == [4, 4, 3]
    assert {row.input_ids for turn in turns for row in seen(turn)} == {row.input_ids for row in seen(batch)}
    assert batch.turn(4) is turns[0]
    assert all(turn.example == batch.example for turn in turns)
    lengths = sorted(len(row.input_ids) for row in seen(batch))
    assert len(set(lengths)) > 3
    each = [sorted(len(row.input_ids) for row in seen(turn)) for turn in turns]
    assert each == [lengths[turn::3] for turn in range(3)], "long and short ones in all"


def seen(batch):
    return [dataclasses.replace(row, input_ids=tuple(row.input_ids)) for row, _ in batch.guard]


def test_the_turns_losses_are_those_of_the_whole(model, batch):
    """Each is the mean over its own held tokens; in passes, too."""
    whole = repair_loss(model, batch, 1.0, 1)[2] * batch.held_total
    turns = [batch.turn(epoch) for epoch in (1, 2, 3)]
    assert sum(turn.held_total for turn in turns) == batch.held_total
    assert [turn.held_total for turn in turns] == [len(turn.reference) for turn in turns]
    parts = [repair_loss(model, turn, 1.0, 1)[2] * turn.held_total for turn in turns]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)
    in_passes = [dataclasses.replace(turn, count=2).parts for turn in turns]
    again = [repair_loss(model, part, 1.0, 1)[2] * part.held_total for parts in in_passes for part in parts]
    assert float(sum(again)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_a_turn_holds_the_same_however_many_ranks_there_are(batch, world_size):
    alone, places = _in_turns(batch.guard, tiny_runtime())
    shares = [
        _in_turns(batch.guard, Runtime(rank, world_size, torch.device("cpu"), "ddp", accelerator=None))
        for rank in range(world_size)
    ]
    begin = 0
    for turn, (rows, held) in enumerate(alone):
        found = []
        for turns, own in shares:
            start = sum(size for size, _ in turns[:turn])
            found += own[start : start + turns[turn][0]]
            assert turns[turn][1] == held
            assert abs(turns[turn][0] - rows / world_size) < 1
        assert sorted(found) == sorted(places[begin : begin + rows])
        begin += rows
    assert sorted(places) == list(range(ROWS))


def test_few_prompts_are_seen_in_every_epoch(model):
    batch = tiny_batch(model, ROWS)
    assert all(batch.turn(epoch) is batch for epoch in (1, 2, 9))
    none = tiny_batch(model, 0)
    assert none.turn(3) is none


def test_another_example_has_the_same_turns(batch):
    other = with_example(batch, dataclasses.replace(batch.example, input_ids=batch.example.input_ids[:-1]))
    assert [seen(other.turn(e)) for e in (1, 2)] == [seen(batch.turn(e)) for e in (1, 2)]
    assert torch.equal(other.turn(2).reference, batch.turn(2).reference)


def test_no_logits_are_held_twice(batch):
    turns = [batch.turn(epoch) for epoch in (1, 2, 3)]
    passes = [part for turn in turns for part in dataclasses.replace(turn, count=2).parts]
    whole = batch.reference.untyped_storage().data_ptr()
    assert {part.reference.untyped_storage().data_ptr() for part in (*turns, *passes)} == {whole}


def test_rollback_goes_from_turn_to_turn(model, batch, monkeypatch):
    taken = []
    plain = rollback._backward
    monkeypatch.setattr(rollback, "_backward", lambda r, m, part, *rest: taken.append(part) or plain(r, m, part, *rest))
    directions = adapter_directions(tiny_update(targets_of(model)), "cpu")
    recipe = recipe_of("rollback", epochs=4, noise=0.0)
    finished(rollback.learn(tiny_runtime(), model, directions, batch, Attempt(Tracer(), 1.0), recipe))
    assert [part is batch.turn(epoch) for epoch, part in enumerate(taken, 1)] == [True] * 4
    assert len({id(part) for part in taken}) == 3
