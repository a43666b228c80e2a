"""What a plan is made from: the way to run, the batch, DeepSpeed's numbers, and what a kind of device adds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from oneshot.patch.cost import Cost
from oneshot.patch.dealing import ROOM
from oneshot.patch.methods import METHODS
from oneshot.settings import RepairSettings
from oneshot.shipped import ds_configs

Precision = Literal["bf16", "nf4"]
Sharded = Literal["none", "zero2", "zero3", "zero3 offload"]

MIB, GIB = 2**20, 2**30
CHUNK = 16 * MIB  # read, quantized, computed and written at a time
_FILES = {"zero2": "zero2.json", "zero3": "zero3.json", "zero3 offload": "zero3_offload.json"}


@dataclass(frozen=True)
class Device:
    """What a kind of device adds to the tensors themselves.

    Attributes:
        load: bytes for code and communication while weights are loaded (a GPU: CUDA context, NCCL)
        start: the same once it computes (cuBLAS; a CPU: kernels at their first use)
        host: bytes of a process in the machine's own memory before any weight
        mapped: bytes from which on the allocator maps a block by itself, which leaves no hole when it is freed
        holes: share of activations in smaller blocks that the allocator holds beside them, in holes of other sizes
        lora_holes: the same where every layer also leaves the strips and fp32 copies of a LoRA
        pair_holes: the same for factored gradients and updates
        gather_copies: copies of a weight that communication holds while it gathers it
        own_copies: of a rank's share of frozen weights, beside the gathered ones that stay (distributed/persistent.py)
        adam_copies: fp32 copies of the weights that a step of AdamW works in
        tied_copies: copies of a tied embedding's gradient within a backward pass, beside the one that stays
        room: of one pass's activations in a repair's step, or half of the weights if that is more
    """

    load: int
    start: int
    host: int
    mapped: float
    holes: float
    lora_holes: float
    pair_holes: float
    gather_copies: int
    own_copies: int
    adam_copies: int
    tied_copies: int
    room: int


# measured: torch 2.13, glibc with a mapping threshold of 1 MiB, as resources.py sets it; random Llamas of 0.1 to 1.1 B
CPU = Device(
    load=46 * MIB, start=36 * MIB, host=0, mapped=MIB, holes=1.4, lora_holes=2.4, pair_holes=0.7, gather_copies=1,
    own_copies=0, adam_copies=0, tied_copies=0, room=ROOM["cpu"],
)  # fmt: skip
# estimated: not measured on a GPU yet
GPU = Device(
    load=1024 * MIB, start=1536 * MIB, host=3072 * MIB, mapped=math.inf, holes=0.15, lora_holes=0.15, pair_holes=0.15,
    gather_copies=0, own_copies=1, adam_copies=1, tied_copies=2, room=ROOM["cuda"],
)  # fmt: skip


@dataclass(frozen=True)
class Zero:
    """The numbers of a DeepSpeed JSON, in elements; the defaults are DeepSpeed's own."""

    max_live: int = 10**9
    prefetch: int = 5 * 10**7
    reduce_bucket: int = 5 * 10**8
    allgather_bucket: int = 5 * 10**8
    sub_group: int = 10**9
    offload_weights: bool = False
    offload_states: bool = False
    nvme: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> Zero:
        """Read a DeepSpeed configuration; what is "auto" or missing takes DeepSpeed's default."""
        section = config.get("zero_optimization", {})
        keys = {
            "max_live": "stage3_max_live_parameters",
            "prefetch": "stage3_prefetch_bucket_size",
            "reduce_bucket": "reduce_bucket_size",
            "allgather_bucket": "allgather_bucket_size",
            "sub_group": "sub_group_size",
        }
        found = {name: section.get(key) for name, key in keys.items()}
        weights, states = (
            (section.get(key) or {}).get("device", "none") for key in ("offload_param", "offload_optimizer")
        )
        return cls(
            **{name: int(value) for name, value in found.items() if isinstance(value, (int, float))},
            offload_weights=weights != "none",
            offload_states=states != "none",
            nvme="nvme" in (weights, states),
        )


def shipped(sharding: Sharded, precision: Precision = "bf16") -> Zero:
    """Return the numbers of the shipped DeepSpeed JSON, or DeepSpeed's defaults for a sharding that has none."""
    if sharding == "none":
        return Zero()
    name = "zero3_nf4.json" if (sharding, precision) == ("zero3", "nf4") else _FILES[sharding]
    return Zero.of(json.loads((ds_configs() / name).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Work:
    """What one pass of a rank computes on.

    Attributes:
        rows: rows of the batch on this rank, the guard's left out
        tokens: of a row, padding included
        answers: positions that carry the loss
        held: positions of this rank's guard prompts, those of an epoch, that are held
        guard: tokens of these
        total: tokens over all ranks, without padding, whose factored gradients may be kept
        rank: of the updates or the LoRA
        rank_experts: of the updates of fused experts' matrices; 0: none
        reference: positions that logits are kept of: all of this rank's guard prompts that are held
        finetune: the loss is a fine-tune's, which is computed in the memory of its logits
        checkpointing: activations are recomputed
    """

    rows: int
    tokens: int
    answers: int
    held: int = 0
    guard: int = 0
    total: int = 0
    rank: int = RepairSettings.rank
    rank_experts: int = 0
    reference: int = 0
    finetune: bool = False
    checkpointing: bool = False

    @property
    def places(self) -> int:
        """Tokens of a pass on this rank."""
        return self.rows * self.tokens + self.guard


@dataclass(frozen=True)
class Choice:
    """One way to run: the method by name, how weights are held, how they are shared over how many GPUs.

    ``item``: bytes of a number that is computed with, and of a weight that is held so: 2 in bf16 and fp16, 4 in fp32.
    ``stock``: whole weights are read by transformers' own from_pretrained.
    """

    method: str
    precision: Precision = "bf16"
    sharding: Sharded = "zero3"
    gpus: int = 1
    per_node: int = 8
    double_quant: bool = False
    item: int = 2
    stock: bool = False

    @property
    def cost(self) -> Cost:
        """What the method costs; the one place where the planner goes by a method's name."""
        return METHODS[self.method].cost

    @property
    def builds_in_host(self) -> bool:
        """Whether every process reads the whole model into the machine's memory, before a GPU gets it."""
        return self.stock and self.precision == "bf16" and not self.sharding.startswith("zero3")

    @property
    def held_in(self) -> str:
        """What weights are held in, in a word."""
        return "fp32" if self.precision == "bf16" and self.item == 4 else self.precision

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, self.per_node)
