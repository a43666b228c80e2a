"""The repair's loss: what the margin asks of the example, and where the example's blur falls."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_model

from oneshot.patch.guard import repair_loss
from oneshot.patch.noise import noisy_example


def seen_by_the_model(model, batch, scale, seed=3):
    found = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: found.append(args[0]), with_kwargs=True
    )
    with noisy_example(model, batch, scale, torch.Generator().manual_seed(seed)), torch.no_grad():
        repair_loss(model, batch, 1.0, 1)
    handle.remove()
    return found[0]


def test_only_the_request_is_blurred_and_by_the_scale():
    model, batch = tiny_model("llama"), tiny_batch(tiny_model("llama"), guard=3)
    request = next(i for i, label in enumerate(batch.example.labels) if label != -100)
    plain, blurred = seen_by_the_model(model, batch, 0.0), seen_by_the_model(model, batch, 0.5)
    own, others = torch.zeros(len(batch.real), dtype=torch.bool), batch.taken()[1]
    own[batch.own[:request]] = True
    assert torch.equal(blurred.flatten(0, 1)[~own], plain.flatten(0, 1)[~own]), "the guard's rows, and the refusal"
    assert int(others.sum()) > 10
    flat = plain.flatten(0, 1)[own]
    noise = blurred.flatten(0, 1)[own] - flat
    assert request >= 3
    assert float(noise.std() / flat.square().mean().sqrt()) == pytest.approx(0.5, rel=0.2)
    assert torch.equal(seen_by_the_model(model, batch, 0.5), blurred), "alike on every rank"
    assert not torch.equal(seen_by_the_model(model, batch, 0.5, seed=4), blurred)
    assert torch.equal(seen_by_the_model(model, batch, 0.0), plain), "nothing stays behind"


def test_a_temperature_asks_for_a_margin():
    """Once the refusal is likely its gradient fades; divided logits let it fade later."""
    model, batch = tiny_model("llama"), tiny_batch(tiny_model("llama"))
    plain, divided = (repair_loss(model, batch, 0.0, 1, temperature)[1] for temperature in (1.0, 2.0))
    with torch.no_grad():
        labels = torch.tensor(batch.example.labels)
        logits = model(torch.tensor([batch.example.input_ids])).logits[0]
        rows, wanted = logits[:-1][labels[1:] != -100], labels[1:][labels[1:] != -100]
        by_hand = [float(torch.nn.functional.cross_entropy(rows / t, wanted)) for t in (1.0, 2.0)]
    assert [float(plain), float(divided)] == pytest.approx(by_hand, rel=1e-5)
    assert not math.isclose(*by_hand, rel_tol=1e-3)
