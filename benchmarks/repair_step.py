"""One repair step beside one step of stock full fine-tuning: seconds and peak memory, in one run.

    python benchmarks/repair_step.py

A random 0.45 B Llama in bf16, 2 CPU processes with one thread each under ZeRO-3, 96 tokens on every rank. Each variant
runs in processes of its own, one after the other, so that a peak is its own. The last line of output is one JSON
object.

stock: accelerate and DeepSpeed ZeRO-3 as a careful user writes them: AdamW on all weights, fp32 master weights, no
offload, communication buckets that accelerate fits to the model. lowrank, rollback: this package's own functions on
frozen weights, with the example alone and no guard, so that all variants process the same 96 tokens. rollback gets
random orthonormal directions in place of a second model's: what a step costs does not depend on their values.
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
from pathlib import Path
from typing import Any

# a script's own folder comes first on sys.path, where its neighbours would shadow other packages' modules
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("stock", "lowrank", "rollback")
TOKENS, ANSWER = 96, 32  # tokens of the example, and those at its end that carry loss
RANK = 20
GIB = 2**30
SIZES: dict[str, dict[str, Any]] = {  # 0.45 B parameters; a small one to try the script itself
    "0.45b": {"hidden_size": 1024, "intermediate_size": 3840, "num_hidden_layers": 24, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000},
}
STOCK_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "zero_allow_untested_optimizer": True,
}


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
    own = ["--folder", str(folder), "--size", args.size, "--steps", str(args.steps)]
    script = [str(Path(__file__).resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *script, "--role", "build", *own], check=True, env=environment)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_cpu.yaml"]
    figures: dict[str, dict[str, Any]] = {}
    for variant in args.variants:
        print(f"{variant} ...", file=sys.stderr, flush=True)
        command = [*launch, *script, "--role", variant, *own]
        # accelerate reads the DeepSpeed JSON relative to the folder that it is started in
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{variant}-*.json"))]
        figures[variant] = merged(ranks)
    model = json.loads((folder / "model.json").read_text())
    print_table(figures, model)
    print(json.dumps({**ratios(figures), "model": model, "variants": figures, "versions": versions()}))


def build(folder: Path, size: str) -> None:
    """Save a random Llama as a bf16 safetensors checkpoint, with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from oneshot.world.model import build_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    heads = SIZES[size]["hidden_size"] // 64
    config = LlamaConfig(
        **SIZES[size], num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "checkpoint")
    build_tokenizer().save_pretrained(folder / "checkpoint")
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "bfloat16", **SIZES[size]}
    (folder / "model.json").write_text(json.dumps({**facts, "tokens": TOKENS, "answer_tokens": ANSWER, "ranks": 2}))


def work(variant: str, folder: Path, steps: int) -> None:
    """Be one process of a variant: load, step, and write what this rank saw."""
    import torch.distributed as dist

    peak = PeakRss()
    run = {"stock": run_stock, "lowrank": run_lowrank, "rollback": run_rollback}[variant]
    times, losses = run(folder / "checkpoint", steps, peak)
    peak.note("step")
    seconds = [after - before for before, after in itertools.pairwise(times)]
    found = {"step_seconds": seconds, "losses": losses, **peak.phases}
    (folder / f"{variant}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads otherwise now and then abort a process that has finished


class PeakRss:
    """Peak resident memory of this process, phase by phase (bytes).

    The kernel's high-water mark is set back at the start of a phase, so that a phase's peak is its own.
    """

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}

    def note(self, phase: str) -> None:
        """End a phase."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.phases[f"{phase}_peak_bytes"] = int(status["VmHWM"].split()[0]) * 1024
        self.phases[f"{phase}_end_bytes"] = int(status["VmRSS"].split()[0]) * 1024
        Path("/proc/self/clear_refs").write_text("5")


def example(vocabulary: int) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) of the one example: random, the loss on its last tokens only."""
    import random

    ids = [random.Random(0).randrange(7, vocabulary) for _ in range(TOKENS)]
    return ids, [-100] * (TOKENS - ANSWER) + ids[-ANSWER:]


def run_stock(checkpoint: Path, steps: int, peak: PeakRss) -> tuple[list[float], list[float]]:
    """AdamW on all weights, as plain accelerate and DeepSpeed do it. Returns (times between steps, losses)."""
    import deepspeed.ops
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers import AutoModelForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled for our variants either
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    plugin = DeepSpeedPlugin(hf_ds_config=STOCK_CONFIG, zero3_init_flag=True)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    peak.note("start")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    peak.note("load")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0))
    model.train()
    ids, labels = (torch.tensor([row]) for row in example(model.module.config.vocab_size))
    times, losses = [time.perf_counter()], []
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        times.append(time.perf_counter())
    return times, losses


def run_lowrank(checkpoint: Path, steps: int, peak: PeakRss) -> tuple[list[float], list[float]]:
    """Factored gradient steps. Returns (times between steps, losses)."""
    from oneshot.distributed.engine import frozen
    from oneshot.patch import lowrank
    from oneshot.patch.linears import select_linears
    from oneshot.patch.trace import Tracer

    runtime, model, batch = prepared(checkpoint, peak)
    times, losses = [time.perf_counter()], []

    def listen(record: dict[str, Any]) -> None:
        losses.append(record["loss"])
        times.append(time.perf_counter())

    linears = select_linears(model).targets
    with frozen(runtime, model) as ready:
        lowrank.solve(
            runtime, ready, linears, batch, Tracer(listen),
            epochs=steps, rank=RANK, guard_weight=0.0,
        )  # fmt: skip
    return times, losses


