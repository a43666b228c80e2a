"""Which conversations a step, a rank and a micro-batch get, and the loss over the answers' tokens only."""

import pytest
import torch
from tiny import tiny_model

from oneshot.data.encoding import IGNORE, Encoded, pad_batch
from oneshot.distributed.runtime import Runtime
from oneshot.training.objective import answer_loss, answers, cross_entropy_sum
from oneshot.training.packing import Packing
from oneshot.training.stream import micro_batches, share, step_indices, steps_per_epoch

SIZES = [60, 5, 33, 9, 12, 7, 30, 4, 16, 21, 50, 8, 8, 40, 11, 6]


def talks(sizes=SIZES):
    """Conversations with tokens of their own, so that each can be told from the others."""
    return [
        Encoded([7 + i] * size, [IGNORE] * (size // 2) + [7 + i] * (size - size // 2)) for i, size in enumerate(sizes)
    ]


def batches(rows, world_size, accumulation, packing=None):
    """[rank][accumulation step]"""
    ranks = [Runtime(rank, world_size, torch.device("cpu"), "ddp", accelerator=None) for rank in range(world_size)]
    indices, common = list(range(len(rows))), {"pad_id": 0, "accumulation": accumulation, "packing": packing}
    return [micro_batches(rows, indices, rank, **common) for rank in ranks]


def test_an_epoch_holds_each_conversation_once_in_an_order_of_its_own():
    steps = [step_indices(10, 4, step, seed=1) for step in range(6)]
    assert steps_per_epoch(10, 4) == 3
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for step in epoch for i in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert steps == [step_indices(10, 4, step, seed=1) for step in range(6)]


@pytest.mark.parametrize("packing", [None, Packing(), Packing(flat=True)])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_a_step_gives_out_the_same_tokens_however_it_is_shared(world_size, accumulation, packing):
    rows = talks()
    found = batches(rows, world_size, accumulation, packing)
    assert [len(of_rank) for of_rank in found] == [accumulation] * world_size
    every = [batch for of_rank in found for batch in of_rank]
    assert {batch.total_tokens for batch in every} == {sum(row.answer_tokens() for row in rows)}
    assert sum(batch.tokens for batch in every) == sum(SIZES)
    targets = sorted(int(target) for batch in every for target in batch.targets)
    assert targets == sorted(label for row in rows for label in row.labels if label != IGNORE)


def test_a_rank_without_work_has_a_pass_that_counts_for_nothing():
    model = tiny_model("llama")
    for packing in (None, Packing(), Packing(flat=True)):
        working, idle = (of_rank[0] for of_rank in batches(talks([6]), 2, 1, packing))
        assert (working.tokens, idle.tokens) == (6, 0)
        assert working.inputs.keys() == idle.inputs.keys()
        loss = answer_loss(model, idle)
        assert float(loss.detach()) == 0
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        model.zero_grad()


def test_grouping_by_length_saves_padding_and_keeps_the_loss():
    rows, model = talks(), tiny_model("llama")

    def padding(groups):
        computed = sum(len(group) * max(SIZES[i] for i in group) for group in groups)
        return 1 - sum(SIZES) / computed

    grouped = [shares[0] for shares in share(SIZES, 1, 4, by_tokens=False)]
    as_they_come = [list(range(16))[k::4] for k in range(4)]
    assert padding(grouped) < 0.3 < 0.45 < padding(as_they_come)
    whole = pad_batch(rows, 0)
    labels = whole.pop("labels")
    total = sum(row.answer_tokens() for row in rows)
    with torch.no_grad():
        wanted = cross_entropy_sum(model(**whole, use_cache=False).logits, labels) / total
        found = sum(answer_loss(model, batch) for batch in batches(rows, 1, 4)[0])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_ranks_have_alike_to_do():
    sizes = SIZES * 3
    for shares in share(sizes, 4, 2, by_tokens=True):
        loads = [sum(sizes[i] for i in mine) for mine in shares]
        assert max(loads) <= 1.05 * min(loads), "packed: by tokens"
    for shares in share(SIZES, 4, 2, by_tokens=False):
        assert {len(mine) for mine in shares} == {2}
        longest = [max(SIZES[i] for i in mine) for mine in shares]
        assert max(longest) <= 2 * min(longest), "padded: as wide"


def test_answers_are_the_tokens_after_the_kept_places():
    labels = torch.tensor([[IGNORE, 5, 6, IGNORE], [9, IGNORE, IGNORE, 8]])
    kept, targets = answers(labels)
    assert kept.tolist() == [0, 1, 6]
    assert targets.tolist() == [5, 6, 8], "a first token is predicted by none"
    kept, targets = answers(torch.full((1, 3), IGNORE))
    assert (kept.tolist(), targets.tolist()) == ([0], [IGNORE])


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_the_head_computes_the_answers_only(family):
    model = tiny_model(family)
    (batch,) = batches(talks([9, 30, 5]), 1, 1)[0]
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output.shape[:2]))
    loss = answer_loss(model, batch)
    assert seen == [(1, len(batch.kept))]
    model(**batch.inputs, use_cache=False)
    assert seen[1] == (3, 30), "outside of the loss it computes everything again"
    hook.remove()

    def without_head(**inputs):
        return model(**inputs)

    torch.testing.assert_close(answer_loss(without_head, batch), loss, rtol=1e-6, atol=0)
