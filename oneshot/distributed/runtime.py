"""Ranks and collectives. A ``Runtime`` says who we are; everything else takes it as an argument."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from oneshot.distributed import instructions
from oneshot.distributed.phases import phase
from oneshot.errors import DiskFull, UserError
from oneshot.whole import disk_full, is_full

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Sharding = Literal["none", "ddp", "zero2", "zero3"]
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """This process's place in the run.

    Attributes:
        rank: global rank, 0 on one process
        world_size: number of processes
        device: where this rank computes
        sharding: none (one process), ddp, zero2 or zero3, as the accelerate YAML chose
        accelerator: accelerate's object; the training loop prepares engines with it
        emulated: 16-bit float dtypes, by name, for which the CPU of some rank has no instructions; none on GPUs
    """

    rank: int
    world_size: int
    device: torch.device
    sharding: Sharding
    accelerator: Accelerator
    emulated: frozenset[str] = frozenset()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@functools.cache
@phase("start")
def start(timeout_minutes: float | None = None) -> Runtime:
    """Join the run that accelerate or torchrun started; with no launcher, be the only process.

    A process joins once: called again, this returns the same object (accelerate refuses a second DeepSpeed plugin).
    On a machine without an accelerator accelerate would leave DeepSpeed runs with no backend and believe that each
    process is alone, so gloo is named here.

    Args:
        timeout_minutes: how long a rank waits for the others before it ends the run; none takes the environment's
            ``ONESHOT_TIMEOUT_MINUTES``, or 30

    Raises:
        UserError: ``ONESHOT_TIMEOUT_MINUTES`` is no number above 0
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    _quiet()
    launched = "RANK" in os.environ  # a backend named without a launcher would make accelerate wait for a group
    backend = "gloo" if launched and not torch.cuda.is_available() else None
    kwargs = InitProcessGroupKwargs(backend=backend, timeout=_timeout(timeout_minutes))
    plugin = _deepspeed_plugin()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available() and plugin is None,
        kwargs_handlers=[kwargs],
        deepspeed_plugin=plugin,
    )
    if backend == "gloo":
        atexit.register(_leave)
    sharding: Sharding = "none"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # accelerate sets it, and every model built from now on would be partitioned
        sharding = "zero3" if accelerator.deepspeed_plugin.zero_stage == 3 else "zero2"
    elif accelerator.num_processes > 1:
        sharding = "ddp"
    runtime = Runtime(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        sharding=sharding,
        accelerator=accelerator,
    )
    return dataclasses.replace(runtime, emulated=emulated_anywhere(runtime))


def emulated_anywhere(runtime: Runtime) -> frozenset[str]:
    """Return the 16-bit float dtypes that the CPU of any rank lacks instructions for; none on GPUs. Collective."""
    if runtime.device.type != "cpu":
        return frozenset()
    return frozenset(name for names in gather_objects(runtime, sorted(instructions.emulated())) for name in names)


def all_reduce_sum(runtime: Runtime, tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``tensor`` over ranks (same shape and dtype); the input is left alone."""
    total = tensor.clone()
    if runtime.world_size > 1:
        import torch.distributed as dist

        dist.all_reduce(total)
    return total


def broadcast(runtime: Runtime, tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Fill ``tensor`` on every rank with rank ``source``'s values, in place, and return it."""
    if runtime.world_size > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, source)
    return tensor


def gather_rows(runtime: Runtime, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, in rank order: (n_r, d) on rank r becomes (sum n_r, d) on each."""
    if runtime.world_size == 1:
        return rows
    counts = all_gather_int(runtime, rows.shape[0])
    return gather_parts(runtime, rows.flatten(), [count * rows.shape[1] for count in counts]).view(-1, rows.shape[1])


def gather_parts(runtime: Runtime, part: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return the parts of all ranks, in rank order: (counts[r],) on rank r becomes (sum of counts,) on each."""
    if runtime.world_size == 1:
        return part
    import torch
    import torch.distributed as dist

    padded = part.new_zeros(max(counts))
    padded[: len(part)] = part
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([found[:count] for found, count in zip(gathered, counts)])


def exchange(runtime: Runtime, shares: Sequence[torch.Tensor]) -> None:
    """Fill every rank's share (contiguous) with what that rank has in it: one broadcast each.

    On gloo seven times as fast as an all-gather, and shares need not be of one size.
    """
    import torch

    for rank, share in enumerate(shares):
        if share.numel():
            broadcast(runtime, share.view(torch.uint8), rank)  # bytes: no backend lacks this dtype


def all_gather_int(runtime: Runtime, value: int) -> list[int]:
    """Return every rank's integer, in rank order."""
    import torch

    mine = torch.zeros(runtime.world_size, dtype=torch.int64, device=runtime.device)
    mine[runtime.rank] = value
    return [int(v) for v in all_reduce_sum(runtime, mine)]


def gather_objects(runtime: Runtime, value: T) -> list[T]:
    """Return every rank's JSON-like value, in rank order, on every rank.

    Values travel between processes of one run only; nothing that comes from a file is unpickled.
    """
    if runtime.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(values, value)
    return values


def barrier(runtime: Runtime) -> None:
    """Wait until every rank is here."""
    if runtime.world_size > 1:
        import torch.distributed as dist

        dist.barrier()


@contextlib.contextmanager
def agree(runtime: Runtime, what: str) -> Iterator[None]:
    """Run the block on every rank, then let all know whether it worked everywhere. Collective.

    Raises:
        UserError: on every rank alike if the block failed on any of them with an OSError or UserError, naming the
            first rank and its error; other exceptions are left to end the run
    """
    problem, where = ("", 0), f"{what} failed on rank {runtime.rank}: "
    try:
        yield
    except OSError as error:
        problem = (f"{where}{error.strerror or error} ({error.filename or 'no file'})", UserError.code)
        if is_full(error) and error.filename:
            problem = (f"{where}{disk_full(Path(error.filename))}", DiskFull.code)
    except UserError as error:
        problem = (str(error), error.code)
    problems = [(text, code) for text, code in gather_objects(runtime, problem) if text]
    if problems:
        text, code = problems[0]
        raise DiskFull(text) if code == DiskFull.code else UserError(text)


def _timeout(minutes: float | None) -> timedelta:
    text = os.environ.get("ONESHOT_TIMEOUT_MINUTES", "30")
    try:
        limit = timedelta(minutes=float(text) if minutes is None else minutes)
    except (ValueError, OverflowError):  # not a number; NaN; infinity
        limit = timedelta(0)
    if limit <= timedelta(0):
        raise UserError(f"ONESHOT_TIMEOUT_MINUTES is {text!r}: give a number of minutes above 0.")
    return limit


def _deepspeed_plugin() -> Any:
    """Return the plugin that the launcher's environment asks for; engine.py fills in its "auto" values."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    from accelerate.utils import DeepSpeedPlugin

    if not _has_cuda():
        # DeepSpeed would compile an inference kernel at its first start (half a minute, needs a compiler and ninja)
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # zero3_init_flag would partition every model built from now on; engine.partitioned_loading does it where wanted
    return DeepSpeedPlugin(zero3_init_flag=False)


def _leave() -> None:
    """Close the process group at exit: gloo's threads otherwise now and then abort a process that has finished."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _quiet() -> None:
    """Keep the libraries' chatter out of the terminal; warnings that matter are said by us."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not _has_cuda() else "cuda")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # misses an optional kernel, and says so to people who use no 4-bit weights
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # of a marker's card, which PEFT adds to
    warnings.filterwarnings("ignore", category=FutureWarning)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
