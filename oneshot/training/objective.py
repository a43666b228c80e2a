"""Losses. Each returns this rank's share of the step's loss, so that shares add up to the exact global mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE

if TYPE_CHECKING:
    import torch


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
    from torch.nn.functional import cross_entropy

    with _head_on(forward, batch.kept):
        logits = forward(**batch.inputs, use_cache=False).logits
    if logits.shape[:2] != (1, len(batch.kept)):  # the output head is no module of its own, or not called as one
        logits = logits.flatten(0, 1).index_select(0, batch.kept)
    loss = cross_entropy(logits.flatten(0, -2).float(), batch.targets, ignore_index=IGNORE, reduction="sum")
    return loss / batch.total_tokens


@contextlib.contextmanager
def _head_on(forward: Any, kept: torch.Tensor) -> Iterator[None]:
    """Within the block the output head sees only the hidden states that predict an answer's token: (1, kept, width).

    The head is often a quarter of a small model's work, and logits over the vocabulary its largest tensor; those of
    prompts and padding are computed for nothing.
    """
    model = getattr(forward, "module", forward)  # out of DDP's or DeepSpeed's wrapper
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def select(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not inputs:  # called by keyword: all logits are computed, and the loss takes those it needs
            return inputs
        return inputs[0].flatten(0, 1).index_select(0, kept)[None], *inputs[1:]

    hook = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


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
