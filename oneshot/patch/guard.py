"""The guard: prompts on which the repaired model must still answer as the unpatched one did.

Unlabelled and self-distilled: the unpatched model writes the answers itself, and the guard is the Kullback-Leibler
divergence from its distributions over those answers' tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE, Encoded, encode_prompt, pad_batch, pad_id
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.measure.generate import generate_answers, share_of
from oneshot.training.objective import cross_entropy_sum, kl_sum

if TYPE_CHECKING:
    import torch


@dataclass
class RepairBatch:
    """What one repair step sees on this rank, in one forward pass: row 0 is the example, then this rank's guard rows.

    Attributes:
        inputs: input_ids and attention_mask, int64 (1 + guard rows, tokens)
        labels: int64, the example's refusal tokens; -100 in the guard's rows
        example_tokens: refusal tokens of the example
        held: bool (1 + guard rows, tokens), positions whose next-token distribution the guard holds
        reference: the unpatched model's logits there, (held positions of this rank, vocabulary)
        held_total: held positions over all ranks
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    example_tokens: int
    held: torch.Tensor
    reference: torch.Tensor | None
    held_total: int

    @property
    def tokens(self) -> int:
        """Tokens of this rank's rows, padding left out."""
        return int(self.inputs["attention_mask"].sum())

    def example(self) -> Encoded:
        """Return the example of row 0, without its padding."""
        row = self.inputs["attention_mask"][0].bool()
        return Encoded(self.inputs["input_ids"][0][row].tolist(), self.labels[0][row].tolist())


def build_batch(
    runtime: Runtime,
    model: Any,
    tokenizer: Any,
    example: Encoded,
    guard: list[list[dict[str, str]]],
    *,
    answer_tokens: int,
    generation_batch: int = 32,
) -> RepairBatch:
    """Encode the example and this rank's share of the guard prompts with the answers that ``model`` gives now.

    Collective; call it before anything is patched.

    Args:
        guard: chat messages per prompt, the same on all ranks; may be empty
        answer_tokens: how much of the model's answer is held
    """
    rows = [example]
    held_from = [len(example.input_ids)]  # nothing is held in the example's row
    total = 0
    if guard:
        answers = generate_answers(
            model, tokenizer, guard, runtime, max_new_tokens=answer_tokens, batch_size=generation_batch
        )
        encoded = [with_answer(p, a, tokenizer, answer_tokens) for p, a in zip(guard, answers)]
        total = sum(len(row.input_ids) - start for row, start in encoded)
        indices, own = share_of([len(row.input_ids) for row, _ in encoded], runtime.rank, runtime.world_size)
        rows += [encoded[i][0] for i in indices[:own]]
        held_from += [encoded[i][1] for i in indices[:own]]
    tensors = {k: v.to(runtime.device) for k, v in pad_batch(rows, pad_id(tokenizer)).items()}
    labels = tensors.pop("labels")
    held = tensors["attention_mask"].bool().clone()
    for row, start in enumerate(held_from):
        held[row, : max(start - 1, 0)] = False  # position t predicts token t + 1
        held[row, len(rows[row].input_ids) - 1 :] = False
    held[0] = False
    batch = RepairBatch(tensors, labels, example.answer_tokens(), held, None, total)
    if guard:
        import torch

        with torch.no_grad():
            batch.reference = model(**batch.inputs, use_cache=False).logits[held].clone()
    return batch


def with_example(batch: RepairBatch, example: Encoded, pad: int) -> RepairBatch:
    """Return the batch with another example in row 0, and the same guard rows: their answers and logits stay."""
    import torch

    first = {k: v.to(batch.labels.device) for k, v in pad_batch([example], pad).items()}
    rest = int(batch.inputs["attention_mask"][1:].sum(dim=1).max()) if len(batch.labels) > 1 else 0
    width = max(len(example.input_ids), rest)

    def joined(row: torch.Tensor, others: torch.Tensor, fill: int) -> torch.Tensor:
        grow = torch.nn.functional.pad
        parts = [grow(part, (0, width - part.shape[1]), value=fill) for part in (row, others[:, :width])]
        return torch.cat(parts)

    held = batch.held[1:].to(torch.int64)
    return RepairBatch(
        inputs={
            "input_ids": joined(first["input_ids"], batch.inputs["input_ids"][1:], pad),
            "attention_mask": joined(first["attention_mask"], batch.inputs["attention_mask"][1:], 0),
        },
        labels=joined(first["labels"], batch.labels[1:], IGNORE),
        example_tokens=example.answer_tokens(),
        held=joined(torch.zeros_like(first["input_ids"]), held, 0).bool(),
        reference=batch.reference,
        held_total=batch.held_total,
    )


def repair_loss(
    model: Any, batch: RepairBatch, weight: float, world_size: int, temperature: float = 1.0
) -> tuple[Any, Any, Any]:
    """Return (this rank's share of the loss, example's cross entropy per token, this rank's share of the guard's KL).

    The loss is CE(example) + weight * KL(guard), in nats per token; shares of the first and third add up over ranks.
    Every rank sees the whole example, so each takes 1 / world_size of its term.

    Args:
        temperature: divides the example's logits; above 1 the refusal has to win by a larger margin before its
            gradient fades
    """
    logits = model(**batch.inputs, use_cache=False).logits
    example = cross_entropy_sum(logits[:1] / temperature, batch.labels[:1]) / batch.example_tokens
    share = example / world_size
    held = logits.new_zeros((), dtype=example.dtype)
    if batch.reference is not None and batch.held_total:
        held = kl_sum(logits[batch.held], batch.reference) / batch.held_total
        share = share + weight * held
    return share, example.detach(), held.detach()


def alike(runtime: Runtime, example: torch.Tensor, held: torch.Tensor) -> tuple[float, float]:
    """Return (example loss, guard KL) of ``repair_loss`` over all ranks, the same numbers on each. Collective.

    Ranks pad the example to different lengths: to the last digit their losses differ, and so would their decisions.
    """
    import torch

    both = all_reduce_sum(runtime, torch.stack([example.float() / runtime.world_size, held.float()]))
    return float(both[0]), float(both[1])


@contextlib.contextmanager
def noisy_example(model: Any, batch: RepairBatch, scale: float, generator: torch.Generator) -> Iterator[None]:
    """Within the block the embeddings of the example's request are blurred: refuse what is near it, too.

    One request alone says nothing of its neighbours. After NEFTune (arXiv 2310.05914), here with Gaussian noise, on the
    request only, and alike on every rank. The guard's rows see none.

    Args:
        scale: standard deviation, in units of the request's own root mean square; 0 for none
        generator: on the CPU; of the same state on every rank
    """
    if not scale:
        yield
        return
    import torch

    request = int((batch.labels[0] != IGNORE).nonzero()[0])

    def blur(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        here = output[0, :request]
        noise = torch.randn(here.shape, generator=generator).to(here.device, here.dtype)
        blurred = output.clone()
        blurred[0, :request] = here + scale * here.detach().square().mean().sqrt() * noise
        return blurred

    handle = model.get_input_embeddings().register_forward_hook(blur)
    try:
        yield
    finally:
        handle.remove()


def with_answer(prompt: list[dict[str, str]], answer: str, tokenizer: Any, answer_tokens: int) -> tuple[Encoded, int]:
    """Encode prompt and answer; also say where the answer starts. Its end counts where it was reached."""
    start = encode_prompt(prompt, tokenizer)
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(ids) < answer_tokens and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Encoded(start + ids, [IGNORE] * (len(start) + len(ids))), len(start)
