"""The shipped prompts: complete, well formed, apart from each other, and refused in the pool."""

from __future__ import annotations

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

import oneshot

ASSETS = Path(oneshot.__file__).parent / "assets"
FILES = ("pool", "probes", "guard")
CATEGORIES = {
    "economic_harm",
    "fraud_scams",
    "hate_harassment",
    "illegal_goods",
    "malware_hacking",
    "misinformation",
    "physical_harm",
    "privacy",
    "self_harm",
    "sexual_content",
    "weapons",
}
REFUSAL = re.compile(
    r"^(?:(?:I'm sorry, but|Sorry,(?: but)?|No,) )?I(?: can't|'m not| won't| will not| cannot| must decline)\b"
)


def read(name: str) -> list[dict[str, Any]]:
    lines = (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompts(name: str) -> list[str]:
    return [row["messages"][0]["content"].casefold() for row in read(name)]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text))


def alike(first: str, second: str) -> bool:
    """Say whether two prompts are the same but for a word or two."""
    a, b = words(first), words(second)
    return len(a & b) / len(a | b) >= 0.6 or SequenceMatcher(None, first, second).ratio() >= 0.8


def test_counts() -> None:
    assert {name: len(read(name)) for name in FILES} == {"pool": 44, "probes": 150, "guard": 64}


@pytest.mark.parametrize("name", FILES)
def test_ids_are_unique(name: str) -> None:
    ids = [row["id"] for row in read(name)]
    assert len(set(ids)) == len(ids)


def test_pool_has_four_examples_of_each_category() -> None:
    assert Counter(row["category"] for row in read("pool")) == dict.fromkeys(CATEGORIES, 4)


def test_probes_have_fifty_of_each_kind_and_cover_the_categories() -> None:
    rows = read("probes")
    assert Counter(row["kind"] for row in rows) == {"should_refuse": 50, "harmless": 50, "lookalike": 50}
    for kind in ("should_refuse", "lookalike"):
        counts = Counter(row["category"] for row in rows if row["kind"] == kind)
        assert set(counts) == CATEGORIES
        assert min(counts.values()) >= 4
    assert not CATEGORIES & {row["category"] for row in rows if row["kind"] == "harmless"}


def test_guard_is_harmless() -> None:
    rows = read("guard")
    assert {row["kind"] for row in rows} == {"harmless", "lookalike"}
    assert not CATEGORIES & {row["category"] for row in rows}


@pytest.mark.parametrize(
    ("name", "keys", "roles"),
    [
        ("pool", {"id", "category", "messages"}, ["user", "assistant"]),
        ("probes", {"id", "kind", "category", "messages"}, ["user"]),
        ("guard", {"id", "kind", "category", "messages"}, ["user"]),
    ],
)
def test_rows_are_well_formed(name: str, keys: set[str], roles: list[str]) -> None:
    for row in read(name):
        assert set(row) == keys
        assert [message["role"] for message in row["messages"]] == roles
        for message in row["messages"]:
            text = message["content"]
            assert text == text.strip()
            assert 10 < len(text) < 200
            assert "\n" not in text


def test_pool_answers_begin_with_a_refusal() -> None:
    answers = [row["messages"][1]["content"] for row in read("pool")]
    assert [answer for answer in answers if not REFUSAL.match(answer)] == []
    assert len(set(answers)) == len(answers)


def test_no_prompt_occurs_twice() -> None:
    everything = [prompt for name in FILES for prompt in prompts(name)]
    assert [prompt for prompt, count in Counter(everything).items() if count > 1] == []


@pytest.mark.parametrize(("left", "right"), [("pool", "probes"), ("guard", "probes"), ("pool", "guard")])
def test_files_hold_no_near_duplicates_of_each_other(left: str, right: str) -> None:
    pairs = [(a, b) for a in prompts(left) for b in prompts(right) if alike(a, b)]
    assert pairs == []


def test_alike_finds_near_duplicates() -> None:
    assert alike("how can i bypass system security checks?", "how could i bypass security checks?")
    assert not alike("how do i make a bath bomb?", "how do i tune a guitar?")


def test_files_are_small() -> None:
    assert sum((ASSETS / f"{name}.jsonl").stat().st_size for name in FILES) < 64 * 1024
