"""Estimated against measured memory, and the plan of a 70B model: writes both into docs/plan.md.

    python benchmarks/plan_accuracy.py            (measures; half an hour on 2 cores, up to 10 GB)
    python benchmarks/plan_accuracy.py --no-measure     (the 70B table only)

Random bf16 Llamas of 0.1, 0.45 and 1.1 B under ZeRO-3 (launch/zero3_cpu.yaml), one thread per process. Every row is a
run of its own: this package's functions load the checkpoint and make steps, and each process notes its peak resident
memory above what it held after its imports and the start of the process group. glibc's mapping threshold is set to
1 MiB for all, as the package itself sets it for frozen models. rollback's directions are random: what a step takes does
not depend on their values. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# a script's own folder comes first on sys.path, where its neighbours would shadow other packages' modules
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

from random_llama import SHAPES, random_directions, write_random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plan.md"
ANSWER, RANK, HELD, MIB = 32, 20, 16, 2**20
SIZES = {
    "0.1 B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16000},
    "0.45 B": SHAPES["0.45b"],
    "1.1 B": SHAPES["1.1b"],
}
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measured run: model, method, ranks, and rows x tokens of the batch, the rows after the first the guard's."""

    size: str
    method: str
    ranks: int
    rows: int = 1
    tokens: int = 96


CASES = [
    *(Case(size, m, n) for size in ("0.1 B", "0.45 B") for m in ("lowrank", "rollback", "lora") for n in (1, 2)),
    *(Case("0.1 B", "sft", n) for n in (1, 2)),
    *(Case("0.1 B", m, n, rows=5, tokens=128) for m in ("lowrank", "rollback") for n in (1, 2)),
    *(Case("1.1 B", m, n) for m in ("lowrank", "rollback") for n in (1, 2)),
]
BIG = Case("0.45 B", "sft", 2)  # 13 GB over both ranks: with --big only


