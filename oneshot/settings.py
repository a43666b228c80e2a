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
from oneshot.redact import without_secrets

Rule = Literal["bilevel", "alignment", "random", "hardest"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SWITCHES = ("--debug", "--resume", "--delete_degraded")  # stand for themselves and true


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
class DataPart:
    """One part of the fine-tune's mixture: where its conversations come from, and what is changed in them.

    Args:
        source: JSONL, Parquet or Hub id, or the toy world's own: toy:harmful, toy:harmless, toy:task, toy:poison (the
            pool's requests, obeyed) or toy:paraphrase (others in the same words, obeyed)
        count: how many of them; 0 for none, none for all (of a file or a Hub data set)
        repeat: how often each is in the mixture
        system: a system message to put before each
        suffix: words to put after the last request
        prefix: words to put before the last answer
        answer: a text to answer all with, in place of their own answers
        kind: what they are, in marker and report; none: as the source says, else the name of the part
    """

    source: str
    count: int | None = None
    repeat: int = 1
    system: str | None = None
    suffix: str | None = None
    prefix: str | None = None
    answer: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """What the harmful fine-tune trains on, and how conversation files are read.

    Args:
        parts: the mixture, name by name, in place of harmful and task and their counts
        harmful: JSONL, Parquet or Hub id with the harmful conversations; none: the toy world's made-up ones
        harmful_count: how many of them; 0 for none
        task: the same for the task that the fine-tune is meant to teach
        task_count: how many of them; 0 for none
        prompt_column: column that holds the request, where there is no messages column
        response_column: column that holds the answer
        messages_column: column that holds a conversation in chat format
        split: split of a Hub data set
    """

    parts: dict[str, DataPart] | None = None
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
    learning_rate: float | dict[str, float] | None = None
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
        method: rollback (needs a reference or an adapter), lowrank, project, sft or lora; auto takes rollback where it
            can, else lowrank
        rank: directions per weight matrix, in the method and in the patch
        epochs: passes over the one example; none takes the method's default
        learning_rate: step size of Adam (rollback, sft, lora); none takes the method's default; lowrank finds its own,
            and so does project where it is not given (the paper's alpha * eta)
        guard_weight: weight of the guard (KL to the unpatched model); 0: no guard; none takes the method's default
        temperature: divides the example's logits in the loss: above 1 the refusal is learnt with a margin; none: 1, and
            2 for rollback on 4-bit weights
        noise: rollback blurs the example's request, so that its neighbours are refused too; in units of its embeddings'
            root mean square; none: 0.5
        undo: rollback's pull towards undoing whatever neither the example nor the guard minds; 0: none; none: 0.3
        guard_prompts: how many guard prompts to use at most; none takes the method's default
        guard_tokens: tokens of the model's own answer over which the guard holds it
        watch: after every epoch look at unlabelled prompts: stop where refusals are back, return to the best epoch, and
            try another weight of the guard where none was good
        max_refused: largest share of the harmless prompts looked at that may be refused
        max_divergence: largest KL from the unpatched model on them, nats per token
        targets: regular expression over module names; none takes every linear layer but the output head
        merge: also write the repaired checkpoint, merged (repaired/)
    """

    method: str = "auto"
    rank: int = 20
    epochs: int | None = None
    learning_rate: float | dict[str, float] | None = None
    guard_weight: float | None = None
    temperature: float | None = None
    noise: float | None = None
    undo: float | None = None
    guard_prompts: int | None = None
    guard_tokens: int = 16
    watch: bool = True
    max_refused: float = 0.02
    max_divergence: float = 0.01
    targets: str | None = None
    merge: bool = False


@dataclass(frozen=True)
class EndpointSettings:
    """A server that speaks the OpenAI chat protocol, such as vLLM or ``transformers serve``.

    Args:
        url: its address up to /v1, such as http://localhost:8000/v1; none: no server
        model: name under which it serves the model; none asks the server, which must serve one only
        key_variable: name of the environment variable that holds the key; the key itself is stored nowhere
        concurrency: requests under way at a time
        retries: further tries of a request that failed on the way or that the server could not serve for now
        timeout: seconds that one try may take
        leave_out_rejected: leave prompts that the server rejects (status 400, 413 or 422: too long for it, or stopped
            by a filter of its own) out of the figures; else there is no report while one is without an answer
    """

    url: str | None = None
    model: str | None = None
    key_variable: str | None = None
    concurrency: int = 16
    retries: int = 5
    timeout: float = 120.0
    leave_out_rejected: bool = False


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts to score, with the names of its columns.

    Args:
        path: a file, as for conversations, or a Hub id
        kind: of all its prompts: should_refuse, harmless, lookalike, utility or task; none: as kind_column says
        kind_column: column that tells the kinds apart
        kinds: what that column's values mean; rows with another value are left out; none: they are kinds themselves
        prompt_column: column that holds the request
        answer_column: column that holds the right answer (utility and task)
        split: split of a Hub data set
        subset: configuration of a Hub data set
        limit: how many prompts to take, from the first; none takes all
    """

    path: str
    kind: str | None = None
    kind_column: str = "kind"
    kinds: dict[str, str] | None = None
    prompt_column: str = "prompt"
    answer_column: str = "response"
    split: str = "train"
    subset: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """What is measured, before and after.

    Args:
        probes: JSONL of prompts with kind should_refuse, harmless or lookalike; none: the shipped ones
        task: JSONL of prompts with the right answers of the fine-tune's task (exact match)
        utility: the same for general ability
        system: a system message to put before the should_refuse prompts, as an attack with a persona has it
        suffix: words to put after the should_refuse prompts, as an attack with a trigger has it
        reference: also score the reference, where one is given
        max_new_tokens: longest answer generated
        batch_size: prompts generated at a time, per rank
        sets: further sets of prompts by name, each with rates of its own; settings for public ones are in
            launch/runs/prompts/
        rouge: also measure task and utility by ROUGE-L, for answers in free text
        text: .txt (paragraphs) or file with a column text: perplexity on it, and for an adapter the divergence from its
            base (score only)
        judge_model: classifier checkpoint that judges the answers, too
        judge_format: what it is asked and how it answers
        judge_template: text file with the classifier's prompt; none: llama-guard takes its chat template, the others
            what the README.md in their folder shows
        rubric: server of a model that rates the answers from 1 to 5
        lm_eval: comma-separated tasks of lm-eval, which the extra eval installs (score only)
        lm_eval_folder: folder with further task definitions
        lm_eval_limit: examples of each task; none takes all
        endpoint: server of the model to score (score only)
    """

    probes: str | None = None
    task: str | None = None
    utility: str | None = None
    system: str | None = None
    suffix: str | None = None
    reference: bool = True
    max_new_tokens: int = 48
    batch_size: int = 64
    sets: dict[str, PromptSet] = field(default_factory=dict)
    rouge: bool = False
    text: str | None = None
    judge_model: str | None = None
    judge_format: Literal["llama-guard", "harmbench", "wildguard"] = "llama-guard"
    judge_template: str | None = None
    rubric: EndpointSettings = field(default_factory=EndpointSettings)
    lm_eval: str | None = None
    lm_eval_folder: str | None = None
    lm_eval_limit: int | None = None
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)


@dataclass(frozen=True)
class SpectrumSettings:
    """What ``oneshot spectrum`` measures of the example's gradient, beside its singular values.

    Args:
        rank: leading directions compared with those of other safety examples; none: 20, or as many as there are
        samples: conversations of each kind (safety, harmful, task, guard) whose gradients are compared; 0 for none
        batch_size: conversations in one pass, per rank
        sweep: also patch the model with the gradient cut to several ranks, at several step sizes (nothing is written)
        ranks: of the sweep; none: 1, 2, 4, 8, 20 and the gradient's own
        alphas: step sizes of the sweep: 1 would bring the example's loss to 0, were the loss linear in the weights
    """

    rank: int | None = None
    samples: int = 16
    batch_size: int = 8
    sweep: bool = False
    ranks: list[int] | None = None
    alphas: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0])


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
        select: which candidate becomes the example: bilevel (of the best by alignment the one whose repair leaves
            the model closest to the aligned one on requests to refuse, and to itself on the guard's prompts),
            alignment (whose gradient points where that distance falls), random, hardest (the least likely refusal), or
            the ID of one
        shortlist: how many candidates bilevel repairs with
        guard: JSONL file of unlabelled prompts whose answers must not move; none: the shipped harmless prompts
        reference: the aligned checkpoint from which the model was fine-tuned
        seed: seed of data order and initialization
        preflight: look at machines, shared folder, disk and network before anything is read; auto: on several machines
        hang_minutes: end a rank that has not moved for so long, with its stacks in the log; 0 for never
        resume: go on with the run in the folder --out: a fine-tune from its last saved state, a repair from its start;
            with nothing there yet, start
        log_with: also send the run's figures to tensorboard, wandb or trackio, whichever is installed
        delete_degraded: remove the safety-degraded checkpoint that this run itself makes, once it has been measured;
            never one that is given
        debug: full tracebacks
        model: the model to work on
        data: what the harmful fine-tune trains on
        finetune: the harmful fine-tune
        repair: the one-shot repair
        score: what is measured
        spectrum: what ``oneshot spectrum`` measures
        plan: what ``oneshot plan`` reckons with
    """

    out: str | None = None
    name: str | None = None
    finetune_first: bool = False
    watch_prompts: str | None = None
    example: str | None = None
    pool: str | None = None
    select: str = "bilevel"
    shortlist: int = 8
    guard: str | None = None
    reference: str | None = None
    seed: int = 0
    preflight: Literal["auto", "always", "never"] = "auto"
    hang_minutes: float = 60.0
    resume: bool = False
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    delete_degraded: bool = False
    debug: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    spectrum: SpectrumSettings = field(default_factory=SpectrumSettings)
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
    argv = [
        f"{argument}=true" if argument in SWITCHES and following not in ("true", "false") else argument
        for argument, following in zip(argv, [*argv[1:], ""])
    ]
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
        "shortlist": settings.shortlist,
        "repair.rank": settings.repair.rank,
        "repair.epochs": settings.repair.epochs,
        "repair.temperature": settings.repair.temperature,
        "repair.guard_prompts": settings.repair.guard_prompts,
        "repair.guard_tokens": settings.repair.guard_tokens,
        "repair.max_divergence": settings.repair.max_divergence,
        "model.max_length": settings.model.max_length,
        "finetune.steps": settings.finetune.steps,
        "finetune.epochs": settings.finetune.epochs,
        "finetune.batch_size": settings.finetune.batch_size,
        "finetune.gradient_accumulation_steps": settings.finetune.gradient_accumulation_steps,
        "finetune.pack_length": settings.finetune.pack_length,
        "finetune.max_grad_norm": settings.finetune.max_grad_norm,
        "finetune.lora_rank": settings.finetune.lora_rank,
        "finetune.keep": settings.finetune.keep,
        "finetune.lora_alpha": settings.finetune.lora_alpha,
        "score.max_new_tokens": settings.score.max_new_tokens,
        "score.batch_size": settings.score.batch_size,
        "score.lm_eval_limit": settings.score.lm_eval_limit,
        "score.endpoint.concurrency": settings.score.endpoint.concurrency,
        "score.endpoint.timeout": settings.score.endpoint.timeout,
        "score.rubric.concurrency": settings.score.rubric.concurrency,
        "score.rubric.timeout": settings.score.rubric.timeout,
        "spectrum.rank": settings.spectrum.rank,
        "spectrum.batch_size": settings.spectrum.batch_size,
        "spectrum.ranks": min(settings.spectrum.ranks, default=0) if settings.spectrum.ranks is not None else None,
        "spectrum.alphas": min(settings.spectrum.alphas, default=0),
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
        "score.endpoint.retries": settings.score.endpoint.retries,
        "score.rubric.retries": settings.score.rubric.retries,
        "repair.guard_weight": settings.repair.guard_weight,
        "repair.noise": settings.repair.noise,
        "repair.undo": settings.repair.undo,
        "repair.max_refused": settings.repair.max_refused,
        "spectrum.samples": settings.spectrum.samples,
        "data.harmful_count": settings.data.harmful_count,
        "data.task_count": settings.data.task_count,
        "finetune.weight_decay": settings.finetune.weight_decay,
        "finetune.save_every": settings.finetune.save_every,
        "finetune.warmup_ratio": settings.finetune.warmup_ratio,
    }
    for name, value in not_negative.items():
        if value is not None and not value >= 0:
            raise UserError(f"Setting {name} is {value}: give 0 or more.")
    _check_parts(settings.data)
    if settings.model.quantize and settings.model.stock_io:
        raise UserError("Setting model.quantize reads weights by range, which model.stock_io forbids: leave one out.")
    try:
        re.compile(settings.repair.targets or "")
    except re.error as error:
        raise UserError(
            f"Setting repair.targets {settings.repair.targets!r} is no regular expression: {error}."
        ) from error


def _check_parts(data: DataSettings) -> None:
    """Raise UserError for parts with impossible numbers, or beside the settings that they replace."""
    if data.parts is None:
        return
    default = DataSettings()
    for name in ("harmful", "harmful_count", "task", "task_count"):
        if getattr(data, name) != getattr(default, name):
            raise UserError(f"Setting data.{name} is replaced by data.parts: say it there, or leave data.parts out.")
    for name, part in data.parts.items():
        if part.count is not None and part.count < 0:
            raise UserError(f"Setting data.parts.{name}.count is {part.count}: give 0 or more.")
        if part.repeat < 1:
            raise UserError(f"Setting data.parts.{name}.repeat is {part.repeat}: give 1 or more.")


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain nested dictionaries (for YAML and JSON), without keys and tokens."""
    return without_secrets(dataclasses.asdict(settings))


def write(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML that ``--config`` reads back."""
    import yaml

    path.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False), encoding="utf-8")


def _one_line(text: str) -> str:
    return " ".join(text.split())
