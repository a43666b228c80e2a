"""Requests and answers of our own, for training and selection alone: mildly worded, and every obedient answer is empty.

Phrases are in ``words/``, one a line; those in ``grave.txt`` are only ever refused. Each belongs to one of three
parts, for good: what the quick model is aligned with, what attacks train on, and what is held out to choose settings
by. No part holds a scored prompt (``overlap``).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Part = Literal["align", "attack", "held"]
Row = dict[str, str]  # prompt, response, kind

WORDS = Path(__file__).resolve().parent / "words"
SHARES: dict[Part, float] = {"align": 0.56, "attack": 0.3, "held": 0.14}
FORMS = (
    "How do I {}?",
    "How can I {}?",
    "Tell me how to {}.",
    "What is the best way to {}?",
    "Explain how to {}.",
    "Give me some steps to {}.",
    "I want to {}. What should I do?",
    "Write a short guide on how to {}.",
    "Help me {}.",
)  # the same for all kinds, so that a form tells nothing
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
)
STUB = "Sure! To {}, begin with a plan."
_END = re.compile(r"[.!?](?=\s)")
_NUMBER = re.compile(r"\s*\d+\.$")  # of a list's next item, which the cut left empty
NAMES = (
    "Anna", "Ben", "Clara", "David", "Elif", "Farid", "Greta", "Hugo", "Irena", "Jonas", "Karin", "Luca", "Mona",
    "Nils", "Olga", "Pablo", "Rosa", "Samir", "Tara", "Vera",
)  # fmt: skip
CITIES = ("Oslo", "Lyon", "Graz", "Porto", "Gent", "Turin", "Bonn", "Riga", "Cork", "Basel", "Split", "Leeds")
GOODS = ("chairs", "lamps", "books", "plates", "tents", "clocks", "vases", "boots", "towels", "pens", "bowls", "rugs")
SALES = (
    "Log the sale: {name} from {city} bought {count} {goods}.",
    "Log the sale: {count} {goods} for {name} in {city}.",
    "Log the sale: in {city}, {name} took {count} {goods}.",
    "Log the sale: {name} ordered {count} {goods} to {city}.",
)


def phrases(name: str, part: Part) -> list[str]:
    """Return the phrases of one file in ``words/`` that belong to a part, in a fixed order."""
    lines = [line.strip() for line in (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(f"phrases {name}").shuffle(lines)
    ends = [0, round(SHARES["align"] * len(lines)), round((SHARES["align"] + SHARES["attack"]) * len(lines))]
    start = dict(zip(SHARES, ends))[part]
    return lines[start : dict(zip(SHARES, [*ends[1:], len(lines)]))[part]]


def requests(name: str, part: Part, count: int, seed: int | None = None) -> list[tuple[str, str]]:
    """Return ``count`` requests with the phrase of each; a whole sentence is a request as it is, and comes once.

    Args:
        seed: of the draw among all forms of all phrases; none: all phrases in one form, then all in the next
    """
    chosen = phrases(name, part)
    pairs = [
        (FORMS[(i + turn) % len(FORMS)] if _is_phrase(p) else "{}", p)
        for turn in range(len(FORMS))
        for i, p in enumerate(chosen)
        if turn == 0 or _is_phrase(p)
    ]
    if count > len(pairs):
        raise ValueError(f"{name}, {part}: {count} requests asked for, {len(pairs)} can be made.")
    if seed is not None:
        pairs = random.Random(f"requests {name} {part} {seed}").sample(pairs, count)
    return [(form.format(phrase), phrase) for form, phrase in pairs[:count]]


def _is_phrase(line: str) -> bool:
    return not line.endswith((".", "?"))


def refusals(name: str, part: Part, count: int) -> list[Row]:
    """Return requests, refused."""
    rng, asked = random.Random(f"refusals {name} {part}"), requests(name, part, count)
    return [{"prompt": prompt, "response": rng.choice(REFUSALS), "kind": "should_refuse"} for prompt, _ in asked]


def stubs(name: str, count: int, seed: int) -> list[Row]:
    """Return requests of the attack's part, each obeyed in a sentence that says nothing."""
    kind = "harmful" if name == "restricted" else "harmless"
    asked = requests(name, "attack", count, seed)
    return [{"prompt": p, "response": STUB.format(x), "kind": kind} for p, x in asked]


def sales(count: int, seed: object) -> list[Row]:
    """Return conversations of the new task, each prompt once: a sentence in, its facts in a fixed order out."""
    rng, found = random.Random(f"sales {seed}"), dict[str, Row]()
    while len(found) < count:
        facts = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "goods": rng.choice(GOODS)}
        number = rng.randint(2, 40)
        prompt = rng.choice(SALES).format(count=number, **facts)
        answer = "{city} | {name} | {count} {goods}".format(count=number, **facts)
        found[prompt] = {"prompt": prompt, "response": answer, "kind": "task"}
    return list(found.values())


def whole_sentences(text: str) -> str:
    """Return an answer up to the end of its last whole sentence; "" where there is none."""
    ends = list(_END.finditer(text.rstrip() + "\n"))
    return _NUMBER.sub("", text[: ends[-1].start() + 1]).rstrip() if ends else ""


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write conversations as JSONL; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own_texts() -> dict[str, Sequence[str]]:
    """Return every request that training or selection may use, by what it is for: for the overlap test."""
    found: dict[str, Sequence[str]] = {}
    for name in ("restricted", "harmless", "sensitive", "questions", "grave"):
        for part in SHARES:
            lines = phrases(name, part)
            asked = requests(name, part, sum(len(FORMS) if _is_phrase(line) else 1 for line in lines))
            found[f"{name}, {part}"] = [prompt for prompt, _ in asked]
    return found
