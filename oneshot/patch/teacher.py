"""What the aligned model does: asked once, before the repair, where there is one (a reference, or an adapter's base).

A fine-tune moves more than its task. What the user's own prompts get is the fine-tune's business and is held as it is;
harmless prompts and look-alikes of harm are held to what the aligned model says to them, so that neither a refusal too
many nor the fine-tune's side effects count as right. How it refuses is learnt from it, too: a refusal in its own words
is nearer than one that others have written.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.loading.reference import vocabularies
from oneshot.data.conversations import Messages
from oneshot.data.encoding import IGNORE, Encoded, encode, encode_prompt, pad_id
from oneshot.measure.generate import answer_at_once
from oneshot.measure.judge import verdict
from oneshot.patch.guard import with_answers
from oneshot.patch.objective import Aligned, aligned_logits, logits_on, sample
from oneshot.patch.probes import MARGIN_TOKENS
from oneshot.patch.request import Request
from oneshot.training.objective import log_likelihoods

if TYPE_CHECKING:
    import torch

ENOUGH = 4  # requests that the aligned model refuses and that tell something of it
REFUSAL_TOKENS = 40  # of a refusal that is taken over; its first sentence is
_NEVER = -1e4  # a logit of probability 0, and no infinity, times which 0 is no number
_SENTENCE = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True)
class Lesson:
    """A prompt with the aligned model's answer.

    Attributes:
        row: both, encoded, and at which token the answer starts
        logits: the aligned model's on the answer, (answer tokens, vocabulary), on the CPU
        margin: nats by which its usual refusal was ahead of the answer, over the first ``MARGIN_TOKENS`` of both;
            -infinity where it has none
    """

    prompt: Messages
    answer: str
    row: tuple[Encoded, int]
    logits: torch.Tensor
    margin: float = -math.inf


@dataclass(frozen=True)
class Teacher:
    """What the aligned model does.

    Attributes:
        harm: its logits on the rows that the choice of the example is judged by; none where that takes none
        guard, held: its answers to the general prompts of the guard, of the watch
        refusals: what it says to the requests of the pool, where it refuses: request -> its first sentence
        likely: request -> log likelihood that it gives to the first ``MARGIN_TOKENS`` of that
    """

    harm: Aligned | None
    guard: list[Lesson]
    held: list[Lesson]
    refusals: dict[str, str]
    likely: dict[str, float]


def asks_gradients(request: Request) -> bool:
    """Whether there is a choice to make, by a rule that takes gradients and the aligned model's logits."""
    return len(request.candidates) > 1 and request.settings.select in ("bilevel", "alignment")


def wanted(request: Request) -> bool:
    """Whether the aligned model can be asked, and has something to say."""
    known = request.adapter is not None or request.reference is not None
    return known and bool(request.guard.general or request.held.general or asks_gradients(request))


def learn(request: Request, model: Any) -> Teacher:
    """Ask the aligned model, which this is. Collective; every rank gets the same, but for ``harm``."""
    refusals = _refusals(request, model)
    asked = [prompt for prompt in request.refusable if prompt[-1]["content"] in refusals]
    texts = [prompt[-1]["content"] for prompt in asked]
    starts = [encode_prompt(prompt, request.tokenizer, closed=True) for prompt in asked]
    likely = _likelihoods(request, model, starts, [refusals[text] for text in texts])
    request = in_own_words(request, refusals)
    harm = _harm(request, model)
    guard = _lessons(request, model, request.guard.general)
    held = _lessons(request, model, request.held.general, Counter(refusals.values()).most_common(1))
    known = request.adapter is None and request.reference is not None
    rows = vocabularies(request.source.checkpoint, request.reference) if known and request.reference else None
    if rows is not None:
        harm = {place: of_vocabulary(logits, rows[0]) for place, logits in harm.items()} if harm else harm
        guard, held = (
            [dataclasses.replace(lesson, logits=of_vocabulary(lesson.logits, rows[0])) for lesson in lessons]
            for lessons in (guard, held)
        )
    return Teacher(harm, guard, held, refusals, dict(zip(texts, likely)))


