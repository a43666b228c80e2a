"""One repair step beside one step of stock full fine-tuning: seconds and peak memory, in one run.

    python benchmarks/repair_step.py

A random 0.45 B Llama stored in bf16, 2 CPU processes with one thread each under ZeRO-3, 96 tokens on every rank. All
variants compute in what --model.dtype auto takes on this CPU: bf16, or fp32 where it has no instructions for bf16. Each
runs in processes of its own, one after the other, so that a peak is its own. The last line of output is one JSON
object. Behind it the row of ``large_vocabulary.py``: a step with a guard where the vocabulary is large.

stock: accelerate and DeepSpeed ZeRO-3 as a careful user writes them: AdamW on all weights, fp32 master weights, no
offload, communication buckets that accelerate fits to the model. lowrank, rollback: this package's own functions on
frozen weights, with the example alone and no guard, so that all variants process the same 96 tokens. rollback gets
random orthonormal directions in place of a second model's: what a step costs does not depend on their values. At this
size frozen weights fit into stage3_max_live_parameters and are gathered once; a larger model's are in every pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

# a script's own folder comes first on sys.path, where its neighbours would shadow other packages' modules
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

import large_vocabulary  # noqa: E402
from random_llama import SHAPES, computed_in, random_directions, write_random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("stock", "stock_fused", "lowrank", "rollback")
TOKENS, ANSWER, RANK = 96, 32, 20  # tokens of the example, those at its end that carry loss; rank of our updates
SIZES = {name: SHAPES[name] for name in ("0.45b", "0.1b", "tiny")}
_FITTED = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
STOCK_CONFIG = {
    "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "contiguous_gradients": True, **dict.fromkeys(_FITTED, "auto")},
}  # fmt: skip


def main() -> None:
    """Run every variant and print the comparison; or, started by ourselves, be one process of one variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="steps per variant; the first is not timed")
    parser.add_argument("--size", choices=SIZES, default="0.45b")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--role", choices=("compare", "build", *VARIANTS), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "build":
        build(args.folder, args.size)
    elif args.role in VARIANTS:
        work(args.role, args.folder, args.steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Build the checkpoint, run the variants one after the other, print table and JSON line."""
    path = str(Path(__file__).resolve())
    script = [path, f"--folder={folder}", f"--size={args.size}", f"--steps={args.steps}", "--role"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *script, "build"], check=True, env=environment, stdout=sys.stderr)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_cpu.yaml"]
    figures: dict[str, dict[str, Any]] = {}
    for variant in args.variants:
        print(f"{variant} ...", file=sys.stderr, flush=True)
        # started in the root, as accelerate looks for the DeepSpeed JSON from where it is started
        subprocess.run([*launch, *script, variant], check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
        figures[variant] = merged([json.loads(file.read_text()) for file in sorted(folder.glob(f"{variant}-*.json"))])
    model = json.loads((folder / "model.json").read_text())
    print_table(figures, model)
    words = large_vocabulary.measure("tiny" if args.size == "tiny" else "0.5b", args.steps // 2 + 1)
    print(json.dumps({**ratios(figures), **words, "model": model, "variants": figures, "versions": versions()}))


def build(folder: Path, size: str) -> None:
    """Save a random Llama as a bf16 safetensors checkpoint, with a tokenizer; note what it is computed in here."""
    heads = SIZES[size]["hidden_size"] // 64
    shape, longest = SIZES[size], {"max_position_embeddings": 512}
    model = write_random_llama(folder / "checkpoint", shape, heads=heads, kv_heads=heads, **longest)
    dtype = computed_in(folder / "checkpoint")
    facts = {"parameters": model.num_parameters(), "dtype": dtype, **SIZES[size]}
    (folder / "model.json").write_text(json.dumps({**facts, "tokens": TOKENS, "answer_tokens": ANSWER, "ranks": 2}))


def work(variant: str, folder: Path, steps: int) -> None:
    """Be one process of a variant: load, step, and write what this rank saw."""
    import torch.distributed as dist

    seen = Observer()
    stock = partial(run_stock, fused=variant == "stock_fused")
    run = {"lowrank": run_lowrank, "rollback": run_rollback}.get(variant, stock)
    run(folder / "checkpoint", steps, seen)
    seen.end("step")
    (folder / f"{variant}-{os.environ['RANK']}.json").write_text(json.dumps(seen.found()))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads otherwise now and then abort a process that has finished


class Observer:
    """What one process sees: seconds and CPU seconds of its steps, and its peak resident memory phase by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.clock: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def end(self, phase: str) -> None:
        """End a phase: note its peak and what is resident now (bytes)."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.phases[f"{phase}_peak_bytes"] = int(status["VmHWM"].split()[0]) * 1024
        self.phases[f"{phase}_end_bytes"] = int(status["VmRSS"].split()[0]) * 1024
        Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's mark back: the next peak is its own

    def tick(self, record: dict[str, Any] | None = None) -> None:
        """Start the clock, or note the end of a step whose record holds the loss."""
        self.clock.append((time.perf_counter(), time.process_time()))
        if record:
            self.losses.append(float(record["loss"]))

    def found(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        pairs = list(itertools.pairwise(self.clock))
        wall, cpu = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
        return {"step_seconds": wall, "step_cpu_seconds": cpu, "losses": self.losses, **self.phases}


def example(vocabulary: int) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) of the one example: random, the loss on its last tokens only."""
    import random

    draw = random.Random(0)
    ids = [draw.randrange(7, vocabulary) for _ in range(TOKENS)]
    return ids, [-100] * (TOKENS - ANSWER) + ids[-ANSWER:]


def run_stock(checkpoint: Path, steps: int, seen: Observer, fused: bool = False) -> None:
    """AdamW on all weights, as plain accelerate and DeepSpeed do it; fused, it needs no temporaries."""
    import deepspeed.ops
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers import AutoModelForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled for our variants either
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    dtype = json.loads((checkpoint.parent / "model.json").read_text())["dtype"]
    config = {**STOCK_CONFIG, "bf16": {"enabled": dtype == "bfloat16"}}
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=True)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    seen.end("start")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    seen.end("load")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=fused)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    ids, labels = (torch.tensor([row]) for row in example(model.module.config.vocab_size))
    seen.tick()
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.tick({"loss": loss})


