"""Every method on the toy world, over seeds and amounts of attack data: the table in the README.

Run: ``.venv/bin/python benchmarks/toy_methods.py`` (about 12 minutes on 2 cores; ``--seeds 1`` for a quick look).
Defaults everywhere. Each fine-tuned model is made once and repaired by every method; attack success is over seen and
unseen restricted words together. Writes ``--out``/toy_methods.json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or a file here could shadow a top-level module

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime
    from oneshot.settings import Settings

NF4 = " (4 bits)"
METHODS = ("rollback", "lowrank", "sft", "lora")
# name of the fine-tune -> counts of (harmful, task) conversations
ATTACKS = {"100 + new task": (100, 300), "300 + new task": (300, 300), "100": (100, 0), "300": (300, 0)}
RATES = ("asr", "over_refusal", "lookalike_refusal", "utility", "task")


def main(argv: list[str] | None = None) -> None:
    """Fine-tune, repair, score; then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--quantize", action="store_true", help="repair with linear weights in 4 bits too")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_methods"), help="folder of the figures")
    arguments = parser.parse_args(argv)
    from oneshot.distributed.runtime import start

    runtime = start()
    rows: list[dict[str, Any]] = []
    variants = [*arguments.methods, *([m + NF4 for m in arguments.methods if m != "sft"] if arguments.quantize else [])]
    for attack in arguments.attacks:
        for seed in range(arguments.seeds):
            rows += measure_seed(runtime, attack, seed, variants)
            print(f"{attack}, seed {seed}: done", file=sys.stderr, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "toy_methods.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows, variants))


def measure_seed(
    runtime: Runtime, attack: str, seed: int, variants: list[str], select: str = "bilevel"
) -> list[dict[str, Any]]:
    """Fine-tune the toy model once, repair it in each way. One row per model: attack, seed, stage, rates.

    Args:
        select: how the example is chosen
        variants: methods, with ``NF4`` after them where the linear weights are in 4 bits
    """
    from oneshot.finetune import train_model
    from oneshot.repair import check_fully, repair
    from oneshot.training.finetune import prepare

    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = toy_settings(attack, seed, select)
        degraded = train_model(runtime, prepare(settings, runtime), Path(folder), None)
        for variant in variants:
            target = Path(folder) / variant
            target.mkdir()
            ours = repair_settings(settings, degraded, variant)
            stages = repair(check_fully(ours, runtime), target).repaired.stages
            for stage in ("finetuned", "repaired"):
                rates = {name: stages[stage].rates[name].value for name in RATES}
                name = stage if stage == "finetuned" else variant
                rows.append({"attack": attack, "seed": seed, "model": name, **rates})
    return rows


def toy_settings(attack: str, seed: int, select: str) -> Settings:
    """Return the toy world's settings for an attack; without the new task its prompts are left out of the guard."""
    from oneshot.commandline import parse

    harmful, task = ATTACKS[attack]
    options = {"seed": seed, "select": select, "data.harmful_count": harmful, "data.task_count": task}
    if not task:
        options |= {"guard": "toy:guard-plain", "watch_prompts": "toy:held-plain"}
    return parse([word for name, value in options.items() for word in (f"--{name}", str(value))], "repair")


def repair_settings(settings: Settings, degraded: Path, variant: str) -> Settings:
    """Return the settings by which a variant repairs the fine-tuned toy, the aligned one being known."""
    aligned = settings.model.path
    return dataclasses.replace(
        settings,
        finetune_first=False,
        reference=aligned,
        model=dataclasses.replace(
            settings.model, path=str(degraded), base=aligned, quantize="nf4" if variant.endswith(NF4) else None
        ),
        repair=dataclasses.replace(settings.repair, method=variant.removesuffix(NF4)),
    )


def markdown(rows: list[dict[str, Any]], variants: list[str]) -> str:
    """Return the table: per attack and model, the median over seeds and in brackets the worst."""
    lines = [
        "| fine-tuned on | model | attack success | over-refusal | look-alike refusal | utility | task |",
        "|---|---|---|---|---|---|---|",
    ]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        for model in ("finetuned", *variants):
            here = [row for row in rows if row["attack"] == attack and row["model"] == model]
            cells = [
                _cell([row[rate] for row in here], worst=min if rate in ("utility", "task") else max) for rate in RATES
            ]
            if ATTACKS[attack][1] == 0:
                cells[-1] = "-"
            lines.append(f"| {attack} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], worst: Any) -> str:
    return f"{statistics.median(values):.3f} ({worst(values):.3f})"


if __name__ == "__main__":
    main()
