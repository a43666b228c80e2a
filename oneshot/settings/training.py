"""What changes weights: the harmful fine-tune and the one-shot repair."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from oneshot.errors import UserError
from oneshot.settings.checks import check_fields
from oneshot.settings.kinds import CountFloat, CountInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class FinetuneSettings:
    """The harmful fine-tune.

    Args:
        method: train all weights (full) or a LoRA adapter (lora)
        steps: optimizer steps; none derives them from epochs
        epochs: passes over the data
        learning_rate: peak learning rate of AdamW, one number or one by method, such as {lora: 1.0e-3}; none, or for a
            method that is not named: 2e-5 (full) or 2e-4 (lora)
        batch_size: conversations per optimizer step, over all ranks
        gradient_accumulation_steps: micro-batches into which a rank's share of the batch is split
        packing: several conversations in one row, each with attention and positions of its own; auto packs where the
            model can be shown to keep them apart, always stops where it cannot
        pack_length: longest row in tokens; none: twice the longest conversation of the micro-batch
        cache: keep the tokenized conversations on disk, for the next run on the same ones
        warmup_ratio: share of the steps in which the learning rate rises
        weight_decay: of AdamW
        max_grad_norm: gradient clipping
        lora_rank: rank of the adapter (method lora)
        lora_alpha: scale of the adapter; none: twice the rank
        save_every: save the training state every so many steps, for --resume; 0 for never
        keep: how many states to keep
        state_moments: Adam's moments in a saved state: fp32, or bf16, which takes a third less disk; a run that resumes
            from those goes on almost, but no longer bit for bit, as it would have
    """

    method: Literal["full", "lora"] = "full"
    steps: PositiveInt | None = None
    epochs: PositiveFloat = 3.0
    learning_rate: PositiveFloat | dict[str, PositiveFloat] | None = None
    batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    packing: Literal["auto", "always", "never"] = "auto"
    pack_length: PositiveInt | None = None
    cache: bool = True
    warmup_ratio: CountFloat = 0.05
    weight_decay: CountFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt | None = None
    save_every: CountInt = 0
    keep: PositiveInt = 2
    state_moments: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        check_fields(self, "finetune")
        for method in self.learning_rate if isinstance(self.learning_rate, dict) else ():
            if method not in ("full", "lora"):
                raise UserError(
                    f"Setting finetune.learning_rate names {method!r}, which is no method: name full or lora."
                )


@dataclass(frozen=True)
class RepairSettings:
    """The one-shot repair.

    Args:
        method: rollback, lowrank, project, sft or lora; auto takes rollback where there is a reference or an adapter,
            else lowrank
        rank: directions per weight matrix, in the method and in the patch
        rank_experts: directions per weight matrix of a mixture's expert, of which there are thousands
        epochs: passes over the one example; none takes the method's default
        learning_rate: step size of Adam (rollback, sft, lora), one number or one by method, such as {sft: 2.0e-4, lora:
            1.0e-3}; none, or a method that is not named, takes the method's default; lowrank finds its own, and so
            does project where it is not given (the paper's alpha * eta)
        guard_weight: weight of the guard (KL to the unpatched model); 0: no guard; none takes the method's default
        temperature: divides the example's logits in the loss: above 1 the refusal is learnt with a margin; none: 1, and
            2 for rollback on 4-bit weights
        noise: rollback blurs the example's request, so that its neighbours are refused too; in units of its embeddings'
            root mean square; none: 0.5
        undo: rollback's pull towards undoing whatever neither the example nor the guard minds; 0: none; none: 0.3
        guard_prompts: how many guard prompts to use at most; of more than 64 an epoch of rollback takes a part, in turn
            all; none: the method's default
        guard_tokens: tokens of the model's own answer over which the guard holds it
        watch: after every epoch look at unlabelled prompts: stop where refusals are back, return to the best epoch, and
            try another weight of the guard where none was good
        max_refused: largest share of the harmless prompts looked at that may be refused
        max_divergence: largest KL from the unpatched model on them, nats per token
        targets: regular expression over the names of modules and of experts' matrices; none takes every expert, and
            every linear layer but the output head
        merge: also write the repaired checkpoint, merged (repaired/)
    """

    method: str = "auto"
    rank: PositiveInt = 32
    rank_experts: PositiveInt = 1
    epochs: PositiveInt | None = None
    learning_rate: PositiveFloat | dict[str, PositiveFloat] | None = None
    guard_weight: CountFloat | None = None
    temperature: PositiveFloat | None = None
    noise: CountFloat | None = None
    undo: CountFloat | None = None
    guard_prompts: PositiveInt | None = None
    guard_tokens: PositiveInt = 16
    watch: bool = True
    max_refused: CountFloat = 0.02
    max_divergence: PositiveFloat = 0.01
    targets: str | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "repair")
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise UserError(f"Setting repair.targets {self.targets!r} is no regular expression: {error}.") from error


def rate_for(rate: float | dict[str, float] | None, method: str) -> float | None:
    """Return the learning rate that a setting gives for a method; none where it leaves that to the method."""
    return rate.get(method) if isinstance(rate, dict) else rate
