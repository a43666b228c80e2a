"""Rows that share prefixes: every sequence is computed as in a row of its own, or has one."""

import random

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_runtime

from oneshot.patch import rows
from oneshot.patch.rows import Sharing, lay, separate, sharing_of

CPU = torch.device("cpu")
BOOLEAN = Sharing(64)


def sequences(seed, count=8, head=6):
    """Groups of two sequences that begin with the same prompt; all begin with the same head."""
    draw = random.Random(seed)

    def tokens(least, most):
        return [draw.randrange(3, 40) for _ in range(draw.randint(least, most))]

    start = tokens(head, head)
    groups = []
    for _ in range(count):
        prompt = start + tokens(2, 7)
        groups.append([prompt + tokens(1, 6), prompt + tokens(1, 6)])
    return groups


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharing", [None, BOOLEAN, Sharing(20), Sharing(1000)])
@pytest.mark.parametrize("apart", [False, True])
def test_places_hold_the_tokens_and_a_token_sees_its_own_past_only(seed, sharing, apart):
    groups = sequences(seed)
    laid = lay(groups, 0, CPU, sharing, apart=apart)
    every = [ids for group in groups for ids in group]
    flat = laid.inputs["input_ids"].flatten()
    assert [flat[places].tolist() for places in laid.places] == every
    assert int(laid.real.sum()) == len({int(place) for places in laid.places for place in places})
    if sharing is None:
        assert laid.inputs.keys() == {"input_ids", "attention_mask"}
        return
    width = laid.inputs["input_ids"].shape[1]
    assert [laid.inputs["position_ids"].flatten()[p].tolist() for p in laid.places] == [[*range(len(p))] for p in every]
    for places in laid.places:
        row, inside = int(places[0]) // width, places % width
        for depth, place in enumerate(inside):
            seen = laid.inputs["attention_mask"][row, 0, place].nonzero().flatten().tolist()
            assert seen == sorted(inside[: depth + 1].tolist())
    own = {int(place) for places in laid.places[:2] for place in places}
    others = {int(place) for places in laid.places[2:] for place in places}
    if apart or sharing.length == 1000:
        assert bool(own & others) != apart


def test_what_is_shared_is_there_once_and_groups_stay_together():
    groups = sequences(1)
    whole = lay(groups, 0, CPU, Sharing(1000))
    distinct = {tuple(ids[: i + 1]) for group in groups for ids in group for i in range(len(ids))}
    assert whole.inputs["input_ids"].shape == (1, len(distinct))
    cut = lay(groups, 0, CPU, Sharing(40))
    count, width = cut.inputs["input_ids"].shape
    assert count > 2
    assert width < 60
    for one, other in zip(cut.places[0::2], cut.places[1::2]):
        assert int(one[0]) == int(other[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_compute_the_same_in_shared_rows_or_keep_them_apart(family, attention):
    model = tiny_model(family).double()
    model.set_attn_implementation(attention)
    groups = sequences(3)
    sharing = sharing_of(tiny_runtime(), model, groups, 0)
    if family in ("mistral", "gemma3"):
        assert sharing is None, "their window of 8 tokens is shorter than the sequences"
        groups = [[ids[:8] for ids in group] for group in groups]
        sharing = sharing_of(tiny_runtime(), model, groups, 0)
    assert sharing is not None
    assert sharing.additive == (torch.float64 if attention == "eager" else None)
    shared, alone = lay(groups, 0, CPU, sharing), separate([ids for group in groups for ids in group], 0, CPU)
    assert len(shared.real) < 0.8 * len(alone.real)
    with torch.no_grad():
        one, other = (model(**r.inputs, use_cache=False).logits.flatten(0, 1) for r in (shared, alone))
    for here, there in zip(shared.places, alone.places):
        torch.testing.assert_close(one[here], other[there], rtol=1e-5, atol=1e-5)  # norms are fp32 inside


def test_gradients_through_shared_rows_are_those_of_separate_ones():
    model, groups = tiny_model("qwen2").double(), sequences(4)
    found = []
    for laid in (lay(groups, 0, CPU, BOOLEAN), separate([ids for group in groups for ids in group], 0, CPU)):
        logits = model(**laid.inputs, use_cache=False).logits.flatten(0, 1)
        loss = sum(logits[places[-3:]].log_softmax(-1).square().mean() for places in laid.places)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # norms are fp32 inside


def test_rows_stay_apart_where_sharing_saves_little_or_the_model_takes_no_such_mask(monkeypatch):
    model, runtime, groups = tiny_model("llama"), tiny_runtime(), sequences(5)
    assert sharing_of(runtime, model, groups, 0) is not None
    assert sharing_of(runtime, model, [[[i, *range(20, 30)]] for i in range(3, 9)], 0) is None
    model.config._attn_implementation = "flash_attention_2"
    assert sharing_of(runtime, model, groups, 0) is None
    monkeypatch.setattr(rows, "EXACT", -1.0)
    assert sharing_of(runtime, tiny_model("llama"), groups, 0) is None


def test_a_model_whose_state_runs_on_keeps_rows_apart():
    import transformers as t

    config = t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    assert sharing_of(tiny_runtime(), t.MambaForCausalLM(config).eval(), sequences(6), 0) is None
    model = tiny_model("llama")
    running = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: running(x) + 0.1 * x.cumsum(dim=1)
    assert sharing_of(tiny_runtime(), model, sequences(6), 0) is None
