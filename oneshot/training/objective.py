"""Losses. Each returns this rank's share of the step's loss, so that shares add up to the exact global mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's worth of conversations.

    Attributes:
        inputs: input_ids and attention_mask, int64 (batch, tokens), right-padded
        labels: int64 (batch, tokens), -100 off the assistant's tokens
        total_tokens: assistant tokens of the whole optimizer step, over all ranks and micro-batches
        tokens: tokens of this micro-batch, prompts included, padding not; for the speed that is shown
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    total_tokens: int
    tokens: int


def answer_loss(forward: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the cross entropy of the assistant's tokens in this micro-batch, over the tokens of the whole step.

    Dividing the sum by the global token count, and not by each micro-batch's own, weighs every token the same,
    however unequally tokens fall on ranks and accumulation steps.
    """
    logits = forward(**batch.inputs, use_cache=False).logits
    return cross_entropy_sum(logits, batch.labels) / batch.total_tokens


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy (nats, fp32) of next tokens: logits (b, t, v) at t predict labels at t + 1."""
    from torch.nn.functional import cross_entropy

    predicted = logits[:, :-1].flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    kept = wanted != IGNORE
    return cross_entropy(predicted[kept].float(), wanted[kept], reduction="sum")


def kl_sum(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the summed KL(reference || model) in nats, fp32; both are logits of shape (tokens, vocabulary)."""
    from torch.nn.functional import kl_div, log_softmax

    ours, theirs = log_softmax(logits.float(), dim=-1), log_softmax(reference.float(), dim=-1)
    return kl_div(ours, theirs, reduction="sum", log_target=True)