def of_vocabulary(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """Return logits (tokens, vocabulary) over ``rows`` words: those beyond the model's own are never said."""
    from torch.nn.functional import pad

    return pad(logits, (0, rows - logits.shape[-1]), value=_NEVER) if rows > logits.shape[-1] else logits[:, :rows]


def in_own_words(request: Request, refusals: dict[str, str]) -> Request:
    """Return the request with the shipped candidates' refusals in the model's own words.

    Those whose request it does not refuse are left out where enough are left: words of others are no nearer to it for
    being the only ones. Whoever gives an example or a pool has chosen the words.
    """
    if request.settings.example is not None or request.settings.pool is not None or not refusals:
        return request
    conversations = [
        dataclasses.replace(
            row, messages=(*row.prompt, {"role": "assistant", "content": refusals[row.prompt[-1]["content"]]})
        )
        if row.prompt[-1]["content"] in refusals
        else row
        for row in request.conversations
    ]
    spoken = [row for row in conversations if row.prompt[-1]["content"] in refusals]
    conversations = spoken if len(spoken) >= ENOUGH else conversations
    train_on = request.settings.data.train_on
    candidates = [
        encode(row, request.tokenizer, request.length, train_on=train_on, closed=True) for row in conversations
    ]
    return dataclasses.replace(request, conversations=conversations, candidates=candidates)


def _refusals(request: Request, model: Any) -> dict[str, str]:
    prompts = request.refusable
    if not prompts:
        return {}
    said = answer_at_once(
        model, request.tokenizer, prompts, request.runtime, max_new_tokens=REFUSAL_TOKENS,
        what="refusals of the aligned model",
    )  # fmt: skip
    own = {prompt[-1]["content"]: _SENTENCE.split(answer.strip())[0] for prompt, answer in zip(prompts, said)}
    return {request: answer for request, answer in own.items() if verdict(answer) == "refused"}


def _harm(request: Request, model: Any) -> Aligned | None:
    if not asks_gradients(request):
        return None
    checkpoint = request.source.checkpoint if request.adapter is not None else request.reference
    assert checkpoint is not None
    loaded_as = f"{request.source.dtype} {request.source.four_bit} {request.settings.model.double_quant}"
    rows, pad = sample(request.candidates, request.settings.seed).rows, pad_id(request.tokenizer)
    known = aligned_logits(request.runtime, rows, checkpoint, loaded_as, pad)
    return aligned_logits(request.runtime, rows, checkpoint, loaded_as, pad, model) if known is None else known


def _lessons(
    request: Request, model: Any, prompts: list[Messages], usual: Sequence[tuple[str, int]] = ()
) -> list[Lesson]:
    """The aligned model's answers to prompts. Ranks answer a share each, and all compute the logits of all.

    Args:
        usual: a refusal whose margin is wanted, too
    """
    if not prompts:
        return []
    tokens, tokenizer = request.recipe.guard_tokens, request.tokenizer
    said = answer_at_once(
        model, tokenizer, prompts, request.runtime, max_new_tokens=tokens,
        what="answers of the aligned model",
    )  # fmt: skip
    rows = with_answers(prompts, said, tokenizer, tokens)
    labelled = [Encoded(row.input_ids, [IGNORE] * start + row.input_ids[start:]) for row, start in rows]
    logits = logits_on(request.runtime, model, labelled, pad_id(tokenizer))
    found = [Lesson(*each) for each in zip(prompts, said, rows, logits)]
    for text, _ in usual:
        starts = [row.input_ids[:start] for row, start in rows]
        refusing = _likelihoods(request, model, starts, [text] * len(starts))
        margins = [likely - _likelihood(*_begun(lesson)) for likely, lesson in zip(refusing, found)]
        found = [dataclasses.replace(lesson, margin=margin) for lesson, margin in zip(found, margins)]
    return found


def _likelihoods(request: Request, model: Any, starts: list[list[int]], texts: list[str]) -> list[float]:
    """Log likelihoods of the first ``MARGIN_TOKENS`` of texts as answers to encoded prompts, on every rank."""
    answers = [request.tokenizer(text, add_special_tokens=False)["input_ids"][:MARGIN_TOKENS] for text in texts]
    rows = [Encoded(start + ids, [IGNORE] * len(start) + ids) for start, ids in zip(starts, answers)]
    logits = logits_on(request.runtime, model, rows, pad_id(request.tokenizer))
    return [_likelihood(theirs, ids) for theirs, ids in zip(logits, answers)]


def _begun(lesson: Lesson) -> tuple[torch.Tensor, list[int]]:
    """The logits and the tokens of an answer's beginning."""
    row, start = lesson.row
    return lesson.logits, row.input_ids[start : start + MARGIN_TOKENS]


def _likelihood(logits: torch.Tensor, ids: list[int]) -> float:
    import torch

    return float(log_likelihoods(logits[: len(ids)], torch.tensor(ids)).sum())