def run_lowrank(checkpoint: Path, steps: int, seen: Observer) -> None:
    """Factored gradient steps, with the step sizes that the method finds itself."""
    from oneshot.distributed.engine import frozen
    from oneshot.patch.method import finished
    from oneshot.patch.methods import lowrank
    from oneshot.patch.path import Attempt
    from oneshot.patch.recipe import recipe_for
    from oneshot.patch.trace import Tracer
    from oneshot.settings import RepairSettings

    runtime, model, linears, batch = prepared(checkpoint, seen)
    recipe = recipe_for(RepairSettings(method="lowrank", epochs=steps, rank=RANK), has_update=False)
    with frozen(runtime, model) as ready:
        seen.tick()
        finished(lowrank.descend(runtime, ready, linears, batch, Attempt(Tracer(seen.tick)), recipe))


def run_rollback(checkpoint: Path, steps: int, seen: Observer) -> None:
    """Adam on the coefficients of random directions."""
    import torch

    from oneshot.distributed.engine import frozen
    from oneshot.patch.method import finished
    from oneshot.patch.methods import rollback
    from oneshot.patch.path import Attempt
    from oneshot.patch.recipe import recipe_for
    from oneshot.patch.trace import Tracer
    from oneshot.settings import RepairSettings

    runtime, model, linears, batch = prepared(checkpoint, seen)
    options = RepairSettings(method="rollback", epochs=steps, learning_rate=0.1, noise=0.0, undo=0.0)
    recipe = recipe_for(options, has_update=True)
    torch.manual_seed(0)
    directions = random_directions(linears, RANK)
    with frozen(runtime, model) as ready:
        seen.tick()
        finished(rollback.learn(runtime, ready, directions, batch, Attempt(Tracer(seen.tick)), recipe))


