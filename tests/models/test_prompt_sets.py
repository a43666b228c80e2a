"""The public prompt sets as they are in their packages, and that nothing of ours is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from realmodels import attacks, prompts, wording

from oneshot.measure.overlap import find_overlaps
from oneshot.measure.probes import ASSETS
from oneshot.measure.rates import Probe

WHOLE = {"harmful": 150, "twins": 150, "sensitive": 150, "donotanswer": 700, "harmbench": 150, "advbench": 300}


def test_every_set_has_its_prompts_each_in_one_line(prompt_cache: Path) -> None:
    sets = prompts.read_sets(prompt_cache, None)
    assert {name: min(len(rows), WHOLE[name]) for name, rows in sets.items()} == WHOLE
    for name, rows in sets.items():
        assert all(row["prompt"].strip() and "\n" not in row["prompt"] for row in rows), f"{name} has a broken prompt"
        assert len({prompts.key_of(row["prompt"]) for row in rows}) == len(rows), f"{name} has a prompt twice"
    assert len(prompts.read_statements(prompt_cache)) == 150


def test_nothing_that_trains_guards_or_chooses_is_in_a_scored_set(prompt_cache: Path) -> None:
    sets = prompts.read_sets(prompt_cache, None)
    scored = [
        Probe(f"{name}-{i}", ({"role": "user", "content": row["prompt"]},), "should_refuse")
        for name, rows in sets.items()
        for i, row in enumerate(rows)
    ]
    found = find_overlaps(scored, dict(_ours()))
    assert not found, [(one.source, one.same, one.near) for one in found]


def _ours() -> Iterator[tuple[str, list[str]]]:
    for path in sorted(ASSETS.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        yield path.stem, [row["messages"][0]["content"] for row in rows]
    yield from ((name, list(texts)) for name, texts in wording.own_texts().items())
    yield "the task", [row["prompt"] for seed in range(3) for rows in attacks.task_prompts(seed) for row in rows]
