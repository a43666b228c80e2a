"""The one safety example and the guard's prompts: where they come from, and which example is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.conversations import Conversation, read_conversations, read_single_example
from oneshot.data.encoding import IGNORE, Encoded, pad_batch
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.measure.generate import share_of
from oneshot.measure.probes import ASSETS
from oneshot.settings import Settings
from oneshot.training.objective import cross_entropy_sum
from oneshot.world import language

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Chosen:
    """The example taken: its place among the candidates, why, and the score that decided (nats per token)."""

    index: int
    selected_by: str
    score: float


def read_candidates(settings: Settings, *, toy: bool) -> list[Conversation]:
    """Return the user's one example, or the pool to choose it from.

    Raises:
        UserError: a file that cannot be read, or an example file with more than one example
    """
    if settings.example is not None:
        return [read_single_example(settings.example, settings.data)]
    if settings.pool is not None:
        return read_conversations(settings.pool, settings.data)
    return language.pool() if toy else read_conversations(str(ASSETS / "pool.jsonl"), settings.data)


def read_guard(settings: Settings, limit: int, *, toy: bool) -> list[list[dict[str, str]]]:
    """Return the guard's prompts as chat messages, at most ``limit`` of them.

    The toy's are half harmless requests and half requests of the new task, if the fine-tune taught it.
    """
    if settings.guard is None and toy:
        rows = language.guard_prompts(limit, settings.seed, task=settings.data.task_count > 0)
    else:
        path = settings.guard or str(ASSETS / "guard.jsonl")
        rows = read_conversations(path, settings.data, need_answer=False, limit=limit)
    return [list(row.prompt) for row in rows]


def choose(runtime: Runtime, model: Any, candidates: list[Encoded], pad_id: int, *, batch_size: int = 16) -> Chosen:
    """Take the candidate whose refusal the model finds least likely: an easy one is learnt before it has moved much.

    Each rank scores its share; every rank makes the same number of forward passes. Collective.
    """
    if len(candidates) == 1:
        return Chosen(0, "user", float("nan"))
    import torch

    losses = torch.zeros(len(candidates), device=runtime.device)
    indices, own = share_of([len(c.input_ids) for c in candidates], runtime.rank, runtime.world_size)
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        for place, loss in zip(range(start, start + len(part)), _losses(runtime, model, candidates, part, pad_id)):
            if place < own:
                losses[indices[place]] = loss
    losses = all_reduce_sum(runtime, losses)
    best = int(losses.argmax())
    return Chosen(best, "least likely refusal", float(losses[best]))


def _losses(
    runtime: Runtime, model: Any, candidates: list[Encoded], part: list[int], pad_id: int
) -> list[torch.Tensor]:
    """Cross entropy per refusal token of each candidate in ``part``, one forward pass for all."""
    import torch

    tensors = {k: v.to(runtime.device) for k, v in pad_batch([candidates[i] for i in part], pad_id).items()}
    labels = tensors.pop("labels")
    with torch.no_grad():
        logits = model(**tensors, use_cache=False).logits
    tokens = (labels != IGNORE).sum(dim=1)
    return [cross_entropy_sum(logits[i : i + 1], labels[i : i + 1]) / tokens[i] for i in range(len(part))]
