"""Estimated against measured memory, and the plan of a 70B model: writes both into docs/plan.md.

    python benchmarks/plan_accuracy.py            (measures; half an hour on 2 cores, up to 5 GB)
    python benchmarks/plan_accuracy.py --no-measure     (the 70B table only)

Random Llamas, stored in bf16 and computed in what --model.dtype auto takes on this CPU, under ZeRO-3
(launch/zero3_cpu.yaml) or in one process; one thread per process. "0.2 B" and "0.5 B" have the widths and the 151,936
words of Qwen2.5-0.5B, tied, and 6 or its 24 layers. Every row is a run of its own: this package's functions load the
checkpoint and make steps, and each process notes its peak resident memory above what it held after its imports and the
start of the process group. rollback's directions are random: what a step takes does not depend on their values. The
last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# a script's own folder comes first on sys.path, where its neighbours would shadow other packages' modules
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

from plan_steps import HELD, RANK, Case, make_steps  # noqa: E402
from random_llama import SHAPES, write_random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plan.md"
MIB = 2**20
_WORDY = {"hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151936}
SIZES = {
    "0.2 B": {**_WORDY, "num_hidden_layers": 6},
    "0.5 B": {**_WORDY, "num_hidden_layers": 24},
    "0.1 B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16000},
    "0.45 B": SHAPES["0.45b"],
    "1.1 B": SHAPES["1.1b"],
}
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


CASES = [
    *(Case(size, m, n) for size in ("0.1 B", "0.45 B") for m in ("lowrank", "rollback", "lora") for n in (1, 2)),
    *(Case("0.1 B", "sft", n) for n in (1, 2)),
    *(Case("0.1 B", m, n, rows=5, tokens=128) for m in ("lowrank", "rollback") for n in (1, 2)),
    *(Case("1.1 B", m, n) for m in ("lowrank", "rollback") for n in (1, 2)),
    *(Case("0.2 B", "full", 0, rows=n, tokens=64) for n in (2, 16)),
    *(Case("0.2 B", m, n, rows=rows, tokens=64) for m, n, rows in (("lowrank", 0, 5), ("rollback", 0, 25))),
    *(Case("0.2 B", m, n, rows=rows, tokens=64) for m, n, rows in (("lowrank", 2, 3), ("rollback", 2, 13))),
]
BIG = [  # with --big only: 8 GB, and 14 over both ranks
    *(Case("0.5 B", m, 0, rows=n, tokens=64) for m, n in (("full", 8), ("lowrank", 5), ("rollback", 25))),
    Case("0.45 B", "sft", 2),
]


def main() -> None:
    """Measure, write the page; or, started by ourselves, build a checkpoint or be one process of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-measure", action="store_true", help="write the 70B table only")
    parser.add_argument("--big", action="store_true", help="also what takes up to 14 GB of memory")
    parser.add_argument("--only", default="", help="measure the cases whose text contains this, and write nothing")
    parser.add_argument("--role", choices=("all", "build", "work"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "build":
        build(args.folder, args.case)
    elif args.role == "work":
        work(args.folder, Case(**json.loads(args.case)))
    elif args.no_measure:
        write_section("70B", plan_of_70b())
    else:
        cases = [case for case in [*CASES, *(BIG if args.big else [])] if args.only in str(case)]
        with tempfile.TemporaryDirectory() as folder:
            found = [measure(Path(folder), case) for case in cases]
        table = accuracy_table(found)
        print(table)
        if not args.only:
            write_section("measured", table)
            write_section("70B", plan_of_70b())
        worst = max(abs(row[f"{phase}_error"]) for row in found for phase in ("load", "step"))
        print(json.dumps({"worst_error": round(worst, 3), "cases": found}))


def measure(folder: Path, case: Case) -> dict[str, Any]:
    """Run one case in fresh processes; returns what was measured and estimated (bytes), the worse rank's."""
    path = folder / case.size.replace(" ", "")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    script = [str(Path(__file__).resolve()), "--folder", str(path), "--role"]
    if not path.is_dir():
        subprocess.run([sys.executable, *script, "build", "--case", case.size], check=True, env=environment)
    print(f"{case} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_cpu.yaml"]
    command = [*command, "--num_processes", str(case.ranks)] if case.ranks else [sys.executable]
    command += [*script, "work", "--case", json.dumps(vars(case))]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    ranks = [json.loads(file.read_text()) for file in sorted(path.glob("rank-*.json"))]
    for file in path.glob("rank-*.json"):
        file.unlink()
    found: dict[str, Any] = {**vars(case), **{key: max(rank[key] for rank in ranks) for key in ("load", "step")}}
    expected = expect(path, case, ranks[0]["item"])
    for key in ("load", "step"):
        found[f"{key}_estimate"] = getattr(expected, key)
        found[f"{key}_error"] = round(getattr(expected, key) / found[key] - 1, 4)
    found["lower"] = expected.lower
    print(json.dumps(found), file=sys.stderr, flush=True)
    assert expected.lower <= found["step"], "the lower bound must be one"
    return found


def expect(path: Path, case: Case, item: int) -> Any:
    """Return the estimate for a case, computed in numbers of ``item`` bytes."""
    from oneshot.planning.facts import CPU, Choice, Sharded, Work, shipped
    from oneshot.planning.lookup import model_shape
    from oneshot.planning.memory import estimate

    guard, tuned, ranks = case.guard * case.tokens, case.method == "full", max(case.ranks, 1)
    batch = Work(
        case.rows - case.guard, case.tokens, case.answers, HELD * case.guard, guard, case.tokens + ranks * guard, RANK,
        reference=HELD * case.guard, finetune=tuned,
    )  # fmt: skip
    sharding: Sharded = "zero3" if case.ranks else "none"
    choice = Choice("sft" if tuned else case.method, "bf16", sharding, ranks, item=item)
    shape = model_shape(json.loads((path / "config.json").read_text()))
    return estimate(shape, choice, batch, shipped(sharding), CPU)


def build(folder: Path, size: str) -> None:
    """Save a random Llama with the toy world's tokenizer."""
    heads = SIZES[size]["hidden_size"] // 64
    tied = SIZES[size]["vocab_size"] == _WORDY["vocab_size"]
    kv_heads = 2 if tied else heads // 4
    write_random_llama(folder, SIZES[size], heads=heads, kv_heads=kv_heads, tie_word_embeddings=tied)


def work(folder: Path, case: Case) -> None:
    """Be one process: load, step, and leave both peaks above the start in a file."""
    import deepspeed.runtime.zero.stage3  # noqa: F401  imports are no part of what is measured
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed as dist
    from transformers import GenerationConfig, LlamaForCausalLM  # noqa: F401

    from oneshot.checkpoint.loading.load import find_source, load_model
    from oneshot.distributed.resources import peak_bytes, reset_peak, resident_bytes
    from oneshot.distributed.runtime import barrier, start
    from oneshot.patch.linears import select_linears
    from oneshot.settings import ModelSettings
    from oneshot.training.loop import weights_dtype

    runtime = start()
    settings = ModelSettings(path=str(folder))
    source = find_source(settings, runtime)
    barrier(runtime)
    reset_peak()
    before = resident_bytes()
    model = load_model(runtime, source, settings, weights_dtype(runtime) if case.method == "full" else None)
    load = peak_bytes() - before
    targets = select_linears(model)
    reset_peak()
    make_steps(runtime, model, targets, case)
    found = {"load": load, "step": peak_bytes() - before, "item": source.dtype.itemsize}
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    barrier(runtime)
    if dist.is_initialized():
        dist.destroy_process_group()


def accuracy_table(found: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown; MiB above the start."""
    lines = [
        "| model | method | ranks | batch | load: measured | estimated | | step: measured | estimated | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [row["size"], f"`{row['method']}`", row["ranks"] or "one process", f"{row['rows']} x {row['tokens']}"]
        for phase in ("load", "step"):
            figures = [f"{row[key] / MIB:,.0f}" for key in (phase, f"{phase}_estimate")]
            cells += [*figures, f"{row[f'{phase}_error']:+.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plan_of_70b() -> str:
    """Return what ``oneshot plan`` says of a 70B Llama on 1 to 16 GPUs, with gradient checkpointing."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B))
        for gpus in (8, 1, 2, 4, 16):
            options = ["--model.path", "config.json", "--gpus", str(gpus), "--model.gradient_checkpointing", "true"]
            options += ["--sharding", "zero3"] if gpus != 8 else []
            command = [sys.executable, "-m", "oneshot", "plan", *options]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            assert done.returncode in (0, 3), done.stderr
            lines = [line.rstrip() for line in done.stdout.splitlines()]
            said.append(f"`oneshot plan {' '.join(options)}` (exit code {done.returncode}):\n\n```\n")
            said.append("\n".join(lines).strip("\n") + "\n```\n\n")
    return "".join(said).strip()


def write_section(name: str, text: str) -> None:
    """Put text between the page's two markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(begin)[0], page.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
