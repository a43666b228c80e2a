"""A fleet against single runs: what ``oneshot repair`` takes for many adapters of one base.

    python benchmarks/fleet.py

Fine-tunes the toy world by LoRA with as many seeds as there are adapters, then repairs them twice with the same
settings: by one command for each, and by one for all (``--model.paths``), everything else alike. Both sides' processes
start cold, one after the other. ``fleet_over_single`` is the fleet's CPU time over the sum of the others', so that what
else runs on the machine does not count, and ``in_wall_time`` the same by the clock; ``alike`` is the share of adapters
whose outcome is the same in both. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ONESHOT = Path(sys.executable).with_name("oneshot")
GIVEN = (
    "--pool", "toy:pool", "--guard", "toy:guard", "--watch_prompts", "toy:held", "--score.probes", "toy:probes",
)  # fmt: skip


@dataclass(frozen=True)
class Took:
    """Seconds of a command: of its processors, and by the clock."""

    cpu: float
    wall: float


def main() -> None:
    """Make the adapters, repair them both ways, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--learning_rate", help="of the fine-tunes; none: the toy world's own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        adapters = [_adapter(home, seed, args.learning_rate) for seed in range(args.adapters)]
        single = [
            _run("repair", "--model.path", str(place), *GIVEN, "--out", str(home / "single" / place.name))
            for place in adapters
        ]
        fleet = _run("repair", "--model.paths", str(home / "adapters/*"), *GIVEN, "--out", str(home / "fleet"))
        pairs = [(_outcome(home / "single" / place.name), _outcome(home / "fleet" / place.name)) for place in adapters]
    for place, (alone, together) in zip(adapters, pairs):
        print(f"{place.name}: alone {alone}, in the fleet {together}")
    figures = {
        "fleet_over_single": fleet.cpu / sum(took.cpu for took in single),
        "in_wall_time": fleet.wall / sum(took.wall for took in single),
        "alike": sum(alone == together for alone, together in pairs) / len(pairs),
        "single_cpu_seconds": sum(took.cpu for took in single),
        "fleet_cpu_seconds": fleet.cpu,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def _adapter(home: Path, seed: int, learning_rate: str | None) -> Path:
    """Fine-tune the toy world by LoRA; return the adapter's folder, under a name of its own."""
    run = home / "runs" / str(seed)
    step = ["--finetune.learning_rate", learning_rate] if learning_rate else []
    _run("finetune", "--finetune.method", "lora", *step, "--seed", str(seed), "--out", str(run))
    place = home / "adapters" / f"a{seed}"
    place.parent.mkdir(exist_ok=True)
    (run / "finetuned").rename(place)
    return place


def _run(*command: str) -> Took:
    """Run the command line in a process of its own; return what it took."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([ONESHOT, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(end - start for end, start in zip(after[:2], before[:2]))  # of the user's code and of the system's
    return Took(cpu, time.monotonic() - clock)


def _outcome(run: Path) -> str:
    """What the report of a run says of it."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return str(report["outcome"]["word"])


if __name__ == "__main__":
    main()
