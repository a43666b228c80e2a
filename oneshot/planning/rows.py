"""Every way to run a model beside each other: what it takes, whether it fits, and what to change where it does not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from oneshot.checkpoint.files import ADAPTER_CONFIG, INDEX, SINGLE, is_adapter, list_tensors, read_json
from oneshot.errors import UserError
from oneshot.patch.methods import METHODS
from oneshot.planning.duration import Duration, Rates, duration
from oneshot.planning.facts import GPU, Choice, Method, Precision, Sharded, Work, shipped
from oneshot.planning.memory import Memory, estimate, trained
from oneshot.planning.shapes import ModelShape, shape_of
from oneshot.settings import Settings

_PREFIXES = ((prefix, power) for power, prefix in enumerate("KMGT", 1))
_UNITS = {"": 1, "B": 1}
_UNITS |= {name: size for p, i in _PREFIXES for name, size in ((f"{p}B", 1000**i), (f"{p}IB", 1024**i))}
_COUNTS = (*range(1, 9), *range(16, 129, 8), *range(160, 513, 32), 1024)
_ANSWER, _GUARD_PROMPT = 128, 64  # tokens of an answer that carry the loss, and of a guard prompt


@dataclass(frozen=True)
class Model:
    """A model as it is planned for: its name, shape, and whether an update of its own (an adapter) is known."""

    name: str
    shape: ModelShape
    adapter: bool = False

    @property
    def fused(self) -> bool:
        """Whether it has fused experts, which are neither patched nor read in 4 bits."""
        return self.shape.of("expert") > 0


@dataclass(frozen=True)
class Row:
    """One way to run.

    Attributes:
        impossible: why this cannot be run on any number of GPUs, or empty
        fits: on the GPUs and machines given
        smallest: number of GPUs that it takes, or none
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


def read_model(settings: Settings) -> Model:
    """Read the shape of the model that the settings name, from its config.json and, where there, its files' headers.

    Nothing but a config.json is downloaded for a Hub id.

    Raises:
        UserError: no model named, or no config.json of a known kind
    """
    name = settings.model.path
    if name is None:
        raise UserError("There is nothing to plan: name a folder, a config.json or a Hub id with --model.path.")
    path = Path(name).expanduser()
    adapter = path.is_dir() and is_adapter(path)
    if adapter:
        name = settings.model.base or read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
        path = Path(name).expanduser()
    if path.is_dir():
        weights = list_tensors(path) if (path / INDEX).is_file() or (path / SINGLE).is_file() else None
        return Model(name, shape_of(read_json(path / "config.json"), weights), adapter)
    if path.is_file():
        return Model(name, shape_of(read_json(path)), adapter)
    return Model(name, shape_of(read_json(_from_hub(name))), adapter)


