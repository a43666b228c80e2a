"""Greedy answers of a model that may be sharded, the prompts shared out over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from oneshot.data.protocols import CausalLM, Tokenizer
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, gather_objects
from oneshot.distributed.steps import steps
from oneshot.distributed.watchdog import alive
from oneshot.errors import UserError, first_line

if TYPE_CHECKING:
    import torch


def share_of(lengths: list[int], rank: int, world_size: int) -> tuple[list[int], int]:
    """Split prompts over ranks: sorted by length, dealt round-robin, padded so that all shares are equally long.

    Args:
        lengths: tokens of each prompt, the same list on every rank

    Returns:
        indices into ``lengths`` (ceil(n / world_size) of them on every rank) and how many of them are this rank's
        own; the rest repeat a prompt, only so that every rank makes the same number of calls
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    own = order[rank::world_size]
    size = -(-len(order) // world_size)
    filler = own[-1:] or order[:1]
    return own + filler * (size - len(own)), len(own)


@phase("generate")
def generate_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: list[list[dict[str, str]]],
    runtime: Runtime,
    *,
    max_new_tokens: int,
    batch_size: int,
    what: str = "answers",
) -> list[str]:
    """Answer every prompt greedily; a collective under ZeRO-3, so call it on all ranks with the same prompts.

    The model's own sampling settings and penalties are left aside, so that before and after are compared alike.
    Each module's training flag is as before afterwards.

    Args:
        model: a transformers causal LM, or the ``.module`` of a ZeRO-3 engine
        prompts: chat messages of each prompt
        max_new_tokens: longest answer
        batch_size: prompts per call, on each rank
        what: the answers are called while one waits for them

    Returns:
        answers without special tokens but those that mark thoughts, in the order of the prompts, on every rank; where
        the prompt opens a thought, each begins with the mark that opens it
    """
    from oneshot.data.encoding import encode_prompt
    from oneshot.data.templates import opens_thought

    if not prompts:
        return []
    encoded = [encode_prompt(messages, tokenizer) for messages in prompts]
    said = continue_tokens(
        model, tokenizer, encoded, runtime, max_new_tokens=max_new_tokens, batch_size=batch_size, what=what
    )
    mark = opens_thought(tokenizer)
    return [f"{mark}\n{answer}" for answer in said] if mark else said


@phase("generate")
def answer_at_once(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: list[list[dict[str, str]]],
    runtime: Runtime,
    *,
    max_new_tokens: int,
    what: str,
    batch_size: int = 32,
) -> list[str]:
    """Answer as ``generate_answers`` does, behind an empty, closed thought where the model would think first."""
    from oneshot.data.encoding import encode_prompt

    encoded = [encode_prompt(messages, tokenizer, closed=True) for messages in prompts]
    return continue_tokens(
        model, tokenizer, encoded, runtime, max_new_tokens=max_new_tokens, batch_size=batch_size, what=what
    )


def continue_tokens(
    model: CausalLM,
    tokenizer: Tokenizer,
    encoded: list[list[int]],
    runtime: Runtime,
    *,
    max_new_tokens: int,
    batch_size: int,
    what: str = "answers",
) -> list[str]:
    """Continue every prompt greedily, given as token ids; otherwise as ``generate_answers``. Collective."""
    if not encoded:
        return []
    indices, own = share_of([len(ids) for ids in encoded], runtime.rank, runtime.world_size)
    decoder = _Decoder(model, tokenizer, max_new_tokens, synced=runtime.sharding == "zero3")
    answers: list[str] = []
    with evaluating(model), steps(what, len(encoded), "prompts") as going:
        for start in range(0, len(indices), batch_size):
            alive()
            batch = [encoded[index] for index in indices[start : start + batch_size]]
            answers += decoder.answers(batch, runtime.device)
            going.add(len(batch) * runtime.world_size)
    mine = list(zip(indices[:own], answers[:own]))
    by_index = dict(pair for share in gather_objects(runtime, mine) for pair in share)
    return [by_index[index] for index in range(len(encoded))]


@contextlib.contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Put the model in evaluation mode for the block, then give every module its own training flag back.

    4-bit layers that would repack their weights in evaluation mode on a CPU stay as they are: repacking breaks
    partitioning and saving, and such a layer computes the same in both modes.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            if not getattr(module, "support_avx512bf16_for_cpu", False):
                module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class _Decoder:
    """Batches of token ids in, answers out."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, max_new_tokens: int, synced: bool) -> None:
        from transformers import GenerationConfig

        from oneshot.data.encoding import pad_id

        self.model, self.tokenizer, self.synced = model, tokenizer, synced
        self.ends = _end_tokens(model, tokenizer)
        self.pad = pad_id(tokenizer)
        # Every value is spelt out, because generate() fills what is missing from the model's own generation config.
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            typical_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            use_cache=True,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
        )

    def answers(self, batch: list[list[int]], device: torch.device) -> list[str]:
        import torch

        width = max(len(ids) for ids in batch)
        # left-padded (batch, width) int64, so that every prompt ends where its answer begins
        input_ids = torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in batch], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=device)
        try:
            with torch.no_grad(), _quiet_generation():
                output = self.model.generate(
                    input_ids=input_ids, attention_mask=mask, generation_config=self.config, synced_gpus=self.synced
                )
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # of values that no config should have
            if isinstance(error, UserError):
                raise
            where = getattr(getattr(self.model, "config", None), "_name_or_path", "") or "that was given"
            raise UserError(
                f"The model {where} does not generate ({first_line(error)}): check its config.json and "
                "generation_config.json."
            ) from error
        return [self._text(row) for row in output[:, width:].tolist()]

    def _text(self, ids: list[int]) -> str:
        # What follows the end is padding, and a padding token need not be a special one.
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return decoded(self.tokenizer, ids[:end])


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return token ids as text without special tokens, but for those that tell thoughts from answers."""
    from oneshot.data.thoughts import KEPT_TOKENS

    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {token: str(added[token]) for token in set(ids) & set(added) if added[token].special}
    kept = {token: mark for token, mark in marks.items() if mark in KEPT_TOKENS}
    parts, start = list[str](), 0
    for place in [*(place for place, token in enumerate(ids) if token in kept), len(ids)]:
        if place > start:
            parts.append(str(tokenizer.decode(ids[start:place], skip_special_tokens=True)))
        parts += [kept[ids[place]]] if place < len(ids) else []
        start = place + 1
    return "".join(parts)


def _end_tokens(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model (chat models often have several)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [own]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *listed] if token is not None))


@contextlib.contextmanager
def _quiet_generation() -> Iterator[None]:
    """Silence transformers' remarks on settings of the model's generation config that we overrule on purpose."""
    import logging

    loggers = [logging.getLogger(f"transformers.generation.{name}") for name in ("utils", "configuration_utils")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
