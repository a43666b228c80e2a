"""All that one GPU can tell in ten minutes, in one call and without a network:

    python benchmarks/gpu.py --out RESULTS [--minutes 10] [--wheels DIR]          (or: make gpu)

A random 8B model (the shape of Llama 3 8B) in bf16 and in 4 bits: a step of the repair beside one of AdamW and of QLoRA
on the same card, peak memory beside what ``oneshot plan`` says, a LoRA fine-tune beside TRL's and, if it is installed,
Unsloth's, gigabytes per second of loading, and tests/gpu. A 70B model is measured with one and with three of its
layers and reckoned up from there: those figures are marked as estimates. What matters most comes first; each part is a
process of its own with its own share of the time, so that neither an error nor an overrun costs more than its part.

RESULTS takes environment.json, results.jsonl (an object per part, with the card's name, and at the end the ratios) and
log.txt (what the parts printed). The shares of the time are those of an H200 with 16 cores and a disk that writes
1 GB/s; a slower machine gets fewer parts done: --only names those that are wanted. Takes 36 GB of disk (--scratch).

Without a GPU, or with --dry-run, all parts run at tiny sizes on the CPU: that tries the script out, and its figures
say nothing. This file needs nothing but Python; the parts need oneshot's own requirements (TRL and Unsloth for their
sides). On a machine that lacks some of them they can be brought along as wheels: CONTRIBUTING.md has how.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# parts that are files of tests/gpu, so that the slow ones come late
TESTS = {"tests": ("test_kernels.py", "test_runs.py"), "tests-launched": ("test_launched.py",)}
LEAST = 15.0  # seconds; with less left no part is begun
_PROBE = (
    "import json, torch; card = torch.cuda.is_available() and torch.cuda.get_device_properties(0); "
    "from oneshot.environment import facts; "
    "print(json.dumps({'card': card.name if card else 'cpu', 'device': 'cuda' if card else 'cpu', **facts()}))"
)


@dataclass(frozen=True)
class Part:
    """A part by name, the seconds that it may take of ten minutes, and the part without which it cannot run."""

    name: str
    seconds: float
    needs: str | None = "build"


# the most valuable first; together more than there is time for, as most take less than they may
PLAN = (
    Part("build", 110, None),
    Part("rollback-bf16", 75),
    Part("stock-adamw-bf16", 60),
    Part("tests", 110, None),
    Part("rollback-nf4", 60),
    Part("stock-qlora-nf4", 60),
    Part("finetune-lora", 60),
    Part("trl-lora", 60),
    Part("slices-70b", 110),
    Part("tests-launched", 150, None),
    Part("lowrank-bf16", 60),
    Part("load", 120),
    Part("rollback-bf16-guarded", 75),
    Part("unsloth-lora", 90),
    Part("finetune-lora-packed", 60),
    Part("lowrank-nf4", 60),
    Part("finetune-full", 60),
    Part("trl-full", 60),
)
# name -> (part, figure, part, figure): the first over the second
RATIOS = {
    "step_speedup_rollback_over_adamw": ("stock-adamw-bf16", "seconds_per_step", "rollback-bf16", "seconds_per_step"),
    "step_speedup_lowrank_over_adamw": ("stock-adamw-bf16", "seconds_per_step", "lowrank-bf16", "seconds_per_step"),
    "peak_memory_ratio_adamw_over_rollback": ("stock-adamw-bf16", "peak_bytes", "rollback-bf16", "peak_bytes"),
    "peak_memory_ratio_adamw_over_lowrank": ("stock-adamw-bf16", "peak_bytes", "lowrank-bf16", "peak_bytes"),
    "step_speedup_rollback_over_qlora": ("stock-qlora-nf4", "seconds_per_step", "rollback-nf4", "seconds_per_step"),
    "step_speedup_lowrank_over_qlora": ("stock-qlora-nf4", "seconds_per_step", "lowrank-nf4", "seconds_per_step"),
    "peak_memory_ratio_qlora_over_rollback": ("stock-qlora-nf4", "peak_bytes", "rollback-nf4", "peak_bytes"),
    "peak_memory_ratio_qlora_over_lowrank": ("stock-qlora-nf4", "peak_bytes", "lowrank-nf4", "peak_bytes"),
    "lora_tokens_per_second_over_trl": ("finetune-lora", "tokens_per_second", "trl-lora", "tokens_per_second"),
    "lora_tokens_per_second_over_unsloth": ("finetune-lora", "tokens_per_second", "unsloth-lora", "tokens_per_second"),
    "lora_packing_speedup": ("finetune-lora-packed", "tokens_per_second", "finetune-lora", "tokens_per_second"),
    "full_tokens_per_second_over_trl": ("finetune-full", "tokens_per_second", "trl-full", "tokens_per_second"),
    "planned_over_peak_rollback_bf16": ("rollback-bf16", "planned_tensor_bytes", "rollback-bf16", "peak_bytes"),
    "planned_over_peak_rollback_nf4": ("rollback-nf4", "planned_tensor_bytes", "rollback-nf4", "peak_bytes"),
    "planned_over_peak_lowrank_bf16": ("lowrank-bf16", "planned_tensor_bytes", "lowrank-bf16", "peak_bytes"),
    "load_over_storage": ("load", "oneshot_bf16_cold_gb_per_second", "load", "storage_cold_gb_per_second"),
    "load_over_transformers": ("load", "oneshot_bf16_cold_gb_per_second", "load", "transformers_cold_gb_per_second"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts in order, as far as the time goes; return 0 if the first ones that ran all worked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [part.name for part in PLAN]
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=names, help="run these parts, and those that they need")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to try the script out")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run, from nowhere else")
    parser.add_argument("--scratch", type=Path, help="where the random models are written; none: the system's own")
    args = parser.parse_args(argv)
    ends = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="oneshot-gpu-") as scratch:
        run = Run(args.out.resolve(), Path(scratch), ends, args.minutes / 10)
        if args.wheels is not None:
            run.install(args.wheels)
        run.look(dry=args.dry_run)
        wanted = needed(args.only or names)
        for part in PLAN:
            if part.name in wanted:
                run.do(part)
        found = ratios(run.figures)
        run.record("ratios", "ok", found)
        for name, value in found.items():
            print(f"{name:42} {value:8.2f}", flush=True)
    return 0 if all(status in ("ok", "not here", "no time left") for status in run.statuses.values()) else 1


def needed(names: Sequence[str]) -> set[str]:
    """Return the named parts and those that they need."""
    return {*names, *(part.needs for part in PLAN if part.name in names and part.needs)}


def ratios(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return every ratio of ``RATIOS`` whose two figures were measured, rounded."""
    found = {}
    for name, (part, figure, other, of) in RATIOS.items():
        above, below = figures.get(part, {}).get(figure), figures.get(other, {}).get(of)
        if above and below:
            found[name] = round(above / below, 3)
    return found


