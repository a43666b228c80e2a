"""Loading and saving a checkpoint under ZeRO-3: every rank its own bytes, against the stock way, in one run.

    python benchmarks/sharded_checkpoint.py

A random 1.1 B Llama stored in bf16 (for the training state, 7 times as large, a 0.45 B one), loaded in what
--model.dtype auto takes on this CPU; CPU processes of one thread each. Every measurement runs in fresh processes; the
files are read once before, so that all find the page cache alike. "stock" is transformers' from_pretrained under
ZeRO-3; for saving, DeepSpeed's consolidation on rank 0 followed by save_pretrained, as accelerate does it; for the
training state, DeepSpeed's save_checkpoint, which accelerate's save_state calls. The last line of output is one JSON
object. Peaks are resident memory above what the process had after imports and process group.

"cold" is the load of a whole model by one process, from files of which nothing is in the page cache, against plain
sequential reading (like dd; as fast as the faster of through and past the cache), safetensors, transformers and, where
it is installed, fastsafetensors. "slow" is the same through a file system of FUSE on which each request takes
10 ms and all share 400 MB/s; it needs FUSE (Debian: fuse3) and mfusepy. As root the caches below it are emptied too.

What each waits for: ours reads a checkpoint that has no checksums (the stock stack wrote it). Our save of a model ends
when the files are on the disk, the stock one when they are in the page cache. Both saves of a training state end when
the files are in the page cache; ours has computed checksums, and syncs behind the training that goes on. "on disk" is
when that, or for the stock way a sync of the system, has ended; a next save of ours that comes sooner waits for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

from random_llama import SHAPES as SIZES  # noqa: E402
from random_llama import computed_in, write_random_llama  # noqa: E402
from storage.ways import empty_cache, installed, slow_files, timed  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run every measurement and print the comparison; or, started by ourselves, be one process of one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--only", choices=("load", "save", "state", "storage"), help="measure nothing else")
    parser.add_argument("--slow-seconds", type=float, default=0.01, help="of a request to the slow file system")
    parser.add_argument("--slow-rate", type=float, default=4e8, help="bytes per second of the slow file system")
    parser.add_argument("--repeats", type=int, default=3, help="fresh starts per measurement; medians are shown")
    parser.add_argument(
        "--role",
        choices=("compare", "build", "load", "save", "state", "storage"),
        default="compare",
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "build":
        build(args.folder, args.size)
    elif args.role == "storage":
        print(timed(args.way, args.folder))
    elif args.role in ("load", "save", "state"):
        work(args.folder, args.role, args.way)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), args)


def build(folder: Path, size: str) -> None:
    """Write the random checkpoint, in shards of 500 MB, with the toy world's tokenizer."""
    write_random_llama(folder / "model", SIZES[size])
    (folder / "dtype").write_text(computed_in(folder / "model"))


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Measure everything, print a table and the JSON line."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": paths}
    script = [str(Path(__file__).resolve()), f"--folder={folder}", f"--size={args.size}"]
    subprocess.run([sys.executable, *script, "--role=build"], check=True, env=environment, stdout=sys.stderr)
    total = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))

    def run(role: str, way: str, ranks: int) -> dict[str, float]:
        found = []
        for _ in range(args.repeats):
            for path in (folder / "model").glob("*.safetensors"):
                path.read_bytes()  # into the page cache
            os.sync()  # or the disk would still be busy with what was written before
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_cpu.yaml"]
            command = [*launch, "--num_processes", str(ranks), *script, f"--role={role}", f"--way={way}"]
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)
            files = sorted(folder.glob("rank-*.json"))
            ranked = [json.loads(file.read_text()) for file in files]
            worst = {name: max(rank[name] for rank in ranked) for name in ("seconds", "peak", "growth", "on_disk")}
            found.append({**worst, "peak0": ranked[0]["peak"]})
            for file in files:
                file.unlink()
        return {key: statistics.median(row[key] for row in found) for key in found[0]}

    figures = storage(folder / "model", args, script[0], environment) if args.only in (None, "storage") else {}
    if args.only == "storage":
        print(json.dumps(figures))
        return
    roles = [role for role in ("load", "save") if args.only in (None, role)]
    rows = {(role, way): run(role, way, 2) for role in roles for way in ("stock", "ours")}
    by_ranks = {ranks: run("load", "ours", ranks)["seconds"] for ranks in (1, 2, 4) if "load" in roles}
    if args.only in ("load", "save"):
        return report(rows, by_ranks, total, figures, (folder / "dtype").read_text())
    if args.size == "1.1b":  # its masters, moments and gradients would not fit into a small machine's memory
        shutil.rmtree(folder / "model")
        small = [argument.replace("1.1b", "0.45b") for argument in script]
        subprocess.run([sys.executable, *small, "--role=build"], check=True, env=environment, stdout=sys.stderr)
    rows |= {("state", way): run("state", way, 2) for way in ("stock", "ours", "bf16")}
    return report(rows, by_ranks, total, figures, (folder / "dtype").read_text())


