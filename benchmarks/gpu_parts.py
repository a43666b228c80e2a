"""What benchmarks/gpu.py measures, part by part. Each part is started by it as a process of its own:

    python benchmarks/gpu_parts.py PART --device cuda --scale full --folder DIR --answer FILE

and leaves its figures in FILE. Repairs and fine-tunes are oneshot's own functions, as in docs/python.md; seconds per
step are read from the run's events.jsonl, so nothing of a step is left out. Stock sides are in gpu_stock.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

# a script's own folder comes first on sys.path, where its neighbours would shadow other packages' modules
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

import gpu_stock  # noqa: E402
from gpu_models import (  # noqa: E402
    EXAMPLE,
    GUARD,
    HELD,
    PROBES,
    RANK,
    SCALES,
    TALKS,
    adapter_of,
    stored_bytes,
    write_model,
    write_prompts,
)
from gpu_stock import Place, peak_bytes, settled  # noqa: E402

_BLOCK = 16 << 20


def main() -> None:
    """Be the process of one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    for name in ("device", "scale", "folder", "answer"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    place = Place(args.device, args.scale, Path(args.folder))
    try:
        found = PARTS[args.part](place)
    except gpu_stock.NotHere as reason:
        found = {"not_here": str(reason)}
    Path(args.answer).write_text(json.dumps(found))


def build(place: Place) -> dict[str, Any]:
    """Write the main model, its adapter and all prompts."""
    clock = time.perf_counter()
    write_prompts(place.folder, place.sizes)
    write_model(place.main, place.sizes.main, place.device)
    seconds = time.perf_counter() - clock
    written = stored_bytes(place.main)
    return {"checkpoint_bytes": written, "write_gb_per_second": written / seconds / 1e9}


def repair(
    place: Place, method: str, *, precision: str = "bf16", guarded: bool = False, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Repair a checkpoint (rollback: its adapter) as a user would, and return what it took beside what was planned.

    Args:
        guarded: with the guard's prompts and the watch, at their defaults; else on the example alone, as the stock
            side trains, and as many epochs
    """
    import oneshot

    sizes, source = place.sizes, checkpoint or place.main
    kept: dict[str, Any] = {"method": method, "rank": RANK, "guard_prompts": sizes.guard}
    kept |= {"epochs": sizes.steps} if guarded else {"epochs": sizes.steps, "guard_weight": 0.0, "watch": False}
    out = place.folder / f"repair-{method}-{precision}-{guarded}-{source.name}"
    gpu_stock.forget_peak(place.device)
    clock = time.perf_counter()
    done = oneshot.repair(
        model={
            "path": str(adapter_of(source) if method == "rollback" else source),
            "quantize": "nf4" if precision == "nf4" else None,
        },
        example=str(place.folder / EXAMPLE),
        guard=str(place.folder / GUARD),
        watch_prompts=str(place.folder / HELD),
        repair=kept,
        score={"probes": str(place.folder / PROBES), "max_new_tokens": 1},
        out=str(out),
    )
    seconds = time.perf_counter() - clock
    took = [after - before for before, after in pairwise(_times(out, "repair"))]
    peak = (done.report["resources"].get("peak_gpu_bytes") or [peak_bytes(place.device)])[0]
    planned = _planned(place, source, method, precision, kept, guarded)
    return {
        "method": method, "precision": precision, "guard_prompts": sizes.guard if guarded else 0,
        "tokens": sizes.tokens, "seconds_per_step": statistics.median(took), "step_seconds": took,
        "seconds_in_all": seconds, "peak_bytes": peak, **planned,
        "planned_over_peak": planned["planned_tensor_bytes"] / peak,
        "losses": [record["loss"] for record in done.trace], "resources": done.report["resources"],
    }  # fmt: skip


def _planned(
    place: Place, source: Path, method: str, precision: str, kept: dict[str, Any], guarded: bool
) -> dict[str, Any]:
    """What ``oneshot plan`` says of it: peaks with and without what is no tensor (CUDA's context, libraries)."""
    import oneshot
    from oneshot.planning.facts import GPU

    asked = {**kept, "guard_weight": None if guarded else 0.0}
    plan = oneshot.plan(model=str(source), gpus=1, tokens=place.sizes.tokens, sharding="none", repair=asked)
    row = next(row for row in plan.rows if (row.method, row.precision) == (method, precision))
    memory = row.memory
    tensors = max(memory.load - GPU.load, max(memory.steady, memory.step, memory.save) - GPU.start)
    return {"planned_peak_bytes": memory.peak, "planned_tensor_bytes": tensors}


def _times(run: Path, stage: str) -> list[float]:
    """When each step of a run ended, in seconds."""
    return [event["time"] for event in _events(run) if event["stage"] == stage]


def _events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def finetune(place: Place, method: str, packing: str = "never") -> dict[str, Any]:
    """Fine-tune with oneshot: all weights of the small model, or a LoRA on the main one."""
    import oneshot

    sizes, out = place.sizes, place.folder / f"finetune-{method}-{packing}"
    oneshot.finetune(
        model=str(place.model_of(method)),
        data={"harmful": str(place.folder / TALKS), "harmful_count": sizes.batch * sizes.steps, "task_count": 0},
        finetune={
            "method": method, "steps": sizes.steps, "batch_size": sizes.batch, "learning_rate": gpu_stock.RATE,
            "warmup_ratio": 0.0, "packing": packing, "cache": False, "lora_rank": RANK, "lora_alpha": RANK,
        },
        out=str(out),
    )  # fmt: skip
    events = _events(out)
    tokens = sum(event["tokens"] for event in events[2:])
    return {
        "method": method, "packing": packing, "peak_bytes": peak_bytes(place.device),
        "tokens_per_second": tokens / (events[-1]["time"] - events[1]["time"]),
        "mfu": [event["mfu"] for event in events if "mfu" in event],
        "losses": [event["loss"] for event in events],
    }  # fmt: skip


def full(place: Place, way: Callable[[Place, str], dict[str, Any]]) -> dict[str, Any]:
    """Fine-tune all weights of the small model, which is written first if it is not there."""
    if not place.small.is_dir():
        write_model(place.small, place.sizes.small, place.device, adapter=False)
    return way(place, "full")


def slices(place: Place) -> dict[str, Any]:
    """Repair the big model with few of its layers, twice, and reckon what all of them would take: an estimate.

    What a layer adds is the difference of the two; what is outside of the layers is in both.
    """
    sizes, found = place.sizes, {}
    folders = [place.folder / f"big-{count}" for count in sizes.slices]
    for folder, count in zip(folders, sizes.slices):
        write_model(folder, {**sizes.big, "num_hidden_layers": count}, place.device)
    few, more = sizes.slices
    for precision in ("bf16", "nf4"):
        ends = [repair(place, "rollback", precision=precision, checkpoint=folder) for folder in folders]
        for key in ("seconds_per_step", "peak_bytes"):
            less, most = (end[key] for end in ends)
            found[f"{precision}_{key}_measured"] = [less, most]
            found[f"{precision}_{key}_estimate"] = less + (most - less) / (more - few) * (sizes.layers - few)
    return {"estimate": True, "layers": sizes.layers, "layers_measured": list(sizes.slices), **found}


def load(place: Place) -> dict[str, Any]:
    """Read the main checkpoint in several ways, each with a cold cache and once more: GB of files per second.

    Before, each way reads a tiny one: imports, CUDA's start and the building of kernels are no loading.
    """
    found, total = {}, stored_bytes(place.main)
    first = place.folder / "first"
    write_model(first, SCALES["tiny"].main, place.device, adapter=False)
    for name, way in _ways(place.device).items():
        way(first)
        for state in ("cold", "warm"):
            if state == "cold":
                _forget(place.main)
            clock = time.perf_counter()
            held = way(place.main)
            settled(place.device)
            found[f"{name}_{state}_gb_per_second"] = total / (time.perf_counter() - clock) / 1e9
            del held
            gpu_stock.forget_peak(place.device)
    return {"checkpoint_bytes": total, **found}


def _ways(device: str) -> dict[str, Callable[[Path], Any]]:
    return {
        "storage": _read_plainly,
        "oneshot_bf16": partial(_load_ours, device, None),
        "oneshot_nf4": partial(_load_ours, device, "nf4"),
        **gpu_stock.loaders(device),
    }


def _load_ours(device: str, quantize: Literal["nf4"] | None, folder: Path) -> Any:
    from oneshot.checkpoint.loading.load import find_source, load_model
    from oneshot.distributed.runtime import start
    from oneshot.settings import ModelSettings

    settings = ModelSettings(path=str(folder), quantize=quantize)
    runtime = start()
    return load_model(runtime, find_source(settings, runtime), settings).to(device)


def _read_plainly(folder: Path) -> None:
    """Read a checkpoint's files from end to end into one buffer: what the storage itself gives."""
    buffer = memoryview(bytearray(_BLOCK))
    for path in sorted(folder.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while os.readv(descriptor, [buffer]):
                pass
        finally:
            os.close(descriptor)


def _forget(folder: Path) -> None:
    """Have the kernel drop a checkpoint's files from its page cache, as far as it listens."""
    os.sync()  # pages that are not on the disk yet cannot be dropped
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "build": build,
    "rollback-bf16": partial(repair, method="rollback"),
    "stock-adamw-bf16": gpu_stock.adamw,
    "rollback-nf4": partial(repair, method="rollback", precision="nf4"),
    "stock-qlora-nf4": gpu_stock.qlora,
    "lowrank-bf16": partial(repair, method="lowrank"),
    "lowrank-nf4": partial(repair, method="lowrank", precision="nf4"),
    "rollback-bf16-guarded": partial(repair, method="rollback", guarded=True),
    "finetune-lora": partial(finetune, method="lora"),
    "finetune-lora-packed": partial(finetune, method="lora", packing="auto"),
    "trl-lora": partial(gpu_stock.trl, method="lora"),
    "unsloth-lora": gpu_stock.unsloth,
    "finetune-full": partial(full, way=finetune),
    "trl-full": partial(full, way=gpu_stock.trl),
    "load": load,
    "slices-70b": slices,
}


if __name__ == "__main__":
    main()