def _from_hub(name: str) -> Path:
    """The config.json of a Hub id, alone."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"The model {name} does not exist: give a folder, a config.json or a Hub id (owner/name).")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"The config.json of {name} is neither here nor to be had from the Hub ({type(error).__name__}): "
            "download it, and give its path as --model.path."
        ) from error


def work_of(settings: Settings, method: Method, gpus: int) -> Work:
    """Return what a rank computes on in one pass, from the settings."""
    repair, tune = settings.repair, settings.finetune
    tokens = min(settings.plan.tokens, settings.model.max_length or settings.plan.tokens)
    answers = min(tokens, _ANSWER)
    checkpointing = settings.model.gradient_checkpointing
    if settings.plan.stage == "finetune":
        rows = -(-tune.batch_size // (gpus * tune.gradient_accumulation_steps))
        return Work(
            rows, tokens, rows * answers, rank=tune.lora_rank, all_logits=False, checkpointing=checkpointing
        )  # fmt: skip
    weight = METHODS[method].defaults.guard_weight if repair.guard_weight is None else repair.guard_weight
    guard = (repair.guard_prompts or METHODS[method].defaults.guard_prompts) if weight else 0
    own = -(-guard // gpus)
    prompt = _GUARD_PROMPT + repair.guard_tokens
    return Work(
        1 + own, max(tokens, prompt if own else 0), answers, own * repair.guard_tokens,
        tokens + guard * prompt, repair.rank, checkpointing=checkpointing,
    )  # fmt: skip


def steps_of(settings: Settings, method: Method) -> int:
    """Return how many steps a run makes."""
    if settings.plan.stage == "repair":
        return settings.repair.epochs or METHODS[method].defaults.epochs
    tune, data = settings.finetune, settings.data
    if data.parts is not None:
        conversations = sum((part.count or 0) * part.repeat for part in data.parts.values())
    else:
        conversations = data.harmful_count + (data.task_count if data.task else 0)
    return tune.steps or max(1, round(tune.epochs * -(-conversations // tune.batch_size)))


def rows(settings: Settings, model: Model) -> list[Row]:
    """Return every method, precision and sharding, planned on the GPUs that the settings give."""
    methods = [m for m in get_args(Method) if settings.plan.stage == "repair" or m in ("sft", "lora")]
    shardings = [settings.plan.sharding] if settings.plan.sharding else list(get_args(Sharded))
    return [
        row(settings, model, method, precision, sharding)
        for method in methods
        for precision in get_args(Precision)
        for sharding in shardings
    ]


def row(settings: Settings, model: Model, method: Method, precision: Precision, sharding: Sharded) -> Row:
    """Return one way to run, and how it fits."""
    plan, shape = settings.plan, model.shape
    memory, host = bytes_of(plan.gpu_memory, "plan.gpu_memory"), bytes_of(plan.host_memory, "plan.host_memory")
    zero = shipped(sharding, precision)
    chosen = Choice(method, precision, sharding, plan.gpus, plan.gpus_per_node, settings.model.double_quant)

    def on(gpus: int, recompute: bool = settings.model.gradient_checkpointing) -> Memory:
        work = replace(work_of(settings, method, gpus), checkpointing=recompute)
        return estimate(shape, replace(chosen, gpus=gpus), work, zero, GPU)

    def fit(found: Memory) -> bool:
        return found.peak <= memory and found.host <= host

    impossible = ""
    if precision == "nf4" and method == "sft":
        impossible = "4-bit weights cannot be trained"
    elif precision == "nf4" and model.fused:
        impossible = "fused experts are not read in 4 bits"
    here, work = on(plan.gpus), work_of(settings, method, plan.gpus)
    smallest = None if impossible else next((gpus for gpus in _COUNTS if fit(on(gpus))), None)
    rates = Rates(bytes_of(plan.disk, "plan.disk"), bytes_of(plan.network, "plan.network"), plan.compute * 1e12)
    count = trained(shape, chosen, work)
    fits = not impossible and fit(here)
    result = 2 * shape.parameters if method == "sft" else 4 * shape.low_rank(work.rank)
    found = Row(
        chosen, here, duration(shape, chosen, work, zero, rates, steps_of(settings, method)), impossible, fits,
        smallest, "", result, 12 * count, 16 * count,
    )  # fmt: skip
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


def own_choice(settings: Settings, model: Model, found: list[Row]) -> list[Row]:
    """Return the rows that the settings themselves ask for; all of them where they name no method nor precision."""
    method: str | None = settings.repair.method
    if settings.plan.stage == "finetune":
        method = {"full": "sft", "lora": "lora"}[settings.finetune.method]
    elif method == "auto":
        method = "rollback" if model.adapter or settings.reference else None
    precision = settings.model.quantize or ("bf16" if method else None)
    return [row for row in found if method in (None, row.choice.method) and precision in (None, row.choice.precision)]


def as_json(settings: Settings, model: Model, found: list[Row]) -> dict[str, Any]:
    """Return everything as plain values; bytes and seconds."""
    shape = model.shape
    return {
        "model": model.name,
        "parameters": shape.parameters,
        "linear_parameters": shape.of("linear"),
        "expert_parameters": shape.of("expert"),
        "checkpoint_bytes": 2 * shape.parameters,
        "gpus": settings.plan.gpus,
        "rows": [
            {
                "method": row.choice.method, "precision": row.choice.precision, "sharding": row.choice.sharding,
                **vars(row.memory), "seconds": vars(row.time), "fits": row.fits, "smallest_gpus": row.smallest,
                "advice": row.advice, "result_bytes": row.result, "state_bytes": row.state,
                "optimizer_bytes": row.optimizer,
            }
            for row in found
        ],
    }  # fmt: skip