def storage(model: Path, args: argparse.Namespace, script: str, environment: dict[str, str]) -> dict[str, float]:
    """Load from files that are not in the page cache, where they are and through a slow file system, in every way."""
    figures: dict[str, float] = {}
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    ways = installed()
    with slow_files(model, args.slow_seconds, args.slow_rate) as slow:
        for name, folder in {"": model, "_slow": slow}.items():
            if folder is None:
                print("slow file system: left out, as FUSE or mfusepy is missing")
                continue
            found: dict[str, list[float]] = {way: [] for way in ways}
            for way in ways * args.repeats:
                empty_cache(model)
                command = [sys.executable, script, f"--folder={folder}", "--role=storage", f"--way={way}"]
                ran = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr)
                found[way].append(float(ran.stdout.split()[-1]))
            seconds = {way: statistics.median(values) for way, values in found.items()}
            for way in ways:
                print(f"cold{name} {way:16} {seconds[way]:7.2f} s   {total / seconds[way] / 1e9:6.3f} GB/s")
            best = min(seconds["plain"], seconds["plain, direct"])
            figures[f"load_over_storage{name}"] = round(best / seconds["oneshot"], 3)
            for way in [way for way in ways if "plain" not in way and way != "oneshot"]:
                figures[f"load_over_{way}{name}"] = round(seconds[way] / seconds["oneshot"], 3)
    return figures


def report(
    rows: dict[tuple[str, str], dict[str, float]],
    by_ranks: dict[int, float],
    total: int,
    figures: dict[str, float],
    dtype: str,
) -> None:
    """Print the table and, last, the JSON line."""
    print(f"checkpoint {total / 1e9:.2f} GB, loaded in {dtype}, 2 ranks; medians")
    for (role, way), row in rows.items():
        peak = row["peak"] if role == "load" else row["growth"]
        print(f"{role:5} {way:6} {row['seconds']:7.2f} s   peak above {'start' if role == 'load' else 'before'} "
              f"{peak / 2**20:8.0f} MiB   rank 0 {row['peak0'] / 2**20:8.0f} MiB"
              + (f"   on disk {row['on_disk']:7.2f} s" if role == "state" else ""))  # fmt: skip
    if ("load", "ours") in rows:
        print("load by ranks: " + ", ".join(f"{ranks}: {seconds:.2f} s" for ranks, seconds in by_ranks.items()))
        stock, ours = rows["load", "stock"], rows["load", "ours"]
        figures["load_speedup"] = stock["seconds"] / ours["seconds"]
        figures["load_peak_ratio_rank0"] = ours["peak0"] / stock["peak0"]
        figures["load_peak_over_shard"] = ours["peak"] / (total / 2)
    if ("save", "ours") in rows:
        figures["save_speedup"] = rows["save", "stock"]["seconds"] / rows["save", "ours"]["seconds"]
        figures["save_peak_growth_bytes"] = rows["save", "ours"]["growth"]
    if ("state", "ours") in rows:
        figures["state_save_speedup"] = rows["state", "stock"]["seconds"] / rows["state", "ours"]["seconds"]
        figures["state_save_speedup_bf16"] = rows["state", "ours"]["seconds"] / rows["state", "bf16"]["seconds"]
        figures["state_on_disk_speedup_bf16"] = rows["state", "ours"]["on_disk"] / rows["state", "bf16"]["on_disk"]
        figures["state_peak_growth_bytes"] = rows["state", "ours"]["growth"]
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({**rounded, "load_seconds_by_ranks": by_ranks, "dtype": dtype}))


