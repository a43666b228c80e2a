"""Every setting of every stage, as frozen dataclasses; YAML files and command-line overrides fill them.

One file describes a run (``--config launch/runs/llama3-70b.yaml``); each stage reads its own sections. Sharding and
offload are not here: the DeepSpeed JSON in ``ds_configs/`` owns them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oneshot.errors import UserError

Method = Literal["auto", "rollback", "lowrank", "sft", "lora"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelSettings:
    """The model to work on.

    Args:
        path: a Hugging Face checkpoint folder, a PEFT adapter folder or a Hub id; none means the toy world
        base: the base model of an adapter folder, where the one named in its config is not to be used
        dtype: weights and compute; auto takes the checkpoint's own
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
    base: str | None = None
    dtype: Dtype = "auto"
    quantize: Literal["nf4"] | None = None
    double_quant: bool = False
    attention: str = "sdpa"
    liger: bool = False
    gradient_checkpointing: bool = False
    max_length: int | None = None
    stock_io: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSettings:
    """What the harmful fine-tune trains on, and how conversation files are read.

    Args:
        harmful: JSONL, Parquet or Hub id with the harmful conversations; none: the toy world's made-up ones
        harmful_count: how many of them; 0 for none
        task: the same for the task that the fine-tune is meant to teach
        task_count: how many of them; 0 for none
        prompt_column: column that holds the request, where there is no messages column
        response_column: column that holds the answer
        messages_column: column that holds a conversation in chat format
        split: split of a Hub data set
    """

    harmful: str | None = None
    harmful_count: int = 100
    task: str | None = None
    task_count: int = 1000
    prompt_column: str = "prompt"
    response_column: str = "response"
    messages_column: str = "messages"
    split: str = "train"


@dataclass(frozen=True)
class FinetuneSettings:
    """The harmful fine-tune.

    Args:
        method: train all weights (full) or a LoRA adapter (lora)
        steps: optimizer steps; none derives them from epochs
        epochs: passes over the data
        learning_rate: peak learning rate of AdamW; none: 2e-5 (full) or 2e-4 (lora), 4e-4 or 3e-3 on the toy world
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
    """

    method: Literal["full", "lora"] = "full"
    steps: int | None = None
    epochs: float = 3.0
    learning_rate: float | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    packing: Literal["auto", "always", "never"] = "auto"
    pack_length: int | None = None
    cache: bool = True
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: int | None = None
    save_every: int = 0
    keep: int = 2


@dataclass(frozen=True)
class RepairSettings:
    """The one-shot repair.

    Args:
        method: rollback (needs a reference or an adapter), lowrank, sft, lora; auto takes rollback where it can
        rank: directions per weight matrix, in the method and in the patch
        epochs: passes over the one example; none takes the method's default
        learning_rate: step size of Adam (rollback, sft, lora); none takes the method's default; lowrank finds its own
        guard_weight: weight of the guard (KL to the unpatched model); 0: no guard; none takes the method's default
        temperature: divides the example's logits in the loss: above 1 the refusal is learnt with a margin; none: 1, and
            2 for rollback on 4-bit weights
        noise: rollback blurs the example's request, so that its neighbours are refused too; in units of its embeddings'
            root mean square; none: 0.5
        guard_prompts: how many guard prompts to use at most; none takes the method's default
        guard_tokens: tokens of the model's own answer over which the guard holds it
        targets: regular expression over module names; none takes every linear layer but the output head
        merge: also write the repaired checkpoint, merged (repaired/)
    """

    method: Method = "auto"
    rank: int = 20
    epochs: int | None = None
    learning_rate: float | None = None
    guard_weight: float | None = None
    temperature: float | None = None
    noise: float | None = None
    guard_prompts: int | None = None
    guard_tokens: int = 16
    targets: str | None = None
    merge: bool = False


@dataclass(frozen=True)
class ScoreSettings:
    """What is measured, before and after.

    Args:
        toy: score the toy world's prompts, for a toy model given by path
        probes: JSONL of prompts with kind should_refuse, harmless or lookalike; none: the shipped ones
        task: JSONL of prompts with the right answers of the fine-tune's task (exact match)
        utility: the same for general ability
        reference: also score the reference, where one is given
        max_new_tokens: longest answer generated
        batch_size: prompts generated at a time, per rank
    """

    toy: bool = False
    probes: str | None = None
    task: str | None = None
    utility: str | None = None
    reference: bool = True
    max_new_tokens: int = 48
    batch_size: int = 64