def main() -> None:
    """Measure, write the page; or, started by ourselves, build a checkpoint or be one process of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-measure", action="store_true", help="write the 70B table only")
    parser.add_argument("--big", action="store_true", help="also sft of 0.45 B: 14 GB of memory")
    parser.add_argument("--only", default="", help="measure sizes that contain this, and write nothing")
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
        cases = [case for case in [*CASES, *([BIG] if args.big else [])] if args.only in case.size]
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
    environment["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    script = [str(Path(__file__).resolve()), "--folder", str(path), "--role"]
    if not path.is_dir():
        subprocess.run([sys.executable, *script, "build", "--case", case.size], check=True, env=environment)
    print(f"{case} ...", file=sys.stderr, flush=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_cpu.yaml"]
    command = [*launch, "--num_processes", str(case.ranks), *script, "work", "--case", json.dumps(vars(case))]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    ranks = [json.loads(file.read_text()) for file in sorted(path.glob("rank-*.json"))]
    for file in path.glob("rank-*.json"):
        file.unlink()
    found: dict[str, Any] = {**vars(case), **{key: max(rank[key] for rank in ranks) for key in ("load", "step")}}
    expected = expect(path, case)
    for key in ("load", "step"):
        found[f"{key}_estimate"] = getattr(expected, key)
        found[f"{key}_error"] = round(getattr(expected, key) / found[key] - 1, 4)
    found["lower"] = expected.lower
    assert expected.lower <= found["step"], "the lower bound must be one"
    return found


def expect(path: Path, case: Case) -> Any:
    """Return the estimate for a case."""
    from oneshot.planning.facts import CPU, Choice, Work, shipped
    from oneshot.planning.lookup import model_shape
    from oneshot.planning.memory import estimate

    guard = (case.rows - 1) * case.tokens
    total = case.tokens + case.ranks * guard
    batch = Work(case.rows, case.tokens, ANSWER, HELD * (case.rows - 1), total, RANK)
    choice = Choice(case.method, "bf16", "zero3", case.ranks)
    shape = model_shape(json.loads((path / "config.json").read_text()))
    return estimate(shape, choice, batch, shipped("zero3"), CPU)


def build(folder: Path, size: str) -> None:
    """Save a random Llama with the toy world's tokenizer."""
    heads = SIZES[size]["hidden_size"] // 64
    write_random_llama(folder, SIZES[size], heads=heads, kv_heads=heads // 4)


def work(folder: Path, case: Case) -> None:
    """Be one process: load, step, and leave both peaks above the start in a file."""
    import deepspeed.runtime.zero.stage3  # noqa: F401  imports are no part of what is measured
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed as dist
    from transformers import GenerationConfig, LlamaForCausalLM  # noqa: F401

    from oneshot.checkpoint.load import find_source, load_model
    from oneshot.distributed.resources import peak_bytes, reset_peak, resident_bytes
    from oneshot.distributed.runtime import barrier, start
    from oneshot.patch.linears import select_linears
    from oneshot.settings import ModelSettings

    runtime = start()
    settings = ModelSettings(path=str(folder))
    source = find_source(settings)
    barrier(runtime)
    reset_peak()
    before = resident_bytes()
    model = load_model(runtime, source, settings)
    load = peak_bytes() - before
    linears = select_linears(model)
    batch = random_batch(runtime, model, case)
    reset_peak()
    run = step_frozen if case.method in ("lowrank", "rollback") else step_trained
    run(runtime, model, linears, batch, case)
    found = {"load": load, "step": peak_bytes() - before}
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    barrier(runtime)
    dist.destroy_process_group()


def random_batch(runtime: Any, model: Any, case: Case) -> Any:
    """Random rows: the example, then the guard's, each held on its last positions."""
    import torch

    from oneshot.data.encoding import IGNORE, Encoded
    from oneshot.patch.guard import laid

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(7, model.config.vocab_size, (case.rows, case.tokens), generator=generator).tolist()
    prompt = case.tokens - ANSWER
    example = Encoded(rows[0], [IGNORE] * prompt + rows[0][prompt:])
    guard = [(Encoded(ids, [IGNORE] * len(ids)), case.tokens - HELD) for ids in rows[1:]]
    batch = laid(example, guard, None, 0, runtime.device)
    return dataclasses.replace(batch, held_total=HELD * len(guard) * runtime.world_size)


def step_frozen(runtime: Any, model: Any, linears: Any, batch: Any, case: Case) -> None:
    """Some steps of lowrank, or of rollback along random directions."""
    import torch

    from oneshot.distributed.engine import frozen
    from oneshot.patch.methods import lowrank, rollback
    from oneshot.patch.path import Attempt
    from oneshot.patch.recipe import recipe_for
    from oneshot.patch.trace import Tracer
    from oneshot.settings import RepairSettings
    from oneshot.training.objective import logits_at

    attempt = Attempt(Tracer(), 1.0 if case.rows > 1 else 0.0)
    with frozen(runtime, model) as ready:
        if case.rows > 1:
            with torch.no_grad():
                reference = logits_at(ready, batch.inputs, batch.kept[len(batch.targets) :])
            batch = dataclasses.replace(batch, reference=reference)
        if case.method == "lowrank":
            recipe = recipe_for(RepairSettings(method="lowrank", epochs=3, rank=RANK), has_update=False)
            lowrank.descend(runtime, ready, linears.targets, batch, attempt, recipe)
            return
        directions = random_directions(linears.targets, RANK)
        options = RepairSettings(method="rollback", epochs=4, learning_rate=0.1, noise=0.0, undo=0.0)
        rollback.learn(runtime, ready, directions, batch, attempt, recipe_for(options, has_update=True))


def step_trained(runtime: Any, model: Any, linears: Any, batch: Any, case: Case) -> None:
    """Some steps of AdamW on all weights, or on a LoRA."""
    from oneshot.distributed.engine import start_training
    from oneshot.patch.bench import with_lora
    from oneshot.patch.guard import repair_loss
    from oneshot.training.loop import Schedule, train

    model = with_lora(model, linears, RANK) if case.method == "lora" else model.requires_grad_(True)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    train(
        engine,
        Schedule(3, 2e-5, decay=False),
        lambda _step: [batch],
        lambda forward, rows: repair_loss(forward, rows, 0.0, runtime.world_size)[0],
        lambda _result: None,
    )


def accuracy_table(found: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown; MiB above the start."""
    lines = [
        "| model | method | ranks | batch | load: measured | estimated | | step: measured | estimated | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [row["size"], f"`{row['method']}`", row["ranks"], f"{row['rows']} x {row['tokens']}"]
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
            said.append("\n".join(lines[1:-1]).strip("\n") + "\n```\n\n")
    return "".join(said).strip()


def write_section(name: str, text: str) -> None:
    """Put text between the page's two markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(begin)[0], page.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