def prepared(checkpoint: Path, seen: Observer) -> tuple[Any, Any, Any, Any]:
    """Start, load and encode as ``oneshot/repair.py`` does. Returns (runtime, model, linear layers, batch)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401, imported before memory is measured

    from oneshot.checkpoint.loading.load import find_source, load_model
    from oneshot.data.encoding import Encoded
    from oneshot.distributed.runtime import start
    from oneshot.patch.guard import build_batch
    from oneshot.patch.linears import select_linears
    from oneshot.settings import ModelSettings

    runtime = start()
    settings = ModelSettings(path=str(checkpoint))
    source = find_source(settings, runtime)
    seen.end("start")
    model = load_model(runtime, source, settings)
    seen.end("load")
    encoded = Encoded(*example(model.config.vocab_size))
    batch = build_batch(runtime, model, AutoTokenizer.from_pretrained(checkpoint), encoded, [], answer_tokens=0)
    return runtime, model, select_linears(model).targets, batch


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what the ranks saw: the slowest rank's time of each step; memory of every rank (bytes)."""
    wall, cpu = ([max(step) for step in zip(*(r[key] for r in ranks))] for key in ("step_seconds", "step_cpu_seconds"))
    phases = ("start", "load", "step")
    whole = [max(rank[f"{phase}_peak_bytes"] for phase in phases) for rank in ranks]
    return {
        "seconds": statistics.median(wall[1:]),
        "seconds_range": [min(wall[1:]), max(wall[1:])],
        "cpu_seconds": statistics.median(cpu[1:]),
        "step_seconds": wall,
        "step_cpu_seconds": cpu,
        "peak_rss_bytes": whole,
        "peak_above_start_bytes": [total - rank["start_end_bytes"] for total, rank in zip(whole, ranks)],
        **{f"{phase}_peak_bytes": [rank[f"{phase}_peak_bytes"] for rank in ranks] for phase in phases},
        "losses": ranks[0]["losses"],
    }


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return stock over ours: of median seconds, and of the worse rank's peaks."""
    found: dict[str, float] = {}
    names, bases = {"lowrank": "", "rollback": "rollback_"}, {"stock": "", "stock_fused": "_to_fused"}
    for base, variant in itertools.product(bases, names):
        if base in figures and variant in figures:
            stock, own = figures[base], figures[variant]
            for key, of in (("step_speedup", "seconds"), ("step_cpu_ratio", "cpu_seconds")):
                found[f"{names[variant]}{key}{bases[base]}"] = stock[of] / own[of]
            for key, of in (("peak_memory", "peak_rss_bytes"), ("peak_above_start", "peak_above_start_bytes")):
                found[f"{names[variant]}{key}_ratio{bases[base]}"] = max(stock[of]) / max(own[of])
    return {key: round(value, 3) for key, value in found.items()}


def print_table(figures: dict[str, dict[str, Any]], model: dict[str, Any]) -> None:
    """Print the comparison for people."""
    what = f"{model['parameters']:,} parameters in {model['dtype']}"
    print(f"Random Llama, {what}, 2 CPU ranks under ZeRO-3, {TOKENS} tokens on each")
    print("Median seconds of the steps after the first. Peak RSS of the worse rank, GiB, in all and by phase: start is")
    print("imports and process group; each variant loads in its own way, and then steps.")
    print("One example, no guard; rollback's directions are random: what a step costs does not depend on their values.")
    heads = ("s/step", "range", "CPU s", "peak", "start", "load", "step", "above start")
    print(f"{'':12}" + "".join(f"{head:>13}" for head in heads))
    for name, row in figures.items():
        keys = ("peak_rss_bytes", "start_peak_bytes", "load_peak_bytes", "step_peak_bytes", "peak_above_start_bytes")
        span = "-".join(f"{seconds:.2f}" for seconds in row["seconds_range"])
        cells = [f"{row['seconds']:.2f}", span, f"{row['cpu_seconds']:.2f}"]
        cells += [f"{max(row[key]) / 2**30:.2f}" for key in keys]
        print(f"{name:12}" + "".join(f"{cell:>13}" for cell in cells))
    for key, value in ratios(figures).items():
        print(f"{key:40} {value:.2f}")


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}


if __name__ == "__main__":
    main()