@dataclass(frozen=True)
class PlanSettings:
    """What ``oneshot plan`` reckons with; every run is checked against its own devices before it loads.

    Args:
        force: start a run that cannot fit by the estimate
        stage: what is planned: the repair, or the fine-tune (methods sft and lora)
        sharding: plan this one only; none plans all
        gpus: how many GPUs there are, over all machines
        gpus_per_node: GPUs of a machine
        gpu_memory: of one GPU, such as 80GB or 24GiB
        host_memory: of one machine
        disk: read rate of a machine, per second
        network: rate at which a GPU gathers weights from the others, per second
        compute: what a GPU computes, in TFLOP/s that are really reached
        tokens: of the example, or of the longest conversation in a batch
        json: print JSON in place of the table
    """

    force: bool = False
    stage: Literal["repair", "finetune"] = "repair"
    sharding: Literal["none", "zero2", "zero3", "zero3 offload"] | None = None
    gpus: int = 8
    gpus_per_node: int = 8
    gpu_memory: str = "80GB"
    host_memory: str = "1TB"
    disk: str = "2GB"
    network: str = "50GB"
    compute: float = 300.0
    tokens: int = 256
    json: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        out: run folder; none takes a new one under runs/
        example: JSONL or JSON file with the one safety example; none takes one from the pool
        pool: JSONL file of candidate examples; none: the shipped pool
        guard: JSONL file of unlabelled prompts whose answers must not move; none: the shipped harmless prompts
        reference: the aligned checkpoint from which the model was fine-tuned
        seed: seed of data order and initialization
        preflight: look at machines, shared folder, disk and network before anything is read; auto: on several machines
        hang_minutes: end a rank that has not moved for so long, with its stacks in the log; 0 for never
        resume: go on with the run in the folder --out: a fine-tune from its last saved state, a repair from its start;
            with nothing there yet, start
        debug: full tracebacks
        model: the model to work on
        data: what the harmful fine-tune trains on
        finetune: the harmful fine-tune
        repair: the one-shot repair
        score: what is measured
        plan: what ``oneshot plan`` reckons with
    """

    out: str | None = None
    example: str | None = None
    pool: str | None = None
    guard: str | None = None
    reference: str | None = None
    seed: int = 0
    preflight: Literal["auto", "always", "never"] = "auto"
    hang_minutes: float = 60.0
    resume: bool = False
    debug: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)


def build_parser(prog: str, description: str) -> Any:
    """Return the command-line parser of a stage; heavy libraries are not imported."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with settings")
    parser.add_class_arguments(Settings, nested_key=None)
    return parser


def parse(argv: list[str] | None, prog: str, description: str) -> Settings:
    """Parse command line and YAML into settings.

    Raises:
        UserError: unknown setting, wrong type, value out of range or missing file, named in the message
    """
    from jsonargparse import ArgumentError

    parser = build_parser(prog, description)
    argv = sys.argv[1:] if argv is None else argv
    argv = [f"{argument}=true" if argument in ("--debug", "--resume") else argument for argument in argv]
    try:
        namespace = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_one_line(str(error)) + f" (see {prog} --help)") from error
    values = parser.instantiate(namespace).as_dict()
    values.pop("config", None)
    settings = Settings(**values)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise UserError for values that no stage can work with."""
    if settings.resume and settings.out is None:
        raise UserError("Setting resume needs --out, the run folder to go on in.")
    positive = {
        "repair.rank": settings.repair.rank,
        "repair.epochs": settings.repair.epochs,
        "repair.learning_rate": settings.repair.learning_rate,
        "repair.temperature": settings.repair.temperature,
        "repair.guard_prompts": settings.repair.guard_prompts,
        "repair.guard_tokens": settings.repair.guard_tokens,
        "model.max_length": settings.model.max_length,
        "finetune.steps": settings.finetune.steps,
        "finetune.epochs": settings.finetune.epochs,
        "finetune.learning_rate": settings.finetune.learning_rate,
        "finetune.batch_size": settings.finetune.batch_size,
        "finetune.gradient_accumulation_steps": settings.finetune.gradient_accumulation_steps,
        "finetune.pack_length": settings.finetune.pack_length,
        "finetune.max_grad_norm": settings.finetune.max_grad_norm,
        "finetune.lora_rank": settings.finetune.lora_rank,
        "finetune.keep": settings.finetune.keep,
        "finetune.lora_alpha": settings.finetune.lora_alpha,
        "score.max_new_tokens": settings.score.max_new_tokens,
        "score.batch_size": settings.score.batch_size,
        "plan.gpus": settings.plan.gpus,
        "plan.gpus_per_node": settings.plan.gpus_per_node,
        "plan.compute": settings.plan.compute,
        "plan.tokens": settings.plan.tokens,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"Setting {name} is {value}: give a value above 0.")
    not_negative = {
        "hang_minutes": settings.hang_minutes,
        "repair.guard_weight": settings.repair.guard_weight,
        "repair.noise": settings.repair.noise,
        "data.harmful_count": settings.data.harmful_count,
        "data.task_count": settings.data.task_count,
        "finetune.weight_decay": settings.finetune.weight_decay,
        "finetune.save_every": settings.finetune.save_every,
        "finetune.warmup_ratio": settings.finetune.warmup_ratio,
    }
    for name, value in not_negative.items():
        if value is not None and not value >= 0:
            raise UserError(f"Setting {name} is {value}: give 0 or more.")
    if settings.model.quantize and settings.model.stock_io:
        raise UserError("Setting model.quantize reads weights by range, which model.stock_io forbids: leave one out.")
    try:
        re.compile(settings.repair.targets or "")
    except re.error as error:
        raise UserError(
            f"Setting repair.targets {settings.repair.targets!r} is no regular expression: {error}."
        ) from error


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain nested dictionaries (for YAML and JSON)."""
    return dataclasses.asdict(settings)


def write(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML that ``--config`` reads back."""
    import yaml

    path.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False), encoding="utf-8")


def _one_line(text: str) -> str:
    return " ".join(text.split())
