"""Arithmetic on factors gives what the materialized gradients of autograd give, in fp64."""

import pytest
import torch
from tiny import targets_of, tiny_model

from oneshot.data.encoding import Encoded, pad_batch
from oneshot.patch.attach import Gradients, streamed
from oneshot.patch.factored import inner, inner_rows, singular_values, squared_norms, summary
from oneshot.training.objective import cross_entropy_sum

FAMILIES = ("llama", "qwen2", "gemma3", "gpt_neox")  # plain; with biases; tied embeddings; fused attention weights
RTOL = 1e-6


def rows(seed, lengths):
    """Random conversations whose last 3 tokens are the answer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(7, 100, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [-100] * (length - 3) + ids[-3:]))
    return found


def loss_of(model, batch):
    tensors = pad_batch(batch, 0)
    labels = tensors.pop("labels")
    return cross_entropy_sum(model(**tensors, use_cache=False).logits, labels)


def materialized(model, linears, batch):
    """dL/dW as autograd makes it."""
    weights = {name: module.weight for name, module in linears.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    found = torch.autograd.grad(loss_of(model, batch), list(weights.values()))
    model.requires_grad_(False)
    return dict(zip(weights, found))


def captured(model, linears, batch):
    """The pairs of every layer, padding left out."""
    gradients = Gradients(linears)
    with gradients.capturing(model):
        loss_of(model, batch).backward()
    gradients.keep = pad_batch(batch, 0)["attention_mask"].bool()
    return {name: gradients.pair(name) for name in linears}


def setup(family):
    model = tiny_model(family).double().requires_grad_(False)
    linears = targets_of(model)
    batches = rows(1, [9, 6]), rows(2, [7])  # of unequal length: padded
    return model, linears, batches


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_products_and_norms(family):
    model, linears, batches = setup(family)
    pairs = [captured(model, linears, batch) for batch in batches]
    whole = [materialized(model, linears, batch) for batch in batches]
    assert len(linears) >= 8
    for name in linears:
        one, two = (part[name] for part in whole)
        assert pairs[0][name][0].dtype == torch.float64
        torch.testing.assert_close(inner(pairs[0][name], pairs[1][name]), (one * two).sum(), rtol=RTOL, atol=0)
        torch.testing.assert_close(inner(pairs[0][name], pairs[0][name]).sqrt(), one.norm(), rtol=RTOL, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_singular_values(family):
    model, linears, batches = setup(family)
    pairs, whole = captured(model, linears, batches[0]), materialized(model, linears, batches[0])
    for name in linears:
        found, wanted = singular_values(pairs[name]), torch.linalg.svdvals(whole[name])
        assert len(found) == min(15, *whole[name].shape)
        floor = 1e-12 * float(wanted[0])  # below it both hold rounding errors
        torch.testing.assert_close(found, wanted[: len(found)], rtol=RTOL, atol=floor)
        assert float(wanted[len(found) :].sum()) <= 100 * floor, "the rest are zero"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_padded_batch_has_its_own_gradient(family):
    """Rows of one pass, streamed layer by layer, against each row's own backward pass."""
    model, linears, (batch, other) = setup(family)
    batch = batch + rows(3, [4])
    target = captured(model, linears, other)
    alone = [materialized(model, linears, [row]) for row in batch]
    whole = materialized(model, linears, other)
    seen = []

    def use(name, x, delta, places):
        assert places is None, "every token goes through a linear layer"
        seen.append(name)
        products, norms = inner_rows(x, delta, target[name]), squared_norms(x, delta)
        wanted = torch.stack([(one[name] * whole[name]).sum() for one in alone])
        torch.testing.assert_close(products, wanted, rtol=RTOL, atol=0)
        torch.testing.assert_close(norms, torch.stack([one[name].square().sum() for one in alone]), rtol=RTOL, atol=0)

    with streamed(model, linears, use):
        loss_of(model, batch).backward()
    assert sorted(seen) == sorted(linears)


@pytest.mark.parametrize("rank", [2, 5])
def test_a_summary_is_nearly_the_best_of_its_rank(rank):
    model, linears, (batch, other) = setup("llama")
    pairs, target = captured(model, linears, other), captured(model, linears, batch)
    for name in linears:
        whole = target[name][1].T @ target[name][0]
        x, delta = summary(target[name], rank)
        assert (x.shape, delta.shape) == ((rank, whole.shape[1]), (rank, whole.shape[0]))
        left = float((whole - delta.T @ x).norm())
        assert left <= 1.6 * float(torch.linalg.svdvals(whole)[rank:].norm())
        gap = abs(float(inner(pairs[name], target[name]) - inner(pairs[name], (x, delta))))
        assert gap <= left * float(inner(pairs[name], pairs[name]).sqrt()) * (1 + RTOL)


def test_a_summary_loses_nothing_where_the_rank_suffices():
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (9, 12))
    whole = delta.T @ x
    for rank in (9, 20):  # more rows than a matrix of 12 x 9 has directions
        found = summary((x, delta), rank)
        torch.testing.assert_close(found[1].T @ found[0], whole, rtol=1e-9, atol=1e-9)
        assert len(found[0]) == 9
    assert summary((x, delta), 40)[0] is x
    empty = summary((torch.zeros(40, 9), torch.zeros(40, 12)), 3)
    assert float((empty[1].T @ empty[0]).abs().max()) == 0.0


def test_streaming_leaves_no_hook_and_no_factor_behind():
    model, linears, (batch, _) = setup("llama")
    with streamed(model, linears, lambda *_: None):
        pass
    assert not any(module._forward_hooks for module in model.modules())
    assert not loss_of(model, batch).requires_grad
