"""What ``oneshot spectrum`` and ``oneshot plan`` look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oneshot.settings.checks import check_fields
from oneshot.settings.kinds import CountInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class SpectrumSettings:
    """What ``oneshot spectrum`` measures of the example's gradient, beside its singular values.

    Args:
        rank: leading directions compared with those of other safety examples; none: 20, or as many as there are
        samples: how many conversations are compared, of each kind (safety, harmful, task, guard); 0 for none
        batch_size: conversations in one pass, per rank
        sweep: also patch the model with the gradient cut to several ranks, at several step sizes (nothing is written)
        ranks: ranks of the sweep; none: 1, 2, 4, 8, 20 and the gradient's own
        alphas: step sizes of the sweep: 1 would bring the example's loss to 0, were the loss linear in the weights
    """

    rank: PositiveInt | None = None
    samples: CountInt = 16
    batch_size: PositiveInt = 8
    sweep: bool = False
    ranks: list[PositiveInt] | None = None
    alphas: list[PositiveFloat] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0])

    def __post_init__(self) -> None:
        check_fields(self, "spectrum")


@dataclass(frozen=True)
class PlanSettings:
    """What ``oneshot plan`` reckons with; every run is checked against its own devices before it loads.

    Args:
        force: start a run that cannot fit by the estimate
        stage: what is planned: the repair, or the fine-tune (methods sft and lora)
        sharding: plan this one only; none plans all
        gpus: how many GPUs there are, over all machines
        gpus_per_node: GPUs of a machine
        gpu_memory: memory of one GPU, such as 80GB or 24GiB
        host_memory: memory of one machine, such as 1TB
        disk: read rate of a machine, per second
        network: rate at which a GPU gathers weights from the others, per second
        compute: what a GPU computes, in TFLOP/s that are really reached
        tokens: length of the example, or of the longest conversation in a batch
        json: print JSON in place of the table
    """

    force: bool = False
    stage: Literal["repair", "finetune"] = "repair"
    sharding: Literal["none", "zero2", "zero3", "zero3 offload"] | None = None
    gpus: PositiveInt = 8
    gpus_per_node: PositiveInt = 8
    gpu_memory: str = "80GB"
    host_memory: str = "1TB"
    disk: str = "2GB"
    network: str = "50GB"
    compute: PositiveFloat = 300.0
    tokens: PositiveInt = 256
    json: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "plan")
