"""Rates of toy models that were fine-tuned and repaired by the defaults, but for the choice of the example."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEEDS = range(5)
WAYS = ["auto", "auto (4 bits)"]


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
        for seed in SEEDS
        for row in toy_methods.measure_seed(
            runtime, attack, seed, WAYS, select="hardest"
        )  # bilevel takes eight repairs
    ]


def of(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The rows of fine-tuned models, or of one way to repair them."""
    found = [row for row in rows if row["model"] == model]
    assert len(found) == 2 * len(SEEDS) * (len(WAYS) if model == "finetuned" else 1)
    return found