def work(folder: Path, role: str, way: str) -> None:
    """Load, or load and save, as one process of a launch; leave seconds and peaks in a file."""
    import deepspeed  # noqa: F401  imports are no part of what is measured
    import torch.distributed as dist
    from transformers import GenerationConfig, LlamaForCausalLM  # noqa: F401

    from oneshot.checkpoint.loading.load import find_source, load_model, load_tokenizer
    from oneshot.checkpoint.writing.save import save_checkpoint
    from oneshot.distributed.resources import peak_bytes, reset_peak
    from oneshot.distributed.runtime import barrier, start
    from oneshot.settings import ModelSettings

    runtime = start()
    settings = ModelSettings(path=str(folder / "model"), stock_io=way == "stock" and role == "load")
    source = find_source(settings, runtime)
    before = reset_peak()
    barrier(runtime)
    clock = time.perf_counter()
    model = load_model(runtime, source, settings)
    barrier(runtime)
    seconds, after = time.perf_counter() - clock, peak_bytes()
    found = {"seconds": seconds, "peak": after - before, "growth": 0, "on_disk": seconds}
    if role == "state":
        found = save_state_once(runtime, model, folder, way)
    elif role == "save":
        tokenizer = load_tokenizer(source, settings)
        engine = _engine(runtime, model) if way == "stock" else None
        barrier(runtime)
        before, clock = reset_peak(), time.perf_counter()
        if engine is None:
            save_checkpoint(runtime, model, tokenizer, folder / "saved", source.written)
        else:
            state = engine._zero3_consolidated_16bit_state_dict()
            if runtime.is_main:
                model.save_pretrained(folder / "saved", state_dict=state)
                tokenizer.save_pretrained(folder / "saved")
        barrier(runtime)
        growth = peak_bytes() - before
        seconds = time.perf_counter() - clock
        found = {"seconds": seconds, "peak": growth, "growth": growth, "on_disk": seconds}
        if runtime.is_main:
            shutil.rmtree(folder / "saved")
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    dist.barrier()


def save_state_once(runtime: Any, model: Any, folder: Path, way: str) -> dict[str, float]:
    """Save the training state of full fine-tuning once; returns seconds and the peak's growth."""
    from oneshot.checkpoint.writing.state import States
    from oneshot.distributed.engine import start_training
    from oneshot.distributed.optimizer_state import allocate
    from oneshot.distributed.resources import peak_bytes, reset_peak
    from oneshot.distributed.runtime import barrier

    model.requires_grad_(True)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    allocate(engine)
    states = States(runtime, folder / "state", keep=1, moments="bf16" if way == "bf16" else "fp32")
    barrier(runtime)
    before, clock = reset_peak(), time.perf_counter()
    if way == "stock":
        engine.forward.save_checkpoint(str(folder / "state"))
    else:
        states.save(engine, 1)
    barrier(runtime)
    found = {"seconds": time.perf_counter() - clock, "peak": 0, "growth": peak_bytes() - before}
    if way == "stock" and runtime.is_main:
        os.sync()
    states.finish()
    found["on_disk"] = time.perf_counter() - clock
    if runtime.is_main:
        shutil.rmtree(folder / "state")
    return found


def _engine(runtime: Any, model: Any) -> Any:
    import deepspeed

    from oneshot.distributed.deepspeed_config import deepspeed_config

    model.requires_grad_(False)
    return deepspeed.initialize(model=model, config=deepspeed_config(runtime, dtype=next(model.parameters()).dtype))[0]


if __name__ == "__main__":
    main()
