"""Merging a LoRA into a checkpoint: streamed (``oneshot export``), against PEFT's merge in memory, in one run.

    python benchmarks/merge.py

A random 1.1 B Llama in bf16 and a rank-16 adapter on all its linear layers, one CPU process of one thread. Every
measurement runs in a fresh process; the files are read once before, so that both find the page cache alike. "peft" is
from_pretrained, merge_and_unload and save_pretrained; it does not wait for the disk, as oneshot does before the folder
appears (and oneshot writes checksums), so that its time with a sync of its files at the end is shown, too. Peaks are
resident memory above what the process had after its imports. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
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

from random_llama import SHAPES, write_random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SIZES = {name: SHAPES[name] for name in ("1.1b", "tiny")}
WAYS = ("peft", "ours")


def main() -> None:
    """Run every measurement and print the comparison; or, started by ourselves, be the process of one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--repeats", type=int, default=3, help="fresh starts per measurement; medians are shown")
    parser.add_argument("--role", choices=("compare", "build", *WAYS), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "build":
        build(args.folder, args.size)
    elif args.role == "compare":
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), args)
    else:
        found = (merge_with_peft if args.role == "peft" else merge_with_oneshot)(args.folder)
        (args.folder / "found.json").write_text(json.dumps(found))


def build(folder: Path, size: str) -> None:
    """Write the random checkpoint, in shards of 500 MB, with the toy world's tokenizer, and the random adapter."""
    from peft import LoraConfig, get_peft_model

    model = write_random_llama(folder / "model", SIZES[size])
    wrapped: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.01)
    wrapped.save_pretrained(str(folder / "adapter"))


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Measure both ways in turn, print a table and the JSON line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(Path(__file__).resolve()), f"--folder={folder}", f"--size={args.size}"]

    def run(role: str) -> None:
        subprocess.run([*script, f"--role={role}"], check=True, env=environment, stdout=sys.stderr)

    run("build")
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            for path in (folder / "model").glob("*.safetensors"):
                path.read_bytes()  # into the page cache
            run(way)
            runs[way].append(json.loads((folder / "found.json").read_text()))
            shutil.rmtree(folder / way)
            os.sync()  # what one way left to be written is not to slow the next down
    rows = {way: {key: statistics.median(row[key] for row in found) for key in found[0]} for way, found in runs.items()}
    total = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    print(f"checkpoint {total / 1e9:.2f} GB, adapter of rank 16; medians of {args.repeats}")
    for way, row in rows.items():
        peak = row["peak"] / 2**20
        print(f"{way:5} {row['seconds']:7.2f} s, on disk after {row['synced']:7.2f} s, peak {peak:7.0f} MiB")
    peft, ours = rows["peft"], rows["ours"]
    figures = {
        "merge_speedup": peft["seconds"] / ours["seconds"],
        "merge_speedup_on_disk": peft["synced"] / ours["synced"],
        "peak_ratio": ours["peak"] / peft["peak"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def merge_with_peft(folder: Path) -> dict[str, float]:
    """Merge in memory, as PEFT's documentation does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from oneshot.distributed.resources import peak_bytes, reset_peak

    before, clock = reset_peak(), time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(folder / "peft")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "peft")
    seconds, peak = time.perf_counter() - clock, peak_bytes() - before
    for path in (folder / "peft").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": seconds, "synced": time.perf_counter() - clock, "peak": peak}


def merge_with_oneshot(folder: Path) -> dict[str, float]:
    """Merge as ``oneshot export`` does."""
    import peft  # noqa: F401  imports are no part of what is measured
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    export = importlib.import_module("oneshot.export")
    from oneshot.checkpoint.loading import architecture  # noqa: F401
    from oneshot.checkpoint.merging import exports, merge  # noqa: F401
    from oneshot.distributed.resources import peak_bytes, reset_peak
    from oneshot.distributed.runtime import start
    from oneshot.report import card  # noqa: F401

    start()
    before, clock = reset_peak(), time.perf_counter()
    export.run(["--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--out", str(folder / "ours")])
    seconds, peak = time.perf_counter() - clock, peak_bytes() - before
    return {"seconds": seconds, "synced": seconds, "peak": peak}


if __name__ == "__main__":
    main()
