"""Every way to run a model beside each other: what it takes, whether it fits, and what to change where it does not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import get_args

from oneshot.errors import UserError
from oneshot.patch.methods import METHODS
from oneshot.patch.recipe import AUTO, choose_method
from oneshot.planning.duration import Duration, Rates, duration
from oneshot.planning.facts import GPU, Choice, Precision, Sharded, shipped
from oneshot.planning.memory import Memory, estimate, optimizer_bytes, state_bytes
from oneshot.planning.model import PlannedModel, compared_bytes
from oneshot.planning.shapes import NF4, NF4_DOUBLE, stored_bytes
from oneshot.planning.work import FINETUNE, planned_methods, steps_of, work_of
from oneshot.settings import Settings

_PREFIXES = ((prefix, power) for power, prefix in enumerate("KMGT", 1))
_UNITS = {"B": 1}
_UNITS |= {name: size for p, i in _PREFIXES for name, size in ((f"{p}B", 1000**i), (f"{p}IB", 1024**i))}
_COUNTS = (*range(1, 9), *range(16, 129, 8), *range(160, 513, 32), 1024)  # of GPUs that are tried, beside those given


@dataclass(frozen=True)
class Row:
    """One way to run.

    Attributes:
        impossible: why this cannot be run on any number of GPUs, or empty
        fits: on the GPUs and machines given
        smallest: number of GPUs that it takes, of those that are tried, or none
        advice: what to change, or empty
        result: bytes on disk of what the run writes: a checkpoint (sft) or an adapter
        state: bytes on disk of one training state (fp32 weights and both moments); 0 for none
        optimizer: bytes of fp32 weights, gradients and moments over all GPUs; 0 for none
    """

    choice: Choice
    memory: Memory
    time: Duration
    impossible: str
    fits: bool
    smallest: int | None
    advice: str
    result: int
    state: int
    optimizer: int

    @property
    def method(self) -> str:
        return self.choice.method

    @property
    def precision(self) -> Precision:
        return self.choice.precision

    @property
    def sharding(self) -> Sharded:
        return self.choice.sharding


def bytes_of(text: str, name: str) -> int:
    """Return the bytes that ``80GB`` or ``24GiB`` says; GB are 10^9 bytes, GiB 2^30.

    Raises:
        UserError: no such size
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    try:
        found = float(match.group(1)) * unit if match and unit else 0.0
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UserError(f"Setting {name} is {text!r}, which is no size: write it as 80GB or 24GiB.")
    return int(found)


def rows(settings: Settings, model: PlannedModel) -> list[Row]:
    """Return every method, precision and sharding, planned on the GPUs that the settings give."""
    shardings = [settings.plan.sharding] if settings.plan.sharding else list(get_args(Sharded))
    return [
        row(settings, model, method, precision, sharding)
        for method in planned_methods(settings)
        for precision in get_args(Precision)
        for sharding in shardings
    ]


def row(settings: Settings, model: PlannedModel, method: str, precision: Precision, sharding: Sharded) -> Row:
    """Return one way to run, and how it fits."""
    plan, shape = settings.plan, model.shape
    memory, host = bytes_of(plan.gpu_memory, "plan.gpu_memory"), bytes_of(plan.host_memory, "plan.host_memory")
    zero = shipped(sharding, precision)
    item = {"auto": model.item, "float32": 4}.get(settings.model.dtype, 2)
    packed = model.stored_as in (NF4, NF4_DOUBLE)
    double = model.stored_as == NF4_DOUBLE if packed else settings.model.double_quant
    chosen = Choice(
        method, precision, sharding, plan.gpus, plan.gpus_per_node, double, item, stock=settings.model.stock_io
    )

    def on(gpus: int, recompute: bool = settings.model.gradient_checkpointing) -> Memory:
        work = replace(work_of(settings, method, gpus), checkpointing=recompute)
        return estimate(shape, replace(chosen, gpus=gpus), work, zero, GPU)

    def fit(found: Memory) -> bool:
        return found.peak <= memory and found.host <= host

    impossible = ""
    if precision == "nf4" and METHODS[method].four_bit is None:
        impossible = "4-bit weights cannot be trained"
    elif packed and precision == "bf16":
        impossible = "its files are in 4 bits"
    here, work = on(plan.gpus), work_of(settings, method, plan.gpus)
    smallest = None if impossible else next((gpus for gpus in sorted({*_COUNTS, plan.gpus}) if fit(on(gpus))), None)
    rates = Rates(bytes_of(plan.disk, "plan.disk"), bytes_of(plan.network, "plan.network"), plan.compute * 1e12)
    fits = not impossible and fit(here)
    written = shape.low_rank if work.finetune else shape.written  # a fine-tune's is in the form that PEFT writes
    result = item * shape.parameters if chosen.cost.trains == "weights" else 4 * written(work.rank, work.rank_experts)
    read = stored_bytes(shape, model.stored_as)
    if chosen.cost.decomposes and not model.adapter:
        read += compared_bytes(model)
    time = duration(shape, chosen, work, zero, rates, steps_of(settings, method), read)
    states = state_bytes(shape, chosen, work), optimizer_bytes(shape, chosen, work)
    found = Row(chosen, here, time, impossible, fits, smallest, "", result, *states)
    if fits:
        return found
    recomputed = fit(on(plan.gpus, recompute=True))
    return replace(found, advice=impossible or _advice(found, memory, host, recomputed))


def _advice(found: Row, memory: int, host: int, recomputed: bool) -> str:
    """What to change for this row to fit; the first thing that helps."""
    choice, took = found.choice, found.memory
    if recomputed:
        return "gradient_checkpointing"
    if found.smallest and found.smallest > choice.gpus:
        return f"{found.smallest} GPUs"
    if took.host > host and took.peak <= memory:
        return "host memory: zero3" if choice.sharding in ("none", "zero2") else "host memory: machines"
    if choice.sharding in ("none", "zero2"):
        return "zero3"
    return "fewer tokens" if choice.sharding == "zero3 offload" else "zero3 offload"


def own_rows(settings: Settings, model: PlannedModel, found: list[Row]) -> list[Row]:
    """Return the rows that the settings themselves ask for; all of them where they name no method nor precision."""
    method: str | None = settings.repair.method
    if settings.plan.stage == "finetune":
        method = FINETUNE[settings.finetune.method]
    elif method == AUTO:
        has_update = model.adapter or settings.reference is not None
        method = choose_method(AUTO, has_update=True)[0].name if has_update else None
    packed = model.stored_as in (NF4, NF4_DOUBLE)
    precision = settings.model.quantize or ("nf4" if packed else "bf16" if method else None)
    return [row for row in found if method in (None, row.method) and precision in (None, row.precision)]
