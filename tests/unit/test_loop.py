"""The training loop: what is not finite is never stepped on, and the next batch is made before a step is waited for."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_runtime

from oneshot.distributed.engine import start_training
from oneshot.training.loop import Diverged, Schedule, train


def engine_of(model):
    return start_training(
        tiny_runtime(), model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )


def run(model, losses, steps, batches=None, on_step=lambda result: None):
    """Train on ``losses(step, forward)``; micro-batches are numbered by their step."""

    def made(step):
        return [SimpleNamespace(step=step, tokens=3)]

    train(engine_of(model), Schedule(steps, 0.1), batches or made, lambda forward, b: losses(b.step, forward), on_step)


class Infinite(torch.autograd.Function):
    """An infinite loss whose gradient is finite, as of a token that the model holds for impossible."""

    @staticmethod
    def forward(ctx, x):
        return x * float("inf")

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), "infinite, gradient finite"])
def test_a_step_on_a_loss_that_is_no_number_is_not_taken(broken):
    model = torch.nn.Linear(2, 1)
    kept = []

    def losses(step, forward):
        loss = forward(torch.ones(1, 2)).square().sum()
        if step < 2:
            return loss
        return Infinite.apply(loss) if isinstance(broken, str) else loss * broken

    def on_step(result):
        kept.append(({name: p.detach().clone() for name, p in model.named_parameters()}, result))

    with pytest.raises(Diverged, match=r"The loss became (nan|inf) at step 3 .*stopped before that step"):
        run(model, losses, 5, on_step=on_step)
    assert [result.step for _, result in kept] == [1, 2]
    assert all(torch.equal(p, kept[-1][0][name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_no_number_is_named_so():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def losses(step, forward):
        return forward(torch.ones(1, 1)).abs().sqrt().sum()  # 0, and its gradient 0 / 0

    with pytest.raises(Diverged, match=r"The gradient became infinite or no number at step 1 \(loss 0"):
        run(model, losses, 2)
    assert not model.weight.any()


def test_losses_of_sound_steps_are_untouched():
    model = torch.nn.Linear(2, 1)
    wanted, found = [], []

    def losses(step, forward):
        loss = forward(torch.ones(1, 2)).square().sum()
        wanted.append(float(loss.detach()))
        return loss

    run(model, losses, 4, on_step=lambda result: found.append(result.loss))
    assert found == wanted


def test_the_next_batch_is_made_while_the_step_runs():
    model = torch.nn.Linear(2, 1)
    order = []
    engine = engine_of(model)
    step = engine.step
    engine.step = lambda: (order.append("step"), step())[1]

    def batches(number):
        order.append(number)
        return [SimpleNamespace(tokens=1)]

    schedule = Schedule(4, 0.1, start=1)
    train(engine, schedule, batches, lambda forward, b: forward(torch.ones(1, 2)).sum(), lambda r: None)
    assert order == [1, 2, "step", 3, "step", "step"]


def test_the_device_is_not_asked_within_a_step(monkeypatch):
    """On a GPU each of these waits until it has computed everything before it."""
    model, asked = torch.nn.Linear(2, 1), []
    inside = {"step": False}
    for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu"):
        real = getattr(torch.Tensor, name)

        def spy(self, *args, _real=real, _name=name):
            if inside["step"]:
                asked.append(_name)
            return _real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    engine = engine_of(model)
    step = engine.step

    def stepped():
        inside["step"] = False
        return step()

    engine.step = stepped

    def loss_of(forward, batch):
        inside["step"] = True
        return forward(torch.ones(1, 2)).sum()

    train(engine, Schedule(3, 0.1), lambda n: [SimpleNamespace(tokens=1)] * 3, loss_of, lambda r: None)
    assert asked == []
