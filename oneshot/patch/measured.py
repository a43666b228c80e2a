"""What ``oneshot spectrum`` measures: the example, the groups that its gradient is compared with, and the sweep."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, TypeVar

from oneshot.data.conversations import Conversation
from oneshot.data.encoding import IGNORE, Encoded, encode, encode_prompt, pad_id
from oneshot.distributed.phases import phase
from oneshot.measure.generate import answer_at_once
from oneshot.patch import spectrum
from oneshot.patch.bench import Bench, opened
from oneshot.patch.examples import read_candidates
from oneshot.patch.guard import build_batch
from oneshot.patch.linears import shape_of
from oneshot.patch.methods import project
from oneshot.patch.request import Request
from oneshot.patch.select import draw, hardest
from oneshot.training.mixture import attack_mixture, parts_of
from oneshot.world.sources import check_words

SWEPT = (1, 2, 4, 8, 20)
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What is measured on, read and checked.

    Attributes:
        pool: the safety examples, the measured one is among them or beside them
        others: harmful and task conversations, by group
        notes: what a reader should know
    """

    request: Request
    pool: list[Conversation]
    others: dict[str, list[Conversation]]
    notes: list[str]


@dataclass(frozen=True)
class Found:
    """What was measured, of which example; the sweep's rows, where one was asked for."""

    spectrum: spectrum.Spectrum
    sweep: list[dict[str, float]]
    example: Conversation


def prepared(request: Request) -> Asked:
    """Read the conversations that the example is compared with.

    Raises:
        UserError: a file that cannot be read
    """
    settings = request.settings
    pool = read_candidates(dataclasses.replace(settings, example=None, select="hardest"))
    mixed = []
    if any(part.count != 0 for part in parts_of(settings.data).values()):
        check_words(settings, request.tokenizer, training=True)
        mixed = attack_mixture(settings)
    others = {
        kind: _some([row for row in mixed if row.kind == kind], settings.spectrum.samples, settings.seed)
        for kind in ("harmful", "task")
    }
    notes = []
    if not others["harmful"]:
        notes.append("No harmful conversations were compared: give those of your fine-tune with --data.harmful.")
    return Asked(request, pool, others, notes)


def measure(asked: Asked) -> Found:
    """Load the model and measure it. Collective."""
    request = asked.request
    settings, runtime, pad = request.settings, request.runtime, pad_id(request.tokenizer)
    with opened(request) as bench, bench.unpatched() as model:
        drawn = draw(len(request.candidates), settings.select, settings.seed)
        if drawn is None:
            with phase("choose"):
                losses = hardest(runtime, model, request.candidates, pad)
            index = losses.index(max(losses))
        else:
            index = drawn.index
        taken, example = request.conversations[index], request.candidates[index]
        groups = _groups(asked, model, taken)
        targets = bench.linears.targets
        with phase("decompose"):
            found = spectrum.measure(runtime, model, targets, example, groups, pad, settings.spectrum)
        swept = _sweep(bench, example, groups.get(spectrum.OTHERS, [])) if settings.spectrum.sweep else []
    return Found(found, swept, taken)


def _some(rows: list[T], count: int, seed: int) -> list[T]:
    """At most ``count`` of the rows, drawn with the seed."""
    return random.Random(f"spectrum-{seed}").sample(rows, min(count, len(rows)))


def _groups(asked: Asked, model: Any, taken: Conversation) -> dict[str, list[Encoded]]:
    """The conversations whose gradients are compared with the example's, by group; empty groups are left out."""
    request, settings = asked.request, asked.request.settings
    tokenizer, count = request.tokenizer, settings.spectrum.samples
    rows = {spectrum.OTHERS: _some([row for row in asked.pool if row.prompt != taken.prompt], count, settings.seed)}
    groups = {
        name: [encode(row, tokenizer, request.length, train_on=settings.data.train_on, closed=True) for row in found]
        for name, found in {**rows, **asked.others}.items()
    }
    guard = request.guard.all[:count]
    if guard:
        answers = answer_at_once(
            model, tokenizer, guard, request.runtime, max_new_tokens=settings.repair.guard_tokens,
            batch_size=settings.score.batch_size, what="answers to the guard's prompts",
        )  # fmt: skip
        groups["guard"] = [_answered(p, a, tokenizer) for p, a in zip(guard, answers) if a.strip()]
    return {name: found for name, found in groups.items() if found}


def _answered(prompt: list[dict[str, str]], answer: str, tokenizer: Any) -> Encoded:
    start = encode_prompt(prompt, tokenizer, closed=True)
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return Encoded(start + ids, [IGNORE] * len(start) + ids)


@phase("sweep")
def _sweep(bench: Bench, example: Encoded, others: list[Encoded]) -> list[dict[str, float]]:
    request, options, linears = bench.request, bench.request.settings.spectrum, bench.linears.targets
    most = min(len(example.input_ids), max(min(shape_of(module)) for module in linears.values()))
    ranks = options.ranks or [rank for rank in SWEPT if rank < most] + [most]
    tokens = request.settings.repair.guard_tokens
    guard = request.guard.all
    batch = build_batch(request.runtime, bench.model, request.tokenizer, example, guard, answer_tokens=tokens)
    through = project.Sweep(ranks, options.alphas, others)
    return project.sweep(request.runtime, bench.model, linears, batch, through, pad_id(request.tokenizer))
