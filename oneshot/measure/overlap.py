"""Prompts that were trained on measure memory: which probes also are, or nearly are, in the training data.

Or among the prompts that the watch chooses an epoch by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from oneshot.data.conversations import read_conversations
from oneshot.measure.rates import Probe
from oneshot.settings import Settings
from oneshot.world.sources import is_toy

NEAR = 0.8
"""Share of three-word sequences, of all that either text has, from which two texts are nearly the same."""
_WORDS = 3
_NAMED = 5
_TOKEN = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """Probes that are in one source of training data.

    Attributes:
        source: what people call it, such as the repair example
        same: ids of the probes that are there word by word (case and punctuation aside)
        near: ids of further probes of which something very similar is there
    """

    source: str
    same: list[str]
    near: list[str]


def find_overlaps(probes: Sequence[Probe], sources: Mapping[str, Iterable[str]]) -> list[Overlap]:
    """Return the overlaps of the last user message of each probe with each source's texts; sources without any: none.

    Args:
        sources: requests of the training data, by what people call it; each is read through once
    """
    words = {probe.id: _words(_request(probe)) for probe in probes}
    same: dict[tuple[str, ...], list[str]] = {}
    having: dict[tuple[str, ...], list[str]] = {}
    for name, tokens in words.items():
        same.setdefault(tokens, []).append(name)
        for part in _parts(tokens):
            having.setdefault(part, []).append(name)
    sizes = {name: len(_parts(tokens)) for name, tokens in words.items()}
    found = []
    for source, texts in sources.items():
        exact: set[str] = set()
        near: set[str] = set()
        for text in texts:
            tokens = _words(text)
            if tokens:
                exact.update(same.get(tokens, ()))
            parts = _parts(tokens)
            shared = Counter(name for part in parts for name in having.get(part, ()))
            near.update(n for n, both in shared.items() if both >= NEAR * (len(parts) + sizes[n] - both))
        if exact or near:
            order = [probe.id for probe in probes]
            near -= exact
            found.append(Overlap(source, [n for n in order if n in exact], [n for n in order if n in near]))
    return found


def training_requests(settings: Settings) -> dict[str, Iterator[str]]:
    """Return the requests of all training data, and of the watch, that the settings name, by what people call it; the
    toy's are none.

    Reading is put off until they are looped over, and raises UserError for a file that cannot be read.
    """
    data = settings.data
    named: dict[str, tuple[str | None, int | None]] = {
        "the repair example": (settings.example, None),
        "the guard": (settings.guard, None),
        "the watch's prompts": (settings.watch_prompts, None),
        "the harmful training data": (data.harmful, data.harmful_count),
        "the task's training data": (data.task, data.task_count),
        **{f"the training data {name}": (part.source, part.count) for name, part in (data.parts or {}).items()},
    }
    return {
        name: (row.prompt[-1]["content"] for row in read_conversations(source, data, need_answer=False, limit=count))
        for name, (source, count) in named.items()
        if source is not None and not is_toy(source)
    }


def overlap_warnings(overlaps: Sequence[Overlap], total: int) -> list[str]:
    """Return one sentence for each source."""
    sentences = []
    for one in overlaps:
        ids = one.same + one.near
        named = ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
        near = f" and {len(one.near)} more nearly so" if one.near else ""
        sentences.append(
            f"Of {total} probes {len(one.same)} are in {one.source}{near} ({named}): "
            "what was trained on or chosen by measures memory."
        )
    return sentences


def _request(probe: Probe) -> str:
    return next((m["content"] for m in reversed(probe.messages) if m["role"] == "user"), "")


def _words(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text.casefold()))


def _parts(tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {tokens[i : i + _WORDS] for i in range(len(tokens) - _WORDS + 1)}