class Run:
    """One call: where its results go, how long it may take, and what its parts have found.

    Args:
        out, scratch: folders
        ends: of the monotonic clock, by when everything is to be done
        pace: what the parts' shares of ten minutes are multiplied with
    """

    def __init__(self, out: Path, scratch: Path, ends: float, pace: float) -> None:
        self.out, self.scratch, self.ends, self.pace = out, scratch, ends, pace
        self.device = self.card = "cpu"
        self.figures: dict[str, dict[str, Any]] = {}
        self.statuses: dict[str, str] = {}
        for name in ("results.jsonl", "log.txt"):
            (self.out / name).write_text("")
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(scratch / "cache"),
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),  # TRL would take all there are
            # DeepSpeed looks for ninja on the path when it builds an operator
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }  # fmt: skip

    def install(self, wheels: Path) -> None:
        """Install a folder's wheels for this run alone; they come before what the machine has."""
        site = str(self.scratch / "site")
        files = map(str, sorted(wheels.glob("*.whl")))
        pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site, *files]
        code, said = self._process(pip, self.ends - time.monotonic())
        if code != 0:
            sys.exit(f"The wheels in {wheels} cannot be installed, so nothing can be measured:\n{said}")
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), site])

    def look(self, *, dry: bool) -> None:
        """Note what machine this is."""
        if dry:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], env=self.environment, capture_output=True, text=True, cwd=ROOT
        )
        if probe.returncode:
            sys.exit(f"oneshot cannot be imported here, so nothing can be measured:\n{probe.stderr[-2000:]}")
        found = json.loads(probe.stdout.splitlines()[-1])
        self.device, self.card = found["device"], found["card"]
        with contextlib.suppress(OSError):
            found["nvidia-smi"] = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
        (self.out / "environment.json").write_text(json.dumps(found, indent=2) + "\n")
        if self.device == "cpu":
            self.pace = float("inf")  # shares of the time are those of a GPU
            print("A dry run on the CPU, at tiny sizes: the figures say nothing.", flush=True)

    def do(self, part: Part) -> None:
        """Run one part in a process of its own, and record what came of it."""
        left = self.ends - time.monotonic()
        if part.needs and self.statuses.get(part.needs) != "ok":
            return self.record(part.name, f"not run: {part.needs} did not work", {})
        if left < LEAST:
            return self.record(part.name, "no time left", {})
        clock = time.monotonic()
        answer = self.scratch / f"{part.name}.json"
        code, said = self._process(self._command(part, answer), min(left, part.seconds * self.pace))
        figures: dict[str, Any] = {"wall_seconds": round(time.monotonic() - clock, 1)}
        if answer.is_file():
            figures |= tests_of(answer) if part.name in TESTS else json.loads(answer.read_text())
        if "not_here" in figures:
            status = "not here"
        elif answer.is_file() and code in (0, None):  # one that was too slow to leave has done its work all the same
            status = "ok"
        else:
            status = "out of time" if code is None else "failed"
            figures["said"] = said
        return self.record(part.name, status, figures)

    def _command(self, part: Part, answer: Path) -> list[str]:
        if part.name in TESTS:
            files = [f"tests/gpu/{name}" for name in TESTS[part.name]]
            return ["-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", f"--junitxml={answer}", *files]
        scale = "full" if self.device == "cuda" else "tiny"
        options = {"device": self.device, "scale": scale, "folder": self.scratch, "answer": answer}
        return [str(HERE / "gpu_parts.py"), part.name, *(w for k, v in options.items() for w in (f"--{k}", str(v)))]

    def _process(self, words: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Run Python; return its exit code, none where it took too long and was killed, and the end of its output."""
        path = self.out / "log.txt"
        with path.open("a") as log:
            print(f"\n== {' '.join(words)}", file=log, flush=True)
            before = log.tell()
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log,
            )  # fmt: skip
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    end(process.pid)
                    process.wait()
        with path.open("rb") as log_file:
            log_file.seek(before)
            return code, log_file.read().decode(errors="replace")[-2000:]

    def record(self, name: str, status: str, figures: dict[str, Any]) -> None:
        """Append one line to the results, on disk before the next part begins."""
        self.figures[name], self.statuses[name] = figures, status
        line = {"part": name, "card": self.card, "status": status, **figures}
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name:24} {status:12} {figures.get('wall_seconds', '')}", flush=True)


def end(pid: int) -> None:
    """Kill a process and all that it started: a launcher's ranks have sessions of their own, and would stay."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def tests_of(junit: Path) -> dict[str, Any]:
    """Return how many tests passed, and which failed or were skipped and why, of pytest's XML."""
    import xml.etree.ElementTree as ET

    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ET.parse(junit).iter("testcase"):
        kinds = {child.tag: child.get("message") or "" for child in case}
        kind = next((k for k in ("failure", "error", "skipped") if k in kinds), None)
        if kind is None:
            found["passed"] += 1
        else:
            found["skipped" if kind == "skipped" else "failed"][case.get("name")] = kinds[kind][:500]
    return found


if __name__ == "__main__":
    sys.exit(main())
