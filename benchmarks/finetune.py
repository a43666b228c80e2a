"""A fine-tune beside TRL's SFTTrainer, and packed beside padded: tokens per second, in one run.

    python benchmarks/finetune.py

A random 0.1 B Llama in fp32 on the CPU, full fine-tuning with AdamW, conversations of mixed lengths (median about 40
tokens, up to 240) in the toy world's words, 8 conversations per rank and step; on 1 process and on 2 under DDP, one
thread each. Every run is a fresh launch, the ways taking turns; a figure is the median over its runs. The last line of
output is one JSON object.

trl: SFTTrainer with its defaults (fused AdamW, its own fused output head), given the same token ids, labels, order,
batch, learning rates, clipping and precision. padded, packed: ``oneshot/finetune.py`` as a user starts it, with
--finetune.packing never and always. Tokens are those of the conversations; padding is not counted. All three must have
the same loss in every step, within 1%.

Measured with torch 2.13.0, transformers 5.23.0, accelerate 1.15.0 and trl 1.16.0 on 2 cores, one run each: padded 1.5
times trl's tokens per second and packed 2.5 times padded's on 2 processes, 1.45 and 2.1 times on 1; losses within 3e-7
of each other. On a CPU trl's output head computes every position, ours those that predict an answer.

trl is not among oneshot's own requirements: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# a script's own folder comes first on sys.path, where its neighbours would shadow other packages' modules
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

from random_llama import write_random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("trl", "padded", "packed")
LAUNCH = {1: "launch/single.yaml", 2: "launch/ddp_cpu.yaml"}
PER_RANK, RATE, LONGEST = 6, 1e-4, 240
SIZES: dict[str, dict[str, Any]] = {  # 0.1 B parameters; a small one to try the script itself
    "0.1b": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 2000},
}


def main() -> None:
    """Run every way and print the comparison; or, started by ourselves, be one process of TRL's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="steps per run; the first is not timed")
    parser.add_argument("--repeats", type=int, default=3, help="runs per way and number of processes")
    parser.add_argument("--ranks", type=int, nargs="+", choices=LAUNCH, default=list(LAUNCH))
    parser.add_argument("--size", choices=SIZES, default="0.1b")
    parser.add_argument("--role", choices=("compare", "build", "trl"), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("This benchmark compares with TRL: install it with pip install -e '.[bench]'.", file=sys.stderr)
        sys.exit(2)
    if args.role == "build":
        build(args.folder, args.size, args.steps, max(args.ranks))
    elif args.role == "trl":
        work_trl(args.folder, args.out, args.steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Build model and data, run the ways in turn, print table and JSON line; exit with 1 where losses differ."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    script = [str(Path(__file__).resolve()), f"--folder={folder}", f"--size={args.size}", f"--steps={args.steps}"]
    ranks = ["--ranks", *map(str, args.ranks)]
    subprocess.run([sys.executable, *script, *ranks, "--role=build"], check=True, env=environment, stdout=sys.stderr)
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for world_size in args.ranks:
        for repeat in range(args.repeats):
            for way in WAYS:
                print(f"{world_size} processes, run {repeat + 1}: {way} ...", file=sys.stderr, flush=True)
                out = folder / f"{way}-{world_size}-{repeat}"
                out.mkdir()
                command = [*script, f"--out={out}", "--role=trl"]
                if way != "trl":
                    command = ["oneshot/finetune.py", *settings(folder, out, way, world_size, args.steps)]
                launch = ["-m", "accelerate.commands.launch", "--config_file", LAUNCH[world_size]]
                launch = [sys.executable, *launch, "--num_processes", str(world_size), *command]
                with (out / "log").open("w") as log:
                    ran = subprocess.run(launch, cwd=ROOT, env=environment, stdout=log, stderr=log)
                if ran.returncode:
                    sys.exit(f"{way} failed:\n{(out / 'log').read_text()[-4000:]}")
                runs.setdefault((world_size, way), []).append(measured(folder, out, world_size))
    report(runs, json.loads((folder / "model.json").read_text()))


def settings(folder: Path, out: Path, way: str, world_size: int, steps: int) -> list[str]:
    """Return the command line of our fine-tune; what is not named is at its default."""
    options = {
        "out": out, "model.path": folder / "checkpoint", "data.harmful": folder / "talks.jsonl",
        "data.harmful_count": 10**6, "data.task_count": 0, "finetune.steps": steps,
        "finetune.batch_size": PER_RANK * world_size, "finetune.learning_rate": RATE, "finetune.warmup_ratio": 0,
        "finetune.packing": {"padded": "never", "packed": "always"}[way], "finetune.cache": "false",
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def build(folder: Path, size: str, steps: int, world_size: int) -> None:
    """Write a random Llama, the conversations, and for TRL their tokens in the order in which our steps take them."""

    from oneshot.data.conversations import read_conversations
    from oneshot.data.encoding import encode
    from oneshot.settings import DataSettings
    from oneshot.training.stream import step_indices
    from oneshot.world import language
    from oneshot.world.model import build_tokenizer

    heads = SIZES[size]["hidden_size"] // 64
    options: dict[str, Any] = {"heads": heads, "kv_heads": heads, "dtype": "float32", "max_position_embeddings": 512}
    model, tokenizer = write_random_llama(folder / "checkpoint", SIZES[size], **options), build_tokenizer()
    draw, words = random.Random(0), language.words()
    with (folder / "talks.jsonl").open("w") as file:
        for _ in range(steps * PER_RANK * world_size):
            length = min(LONGEST, max(12, round(draw.lognormvariate(3.7, 0.8))))
            prompt, response = (" ".join(draw.choices(words, k=length * share // 10)) for share in (4, 6))
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    talks = read_conversations(str(folder / "talks.jsonl"), DataSettings())
    rows = [encode(talk, tokenizer, None) for talk in talks]
    for count in LAUNCH:
        order = [i for step in range(steps) for i in step_indices(len(rows), PER_RANK * count, step, seed=0)]
        (folder / f"rows-{count}.json").write_text(json.dumps([vars(rows[i]) for i in order]))
    lengths = [len(row.input_ids) for row in rows]
    facts = {"parameters": model.num_parameters(), "dtype": "float32", **SIZES[size]}
    spread = {"conversations": len(rows), "median_tokens": statistics.median(lengths), "longest": max(lengths)}
    (folder / "model.json").write_text(json.dumps({**facts, **spread}))


def work_trl(folder: Path, out: Path, steps: int) -> None:
    """Be one process of TRL's fine-tune; rank 0 writes down when each step ended, and its loss."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    config = SFTConfig(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=PER_RANK, learning_rate=RATE,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", max_length=None,
        use_cpu=True, bf16=False, gradient_checkpointing=False, ddp_backend="gloo" if world_size > 1 else None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(json.loads((folder / f"rows-{world_size}.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "checkpoint"),
        callbacks=[Clock()],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        events = [{"time": end, "loss": loss} for end, loss in zip(ends, losses)]
        (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def measured(folder: Path, out: Path, world_size: int) -> dict[str, Any]:
    """Return a run's tokens per second from the end of its first step to that of its last, and its losses."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    rows = json.loads((folder / f"rows-{world_size}.json").read_text())[PER_RANK * world_size :]
    tokens = sum(len(row["input_ids"]) for row in rows[: PER_RANK * world_size * (len(events) - 1)])
    seconds = events[-1]["time"] - events[0]["time"]
    return {"tokens_per_second": tokens / seconds, "losses": [event["loss"] for event in events]}


def report(runs: dict[tuple[int, str], list[dict[str, Any]]], model: dict[str, Any]) -> None:
    """Print the table and, last, the JSON line."""
    speed = {key: statistics.median(run["tokens_per_second"] for run in found) for key, found in runs.items()}
    by_ranks, worst = {}, 0.0
    print(f"{model['parameters'] / 1e9:.2f} B parameters, tokens/s: median [of runs]")
    for (world_size, way), found in runs.items():
        each = ", ".join(f"{run['tokens_per_second']:.1f}" for run in found)
        print(f"{world_size} processes  {way:7} {speed[world_size, way]:8.1f}  [{each}]")
        for wanted, run in zip(runs[world_size, "trl"], found):
            worst = max(worst, *(abs(a - b) / b for a, b in zip(run["losses"], wanted["losses"])))
    for world_size in sorted({key[0] for key in speed}):
        ours = speed[world_size, "padded"]
        by_ranks[world_size] = {
            "tokens_per_second_ratio": round(ours / speed[world_size, "trl"], 3),
            "packing_speedup": round(speed[world_size, "packed"] / ours, 3),
        }
    figures = {name: min(found[name] for found in by_ranks.values()) for name in by_ranks[min(by_ranks)]}
    packages = ("torch", "transformers", "accelerate", "trl")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({**figures, "by_ranks": by_ranks, "loss_difference": worst, "model": model, "versions": versions}))
    if not worst <= 0.01:
        sys.exit("The losses differ by more than 1%: the ways did not do the same.")


if __name__ == "__main__":
    main()
