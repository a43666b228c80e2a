"""Losses. Each returns this rank's share of the step's loss, so that shares add up to the exact global mean."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE

if TYPE_CHECKING:
    import torch


ELEMENTS = 1 << 22  # of logits whose probabilities are computed at a time: 16 MiB of fp32


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's worth of conversations.

    Attributes:
        kept: int64 (answer tokens), places of the logits that predict them, in the rows laid end to end
        targets: int64 (answer tokens), what they are to predict
        inputs: what the model takes: int64 (rows, tokens) input_ids and attention_mask, or position_ids of packed rows
        total_tokens: assistant tokens of the whole optimizer step, over all ranks and micro-batches
        tokens: tokens of this micro-batch, prompts included, padding not; for the speed that is shown
    """

    kept: torch.Tensor
    targets: torch.Tensor
    inputs: dict[str, Any]
    total_tokens: int
    tokens: int


def answers(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``kept`` and ``targets`` of labels (rows, tokens); on the CPU, as a GPU would have to be waited for.

    Without any answer there is one place whose target is ``IGNORE``, so that the loss is 0 and every weight takes part.
    """
    wanted = labels.roll(-1, dims=1)
    wanted[:, -1] = IGNORE
    kept = (wanted.flatten() != IGNORE).nonzero().flatten()
    if not len(kept):
        kept = kept.new_zeros(1)
    return kept, wanted.flatten()[kept]


def answer_loss(forward: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the cross entropy of the assistant's tokens in this micro-batch, over the tokens of the whole step.

    Dividing the sum by the global token count, and not by each micro-batch's own, weighs every token the same,
    however unequally tokens fall on ranks and accumulation steps.
    """
    logits = logits_at(forward, batch.inputs, batch.kept)
    loss: torch.Tensor = _cross_entropy_in_place().apply(logits.float(), batch.targets)
    return loss / batch.total_tokens


def logits_at(forward: Any, inputs: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    """Return the logits at some places only, of shape (*kept.shape, vocabulary).

    The output head is often a quarter of a small model's work, and logits over the vocabulary the largest tensor: those
    of prompts and padding would be computed for nothing. So the head is given the hidden states of these places alone,
    as (rows, places, width); it runs as the module that it is, with the hooks of ZeRO-3, and what a model does to its
    logits afterwards (soft caps) is done to these.

    Args:
        forward: the model, or its wrapper
        inputs: what it takes
        kept: int64, (places,) or (rows, places each), in the rows of input_ids laid end to end
    """
    model = getattr(forward, "module", forward)  # out of DDP's or DeepSpeed's wrapper
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    selected = False

    def select(_module: Any, taken: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal selected
        if not taken:  # called by keyword: all logits are computed, and those that are needed taken below
            return taken
        selected = True
        found = taken[0].flatten(0, -2).index_select(0, kept.flatten())
        return found.view(*(kept.shape if kept.dim() == 2 else (1, -1)), found.shape[-1]), *taken[1:]

    hook = head.register_forward_pre_hook(select) if head is not None else None
    try:
        logits: torch.Tensor = forward(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if not selected:  # the output head is no module of its own, or not called as one
        logits = logits.flatten(0, -2).index_select(0, kept.flatten())
    return logits.view(*kept.shape, logits.shape[-1])


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy (nats, fp32) of next tokens: logits (b, t, v) at t predict labels at t + 1."""
    from torch.nn.functional import cross_entropy

    predicted = logits[:, :-1].flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    kept = wanted != IGNORE
    return cross_entropy(predicted[kept].float(), wanted[kept], reduction="sum")


def kl_sum(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the summed KL(reference || model) in nats, fp32; both are logits of shape (tokens, vocabulary).

    Computed some tokens at a time, its gradient too: fp32 copies of all would be the largest tensors of a step.
    """
    total: torch.Tensor = _kl().apply(logits, reference)
    return total


def refusal_and_guard(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (summed cross entropy of the first rows, ``kl_sum`` of the others), in the logits' own memory.

    Logits over a large vocabulary are the largest tensor of a repair's step, and torch would hold them six times: two
    slices, and the gradients of each. Here they become their own gradient, so that one backward pass is all there is,
    and whatever computed them must not need their values again (see ``_cross_entropy_in_place``).

    Args:
        logits: (tokens, vocabulary)
        targets: int64, what the first rows predict
        reference: of the other rows, in order; there may be fewer than rows, then the rest does not count
        temperature: divides the first rows' logits
    """
    found: tuple[torch.Tensor, torch.Tensor] = _repair().apply(logits, targets, reference, temperature)
    return found


def log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log likelihood of each target: logits (tokens, vocabulary), int64 (tokens) -> fp32 (tokens).

    Without a gradient; some tokens at a time, as ``kl_sum``.
    """
    import torch

    found = logits.new_empty(len(targets), dtype=torch.float32)
    for rows in _some(logits):
        part = logits[rows].float()
        found[rows] = part.gather(1, targets[rows, None])[:, 0] - part.logsumexp(-1)
    return found


def _some(logits: torch.Tensor) -> list[slice]:
    """Slices of rows that hold ``ELEMENTS`` at most."""
    step = max(1, ELEMENTS // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


@functools.cache
def _cross_entropy_in_place() -> Any:
    """The summed cross entropy as an autograd function, in the logits' own memory: (tokens, vocabulary) in fp32.

    torch's own holds them three times: as log probabilities, as those's gradient and as that of the logits. The same
    bits. Whatever computed the logits must not need their values again, which autograd checks: a linear layer and
    scaling, the last steps of language models, do not.
    """
    import torch
    from torch.nn.functional import nll_loss

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            for rows in _some(logits):
                logits[rows] = logits[rows].log_softmax(-1)
            ctx.save_for_backward(logits, targets)
            return nll_loss(logits, targets, ignore_index=IGNORE, reduction="sum")

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> Any:
            logs, targets = ctx.saved_tensors
            places, scale = targets.clamp(min=0)[:, None], -upstream * (targets != IGNORE)[:, None]
            for rows in _some(logs):
                of_loss = torch.zeros_like(logs[rows]).scatter_(1, places[rows], scale[rows])
                logs[rows] = torch.ops.aten._log_softmax_backward_data(of_loss, logs[rows], -1, logs.dtype)
            return logs, None

    return CrossEntropy


def _divergence(logits: torch.Tensor, reference: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """The summed KL(reference || model); its gradient is written where that is asked for, which may be the logits."""
    import torch

    kind = torch.promote_types(logits.dtype, torch.float32)
    total = logits.new_zeros((), dtype=kind)
    for rows in _some(logits):
        ours, theirs = (side[rows].to(kind).log_softmax(-1) for side in (logits, reference))
        share = theirs.exp()
        total += (share * (theirs - ours)).sum()
        if gradient is not None:
            gradient[rows] = ours.exp_().sub_(share)
    return total


@functools.cache
def _repair() -> Any:
    """``refusal_and_guard`` as an autograd function."""
    import torch
    from torch.nn.functional import nll_loss

    class Repair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor, t: float) -> Any:
            first, others = logits[: len(targets)], logits[len(targets) : len(targets) + len(reference)]
            kind = torch.promote_types(logits.dtype, torch.float32)
            logs = (first / t).to(kind).log_softmax(-1)
            loss = nll_loss(logs, targets, reduction="sum")
            wanted = ctx.needs_input_grad[0]
            total = _divergence(others, reference, others if wanted else None)
            ctx.temperature, ctx.held = t, len(reference)
            ctx.save_for_backward(logits, logs if wanted else None, targets)
            return loss, total

        @staticmethod
        def backward(ctx: Any, of_loss: torch.Tensor, of_total: torch.Tensor) -> Any:
            gradient, logs, targets = ctx.saved_tensors
            first = logs.exp()
            first.scatter_add_(1, targets[:, None], first.new_full((len(targets), 1), -1.0))
            gradient[: len(targets)] = first.mul_(of_loss / ctx.temperature)
            gradient[len(targets) : len(targets) + ctx.held].mul_(of_total.to(gradient.dtype))
            gradient[len(targets) + ctx.held :] = 0
            return gradient, None, None, None

    return Repair


@functools.cache
def _kl() -> Any:
    """``kl_sum`` as an autograd function: it keeps the gradient, d KL / d logits = softmax - reference's softmax."""
    import torch

    class KL(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
            total = _divergence(logits, reference, gradient)
            ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> Any:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream.to(gradient.dtype), None

    return KL