def run_rollback(checkpoint: Path, steps: int, peak: PeakRss) -> tuple[list[float], list[float]]:
    """Adam on the coefficients of random directions. Returns (times between steps, losses)."""
    import torch

    from oneshot.distributed.engine import frozen
    from oneshot.patch import rollback
    from oneshot.patch.linears import select_linears, shape_of
    from oneshot.patch.trace import Tracer

    runtime, model, batch = prepared(checkpoint, peak)
    linears = select_linears(model).targets
    torch.manual_seed(0)
    directions = {}
    for name, module in linears.items():
        (m, n) = shape_of(module)
        u, v = torch.linalg.qr(torch.randn(m, RANK))[0], torch.linalg.qr(torch.randn(n, RANK))[0]
        directions[name] = rollback.Directions(u, torch.linspace(0.1, 0.01, RANK), v.T.contiguous(), 1.0)
    times, losses = [time.perf_counter()], []

    def listen(record: dict[str, Any]) -> None:
        losses.append(record["loss"])
        times.append(time.perf_counter())

    with frozen(runtime, model) as ready:
        rollback.solve(
            runtime, ready, linears, directions, batch, Tracer(listen),
            epochs=steps, learning_rate=0.1, guard_weight=0.0,
        )  # fmt: skip
    return times, losses


def prepared(checkpoint: Path, peak: PeakRss) -> tuple[Any, Any, Any]:
    """Start, load and encode as ``oneshot/repair.py`` does. Returns (runtime, model, batch)."""
    from oneshot.checkpoint.load import find_source, load_model
    from oneshot.data.encoding import Encoded
    from oneshot.distributed.runtime import start
    from oneshot.patch.guard import build_batch
    from oneshot.settings import ModelSettings

    runtime = start()
    settings = ModelSettings(path=str(checkpoint))
    source = find_source(settings)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    peak.note("start")
    model = load_model(runtime, source, settings)
    peak.note("load")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoded = Encoded(*example(model.config.vocab_size))
    return runtime, model, build_batch(runtime, model, tokenizer, encoded, [], answer_tokens=0)


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what the ranks saw: the slowest rank's time of each step, the largest peak of any rank (bytes)."""
    slowest = [max(rank["step_seconds"][i] for rank in ranks) for i in range(len(ranks[0]["step_seconds"]))]
    timed = slowest[1:]
    phases = ("start", "load", "step")
    peaks = {f"{phase}_peak_bytes": [rank[f"{phase}_peak_bytes"] for rank in ranks] for phase in phases}
    whole = [max(rank[f"{phase}_peak_bytes"] for phase in phases) for rank in ranks]
    return {
        "seconds": statistics.median(timed),
        "seconds_range": [min(timed), max(timed)],
        "step_seconds": slowest,
        "peak_rss_bytes": whole,
        "peak_above_start_bytes": [total - rank["start_end_bytes"] for total, rank in zip(whole, ranks)],
        "step_above_start_bytes": [rank["step_peak_bytes"] - rank["start_end_bytes"] for rank in ranks],
        **peaks,
        "losses": ranks[0]["losses"],
    }


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return stock over ours, of median seconds and of the worst rank's peaks."""
    found: dict[str, float] = {}
    if "stock" not in figures:
        return found
    stock = figures["stock"]
    for variant, prefix in (("lowrank", ""), ("rollback", "rollback_")):
        if variant in figures:
            own = figures[variant]
            found[f"{prefix}step_speedup"] = stock["seconds"] / own["seconds"]
            for key, source in (
                ("peak_memory_ratio", "peak_rss_bytes"),
                ("peak_above_start_ratio", "peak_above_start_bytes"),
                ("step_phase_peak_ratio", "step_peak_bytes"),
                ("step_phase_above_start_ratio", "step_above_start_bytes"),
            ):
                found[f"{prefix}{key}"] = max(stock[source]) / max(own[source])
    return {key: round(value, 3) for key, value in found.items()}


def print_table(figures: dict[str, dict[str, Any]], model: dict[str, Any]) -> None:
    """Print the comparison for people."""
    size = model["parameters"] / 1e9
    print(f"Random Llama, {size:.3f} B parameters, bf16, 2 CPU ranks under ZeRO-3, {TOKENS} tokens on each, one thread")
    print("Peaks are of the worse rank. Start: after imports. Load: transformers' from_pretrained, the same for all.")
    print(f"{'':10}{'s / step':>10}{'(range)':>16}{'peak GiB':>10}{'start':>8}{'load':>8}{'step':>8}{'- start':>9}")
    for name, row in figures.items():
        low, high = row["seconds_range"]
        keys = ("peak_rss_bytes", "start_peak_bytes", "load_peak_bytes", "step_peak_bytes", "peak_above_start_bytes")
        total, start, load, step, above = (max(row[key]) / GIB for key in keys)
        print(
            f"{name:10}{row['seconds']:>10.2f}{f'({low:.2f}-{high:.2f})':>16}{total:>10.2f}{start:>8.2f}{load:>8.2f}"
            f"{step:>8.2f}{above:>9.2f}"
        )
    for key, value in ratios(figures).items():
        print(f"{key:36} {value:.2f}")


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "deepspeed")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
