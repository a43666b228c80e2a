"""The factors of a fine-tune's update from two full checkpoints: memory and equality, on one process and on two.

    python benchmarks/rollback_factors.py

Two random 1.1 B Llamas in bf16 that differ by a low-rank update and noise. Every rank streams and decomposes its share
of the matrices; no model is loaded. Peaks are resident memory above what the process had after imports and process
group, given in units of the largest matrix (in bf16, as stored). "factors" is what every rank holds at the end. The
last line of output is one JSON object.
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

from random_llama import SHAPES, random_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "1.1b": SHAPES["1.1b"],
    "tiny": {"hidden_size": 640, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 1000},
}
RANK = 20


def main() -> None:
    """Run on one process and on two, and compare; or, started by ourselves, be one of these processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--repeats", type=int, default=3, help="fresh starts per measurement; medians are shown")
    parser.add_argument("--role", choices=("build", "work"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "build":
        build(args.folder, args.size)
    elif args.role == "work":
        work(args.folder, args.size)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), args)


def build(folder: Path, size: str) -> None:
    """Write the two checkpoints: the second is the first with rank-8 updates and a little noise."""
    import torch

    model = random_llama(SIZES[size])
    model.save_pretrained(folder / "aligned", max_shard_size="500MB")
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                m, n = module.weight.shape
                b, a = torch.randn(m, 8, dtype=torch.bfloat16), torch.randn(8, n, dtype=torch.bfloat16)
                module.weight += 0.01 * (b * torch.tensor([2.0**-i for i in range(8)])).to(b.dtype) @ a
    model.save_pretrained(folder / "finetuned", max_shard_size="500MB")


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Measure, print a table and the JSON line."""
    from safetensors.torch import load_file

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    script = [str(Path(__file__).resolve()), f"--folder={folder}", f"--size={args.size}"]
    subprocess.run([sys.executable, *script, "--role=build"], check=True, env=environment, stdout=sys.stderr)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero3_cpu.yaml"]
    rows: dict[int, dict[str, float]] = {}
    for ranks in (1, 2):
        found = []
        for _ in range(args.repeats):
            command = [*launch, "--num_processes", str(ranks), *script, "--role=work"]
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)
            files = sorted(folder.glob("rank-*.json"))
            ranked = [json.loads(file.read_text()) for file in files]
            found.append({name: max(row[name] for row in ranked) for name in ranked[0]})
            for file in files:
                file.unlink()
        rows[ranks] = {name: statistics.median(row[name] for row in found) for name in found[0]}
        mib = {name: value / 2**20 for name, value in rows[ranks].items()}
        print(f"{ranks} rank(s): {rows[ranks]['seconds']:6.1f} s   peak {mib['peak']:6.0f} MiB   factors "
              f"{mib['factors']:6.0f} MiB   largest matrix {mib['largest']:6.1f} MiB")  # fmt: skip
    one, two = (load_file(folder / f"factors-{ranks}.safetensors") for ranks in (1, 2))
    names = [key.removesuffix(".s") for key in one if key.endswith(".s")]
    values = max(float(((one[f"{n}.s"] - two[f"{n}.s"]).abs() / one[f"{n}.s"]).max()) for n in names)
    update = max(_off(*([part[f"{n}.{k}"] for k in ("u", "s", "vt")] for part in (one, two))) for n in names)
    figures = {
        f"peak_in_matrices_{ranks}": round((row["peak"] - row["factors"]) / row["largest"], 3)
        for ranks, row in rows.items()
    }
    print(json.dumps({**figures, "singular_values_off": values, "update_off": update}))


def _off(one: Any, two: Any) -> float:
    """Relative Frobenius difference of two updates, from their factors."""
    import torch

    u, s, vt = (torch.cat([a, b], dim) for a, b, dim in zip(one, two, (1, 0, 0)))
    s = s * torch.cat([torch.ones_like(one[1]), -torch.ones_like(two[1])])
    difference = ((u.T @ u) * (vt @ vt.T) * s.outer(s)).double().sum()
    return float(difference.clamp(min=0).sqrt() / one[1].double().norm())


def work(folder: Path, size: str) -> None:
    """Decompose as one process of a launch; leave seconds and peaks in a file."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from oneshot.checkpoint.disk.files import list_tensors
    from oneshot.distributed.resources import peak_bytes, reset_peak
    from oneshot.distributed.runtime import barrier, start
    from oneshot.patch.directions import checkpoint_difference, shared_directions

    runtime = start()
    tensors = list_tensors(folder / "finetuned")
    linears = {}
    with torch.device("meta"):
        for name, entry in tensors.items():
            if name.endswith("_proj.weight"):
                linears[name.removesuffix(".weight")] = torch.nn.Linear(entry.shape[1], entry.shape[0], bias=False)
    torch.linalg.svd(torch.randn(64, 64))  # libraries are loaded at the first call
    before = reset_peak()
    barrier(runtime)
    clock = time.perf_counter()
    difference = checkpoint_difference(folder / "finetuned", folder / "aligned", linears)
    directions = shared_directions(runtime, linears, RANK, difference)
    barrier(runtime)
    found = {
        "seconds": time.perf_counter() - clock,
        "peak": peak_bytes() - before,
        "factors": sum(d.u.nbytes + d.s.nbytes + d.vt.nbytes for d in directions.values()),
        "largest": 2 * max(m.in_features * m.out_features for m in linears.values()),
    }
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    if runtime.is_main:
        kept = {
            f"{name}.{key}": getattr(d, key).contiguous() for name, d in directions.items() for key in ("u", "s", "vt")
        }
        save_file(kept, folder / f"factors-{runtime.world_size}.safetensors")
    if runtime.world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    main()
