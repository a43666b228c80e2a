"""Rates of toy models that were fine-tuned and repaired by the defaults, but for the choice of the example."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A seed's repair in 4 bits takes as long as the one in 32: of those, two seeds.
SEEDS = {"auto": range(5), "auto (4 bits)": range(2)}
WAYS = list(SEEDS)


def measured(*, task: bool) -> list[dict[str, Any]]:
    """Rates of every fine-tuned model and of its repairs with method auto's choice, by seed and attack.

    Args:
        task: the attacks that teach a new task too, or those of harmful conversations only
    """
    from oneshot.distributed.runtime import start

    path = ROOT / "benchmarks" / "toy_methods.py"
    spec = importlib.util.spec_from_file_location("toy_methods", path)
    assert spec is not None
    assert spec.loader is not None
    toy_methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy_methods)
    runtime = start()
    attacks = [attack for attack in toy_methods.ATTACKS if ("task" in attack) == task]
    assert len(attacks) == 2
    return [
        row
        for attack in attacks
        for seed in SEEDS["auto"]
        for row in toy_methods.measure_seed(
            runtime, attack, seed, [way for way in WAYS if seed in SEEDS[way]], select="hardest"
        )  # bilevel takes eight repairs
    ]


def of(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The rows of fine-tuned models, or of one way to repair them."""
    found = [row for row in rows if row["model"] == model]
    assert len(found) == 2 * (sum(map(len, SEEDS.values())) if model == "finetuned" else len(SEEDS[model]))
    return found
