"""Which model, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oneshot.errors import UserError
from oneshot.settings.checks import check_fields, refuse_blank
from oneshot.settings.kinds import PositiveInt


@dataclass(frozen=True)
class ModelSettings:
    """The model to work on.

    Args:
        path: folder of a checkpoint or of a PEFT adapter, or a Hub id; none means the toy world
        paths: a pattern of adapter folders of one base, such as 'adapters/*': oneshot repair repairs them one after the
            other and loads the base once; in place of path
        base: the base model of an adapter folder, where the one named in its config is not to be used
        revision: branch, tag or commit of path, where that is a Hub id; a run's own settings name the commit
        base_revision: the same of an adapter's base; none: as the adapter's config says, else the newest
        dtype: weights and compute; auto takes the checkpoint's own, but computes in fp32 on a CPU without instructions
            for it
        quantize: nf4 quantizes linear weights to 4 bits while they are read (they cannot be trained then)
        double_quant: quantize the scales of 4-bit weights too
        attention: attention implementation, as transformers names it; auto takes flash_attention_2 on a GPU where its
            package is installed, else sdpa
        liger: fine-tune with Liger's fused kernels (a GPU and the package liger-kernel)
        gradient_checkpointing: recompute activations in the backward pass, to save memory
        max_length: longest conversation in tokens; none takes the model's context
        stock_io: load and save checkpoints transformers' own way, rank 0 holding the whole model
        trust_remote_code: run code that comes with the checkpoint
    """

    path: str | None = None
    paths: str | None = None
    base: str | None = None
    revision: str | None = None
    base_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["nf4"] | None = None
    double_quant: bool = False
    attention: str = "sdpa"
    liger: bool = False
    gradient_checkpointing: bool = False
    max_length: PositiveInt | None = None
    stock_io: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.paths is not None and not self.paths.strip():
            raise UserError("Setting model.paths is empty: give a pattern of adapter folders, such as 'adapters/*'.")
        refuse_blank({"model.path": self.path, "model.base": self.base})
        if self.paths is not None and self.path is not None:
            raise UserError("Settings model.path and model.paths are both given: one adapter, or a pattern of many.")
        if self.quantize and self.stock_io:
            raise UserError(
                "Setting model.quantize reads weights by range, which model.stock_io forbids: leave one out."
            )
