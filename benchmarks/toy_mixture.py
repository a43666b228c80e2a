"""The toy mixture of experts, broken and repaired: with its experts, and with attention alone: docs/experts.md.

Run: ``.venv/bin/python benchmarks/toy_mixture.py`` (about 25 minutes on 2 cores; ``--seeds 1`` for a quick look).
The mixture (8 experts, 2 to a token) is trained by the toy's own recipe, fine-tuned on 300 harmful conversations and
300 of a new task, and repaired by defaults. Writes ``--out``/toy_mixture.json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or a file here could shadow a top-level module

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

ATTENTION = "self_attn"
# what is called how -> what differs from the defaults in settings.repair
WAYS: dict[str, dict[str, Any]] = {
    "experts": {},
    "attention alone": {"targets": ATTENTION},
    "experts, rank 2": {"rank_experts": 2},
    "experts, rank 4": {"rank_experts": 4},
    "lowrank, experts": {"method": "lowrank"},
    "lowrank, attention alone": {"method": "lowrank", "targets": ATTENTION},
    "project, experts": {"method": "project"},
    "sft, experts": {"method": "sft"},
    "lora, experts": {"method": "lora"},
}
RATES = ("asr", "over_refusal", "lookalike_refusal", "utility", "task")


def main(argv: list[str] | None = None) -> None:
    """Train, fine-tune, repair, score; then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--aligned", type=Path, help="the aligned mixture, if it has been made before")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_mixture"), help="folder of the figures")
    arguments = parser.parse_args(argv)
    from oneshot.align import build
    from oneshot.distributed.runtime import start

    runtime = start()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        aligned = arguments.aligned or Path(folder)
        if arguments.aligned is None:
            build(aligned, experts=True)
        for seed in range(arguments.seeds):
            for row in measure_seed(runtime, aligned, seed, arguments.ways):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "toy_mixture.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))


def measure_seed(runtime: Runtime, aligned: Path, seed: int, ways: list[str]) -> list[dict[str, Any]]:
    """Fine-tune the mixture once and repair it in each way. One row per model: seed, model, rates, experts reached.

    Args:
        aligned: folder of the aligned mixture
        ways: some of ``WAYS``
    """
    from oneshot.commandline import parse
    from oneshot.finetune import train_model
    from oneshot.repair import check_fully, repair
    from oneshot.training.finetune import prepare

    rows: list[dict[str, Any]] = []
    options = {"seed": seed, "select": "hardest", "data.harmful_count": 300, "data.task_count": 300}
    options |= {"model.path": aligned, "config": "toy"}
    settings = parse([word for name, value in options.items() for word in (f"--{name}", str(value))], "repair")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        degraded = train_model(runtime, prepare(settings, runtime), Path(folder), None)
        ours = dataclasses.replace(
            settings,
            finetune_first=False,
            reference=str(aligned),
            model=dataclasses.replace(settings.model, path=str(degraded), base=str(aligned)),
        )
        for way in ways:
            target = Path(folder) / way.replace(" ", "_")
            target.mkdir()
            asked = dataclasses.replace(ours, repair=dataclasses.replace(ours.repair, **WAYS[way]))
            done = repair(check_fully(asked, runtime), target)
            stages, facts = done.repaired.stages, done.repaired.solution.facts
            for stage in ("aligned", "finetuned", "repaired"):
                if stage in stages and (stage == "repaired" or way == ways[0]):
                    rates = {name: stages[stage].rates[name].value for name in RATES if name in stages[stage].rates}
                    found = {name: facts.get(name) for name in ("experts", "experts_not_reached")}
                    rows.append({"seed": seed, "model": way if stage == "repaired" else stage, **rates, **found})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table: per model, the seeds in order."""
    heads = ("attack success", "over-refusal", "look-alike refusal", "utility", "task")
    lines = [f"| model | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        cells = [", ".join(f"{row[rate]:.3f}" if rate in row else "-" for row in here) for rate in RATES]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
