"""Loading a model in 4 bits for ZeRO-3: quantized while it is read and already sharded, against the stock way.

    python benchmarks/nf4_load.py

A random 1.1 B Llama stored in bf16, 2 CPU processes of one thread each, every measurement in fresh processes, the files
in the page cache. "stock" is transformers' from_pretrained with BitsAndBytesConfig (nf4, double quantization as given)
on every rank, then DeepSpeed's partitioning: the way in which QLoRA and ZeRO-3 are combined today. Seconds and peaks
are up to where every rank holds its share; peaks are resident memory above what the process had after imports and
process group. "share" is a rank's part of the packed weights, its copy of the scales, and its part of what stays in
bf16. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
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

from random_llama import SHAPES, computed_in, write_random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SIZES = {name: SHAPES[name] for name in ("1.1b", "tiny")}


def main() -> None:
    """Run every measurement and print the comparison; or, started by ourselves, be one process of one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--repeats", type=int, default=3, help="fresh starts per measurement; medians are shown")
    parser.add_argument("--double_quant", action="store_true", help="quantize the scales too")
    parser.add_argument("--way", choices=("build", "stock", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way == "build":
        build(args.folder, args.size)
    elif args.way:
        work(args.folder, args.way, args.double_quant)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), args)


def build(folder: Path, size: str) -> None:
    """Write the random checkpoint, in shards of 500 MB, with the toy world's tokenizer."""
    write_random_llama(folder / "model", SIZES[size])
    (folder / "dtype").write_text(computed_in(folder / "model"))


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Measure both, print a table and the JSON line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    script = [str(Path(__file__).resolve()), f"--folder={folder}", f"--size={args.size}"]
    script += ["--double_quant"] if args.double_quant else []
    subprocess.run([sys.executable, *script, "--way=build"], check=True, env=environment, stdout=sys.stderr)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_nf4_cpu.yaml"]
    found: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    for _ in range(args.repeats):
        for way in found:  # in turn, so that both meet the same machine
            for path in (folder / "model").glob("*.safetensors"):
                path.read_bytes()  # into the page cache
            command = [*launch, *script, f"--way={way}"]
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)
            ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
            found[way].append({name: max(rank[name] for rank in ranks) for name in ranks[0]})
    medians = {way: {name: statistics.median(r[name] for r in rows) for name in rows[0]} for way, rows in found.items()}
    stock, ours = medians["stock"], medians["ours"]
    dtype = (folder / "dtype").read_text()
    kind = "double" if args.double_quant else "single"
    print(f"{args.size} Llama, computed in {dtype}, 2 ranks, {kind} quantization; medians")
    for way, row in medians.items():
        print(f"{way:6} {row['seconds']:7.2f} s   peak above start {row['peak'] / 2**20:7.0f} MiB   "
              f"held {row['held'] / 2**20:7.0f} MiB   share {row['share'] / 2**20:7.0f} MiB")  # fmt: skip
    figures = {
        "load_speedup": stock["seconds"] / ours["seconds"],
        "peak_ratio": ours["peak"] / stock["peak"],
        "peak_over_share": ours["peak"] / ours["share"],
    }
    print(json.dumps({**{name: round(value, 3) for name, value in figures.items()}, "dtype": dtype}))


def work(folder: Path, way: str, double: bool) -> None:
    """Load as one process of a launch; leave seconds and peaks in a file."""
    import bitsandbytes  # noqa: F401  imports are no part of what is measured
    import deepspeed  # noqa: F401
    import torch.distributed as dist
    from transformers import BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401

    from oneshot.checkpoint.loading.load import find_source, load_model
    from oneshot.distributed.resources import peak_bytes, reset_peak, resident_bytes
    from oneshot.distributed.runtime import barrier, start
    from oneshot.settings import ModelSettings

    runtime = start()
    settings = ModelSettings(path=str(folder / "model"), quantize="nf4", double_quant=double)
    source = find_source(settings, runtime)
    before = reset_peak()
    barrier(runtime)
    clock = time.perf_counter()
    if way == "ours":
        model = load_model(runtime, source, settings)
    else:
        model = stock(runtime, folder / "model", source.dtype, double)
    barrier(runtime)
    seconds, peak, held = time.perf_counter() - clock, peak_bytes() - before, resident_bytes() - before
    share = sum(p.ds_tensor.nbytes for p in model.parameters())
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            share += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    found = {"seconds": seconds, "peak": peak, "held": held, "share": share}
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    dist.barrier()


def stock(runtime: Any, folder: Path, dtype: Any, double: bool) -> Any:
    """transformers quantizes the whole model on every rank; DeepSpeed then splits it."""
    import deepspeed
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from oneshot.distributed.deepspeed_config import deepspeed_config

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    model.requires_grad_(False)
    return deepspeed.initialize(model=model, config=deepspeed_config(runtime, dtype=dtype))[0].module


if __name__ == "__main__":
    main()
