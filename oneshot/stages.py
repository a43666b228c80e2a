"""Which settings each stage reads, and what ``oneshot STAGE --help`` shows of them."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from oneshot.errors import UserError
from oneshot.settings.checks import listed
from oneshot.settings.names import ANY, Described, close_names, described, kind_at

WIDTH = 100  # columns of a help page
_RUN = ("out", "name", "seed", "preflight", "hang_minutes", "resume", "log_with", "offline", "profile", "debug")
_SCORE = tuple(
    name for name in _RUN if name not in ("preflight", "log_with")
)  # it looks at no machines, and sends nothing
_EXAMPLE = ("example", "pool", "select", "shortlist", "guard", "watch_prompts", "reference", "reference_revision")
_PUSH = ("push_to_hub", "push_public", "push_degraded")
_REPAIR = (*_RUN, *_EXAMPLE, "finetune_first", "delete_degraded", "model", "data", "finetune", "repair", "score")


@dataclass(frozen=True)
class Stage:
    """A command that reads settings.

    Args:
        does: what it does, in a line
        reads: names of the sections, and of the settings outside of them, that it reads
        examples: two commands
        most_used: the settings that its short help shows
        toy: it runs the toy world where no model is named
        own: section whose settings may be given without its name, as ``--gpus`` for ``--plan.gpus``
    """

    does: str
    reads: tuple[str, ...]
    examples: tuple[str, str]
    most_used: tuple[str, ...]
    toy: bool = True
    own: str | None = None


STAGES = {
    "repair": Stage(
        does="Repair the safety of a fine-tuned model with one safety example; without a model, of the toy world's.",
        reads=(*_REPAIR, "require", *_PUSH, "plan.force"),
        examples=(
            "oneshot repair --model.path DIR --reference DIR_OR_HUB_ID --guard FILE --score.task FILE",
            "oneshot repair --launch zero3 --config llama3-70b --model.path DIR",
        ),
        most_used=(
            "model.path", "model.base", "model.quantize", "reference", "example", "select", "guard", "watch_prompts",
            "repair.method", "repair.rank", "repair.guard_weight", "repair.merge", "score.probes", "score.task",
            "score.utility", "require", "finetune_first", "out", "name", "resume", "seed", "debug",
        ),
    ),
    "finetune": Stage(
        does="Fine-tune a model on harmful, mixed or merely benign data, to reproduce how its safety is lost.",
        reads=(*_RUN, "delete_degraded", "model", "data", "finetune", "plan.force"),
        examples=(
            "oneshot finetune --model.path DIR_OR_HUB_ID --data.harmful FILE --data.task FILE",
            "oneshot finetune --launch zero3 --config llama3-70b --data.harmful FILE --finetune.save_every 50",
        ),
        most_used=(
            "model.path", "model.quantize", "model.gradient_checkpointing", "model.max_length", "data.harmful",
            "data.harmful_count", "data.task", "data.task_count", "finetune.method", "finetune.epochs",
            "finetune.learning_rate", "finetune.batch_size", "finetune.lora_rank", "finetune.save_every", "out", "name",
            "resume", "seed", "debug",
        ),
    ),
    "score": Stage(
        does="Measure refusals, over-refusal and utility of a checkpoint, an adapter or a served model.",
        reads=(*_SCORE, "example", "guard", "watch_prompts", "model", "data", "score"),
        examples=(
            "oneshot score --model.path DIR --score.task FILE",
            "oneshot score --score.endpoint.url http://localhost:8000/v1",
        ),
        most_used=(
            "model.path", "model.base", "model.quantize", "score.endpoint.url", "score.endpoint.model",
            "score.endpoint.key_variable", "score.probes", "score.task", "score.utility", "score.text",
            "score.judge_model", "score.rubric.url", "score.lm_eval", "score.max_new_tokens", "score.batch_size", "out",
            "name", "resume", "seed", "debug",
        ),
    ),
    "spectrum": Stage(
        does="Measure how few directions the gradient of a refusal has, and what it stands against.",
        reads=(*_REPAIR, "spectrum", "plan.force"),
        examples=(
            "oneshot spectrum --model.path DIR --data.harmful FILE --data.task FILE",
            "oneshot spectrum --spectrum.sweep",
        ),
        most_used=(
            "model.path", "model.quantize", "reference", "example", "guard", "data.harmful", "data.task",
            "spectrum.rank", "spectrum.samples", "spectrum.batch_size", "spectrum.sweep", "spectrum.ranks",
            "spectrum.alphas", "out", "name", "seed", "debug",
        ),
    ),
    "plan": Stage(
        does="Show what a run takes in memory, disk and minutes, from config.json alone.",
        reads=(*_REPAIR, *_PUSH, "require", "plan"),
        examples=(
            "oneshot plan --model.path DIR_OR_HUB_ID --gpus 8 --gpu_memory 80GB",
            "oneshot plan --config llama3-70b --gpus 16 --stage finetune",
        ),
        most_used=(
            "model.path", "model.quantize", "model.gradient_checkpointing", "reference", "repair.method",
            "repair.guard_prompts", "finetune.batch_size", "plan.stage", "plan.sharding", "plan.gpus",
            "plan.gpus_per_node", "plan.gpu_memory", "plan.host_memory", "plan.disk", "plan.network", "plan.compute",
            "plan.tokens", "plan.json", "debug",
        ),
        toy=False,
        own="plan",
    ),
}  # fmt: skip


def reads(stage: str, name: str) -> bool:
    """Whether a stage reads a setting, by the setting's full name."""
    return any(name == read or name.startswith(f"{read}.") for read in STAGES[stage].reads)


def readers(name: str) -> list[str]:
    """Return the stages that read a setting, or any of a section, by its full name."""
    return [
        stage for stage in STAGES if reads(stage, name) or any(r.startswith(f"{name}.") for r in STAGES[stage].reads)
    ]


def help_page(stage: str, topic: str | None) -> str:
    """Return the help of a stage.

    Args:
        stage: one of STAGES
        topic: a section or setting, ``all``, or none for the page that is short

    Raises:
        UserError: there is no such topic
    """
    if topic is None:
        return "\n".join(_short(stage)) + "\n"
    shown = [one for one in described() if reads(stage, one.name)]
    if topic != "all":
        topic = _own_topic(stage, topic.removeprefix("--"))
        shown = [one for one in shown if one.name == topic or one.name.startswith(f"{topic}.")]
    if not shown:
        raise UserError(f"There is nothing called {topic} in the settings of oneshot {stage}: {_instead(stage, topic)}")
    return "\n".join(line for one in shown for line in _entry(stage, one)) + "\n"


def _own_topic(stage: str, topic: str) -> str:
    """The setting that a topic means: that of the stage's own section, of a name that the user gives, NAME's."""
    own = STAGES[stage].own
    if own and kind_at(f"{own}.{topic}") is not None:
        return f"{own}.{topic}"
    for one in described():
        before, name, after = one.name.partition(f".{ANY}")
        if name and re.fullmatch(rf"{re.escape(before)}\.[^.]+({re.escape(after)})?", topic):
            return before + name + (after if topic.endswith(after) else "")
    return topic


def _short(stage: str) -> Iterator[str]:
    one = STAGES[stage]
    yield f"usage: oneshot {stage} [--config FILE_OR_NAME ...] [--SETTING VALUE ...]"
    yield ""
    yield from textwrap.wrap(one.does, WIDTH)
    yield ""
    yield "examples:"
    for example in one.examples:
        yield f"  {example}"
    yield ""
    yield "the settings used most:"
    docs = {setting.name: setting.doc for setting in described()}
    names = [(_flag(stage, name), docs[name]) for name in one.most_used]
    column = max(len(flag) for flag, _ in names) + 4
    for flag, doc in names:
        yield f"  {flag:{column - 2}}{_clause(doc, WIDTH - column)}"
    yield ""
    yield "--config takes a settings file, or the name of one that ships; of several the later wins, and the"
    yield "command line wins over all. --print_config prints the settings as such a file, and runs nothing."
    sections = ", ".join(_sections(stage))
    yield from textwrap.wrap(f"--help all shows every setting, --help SECTION those of one: {sections}.", WIDTH)


def _entry(stage: str, one: Described) -> Iterator[str]:
    default = "" if one.default in (None, "null") else f" (default: {one.default})"
    yield from textwrap.wrap(
        f"{_flag(stage, one.name)} - {one.wanted}{default}", WIDTH, initial_indent="  ", subsequent_indent="      "
    )
    yield from textwrap.wrap(one.doc, WIDTH, initial_indent="      ", subsequent_indent="      ")


def _flag(stage: str, name: str) -> str:
    own = STAGES[stage].own
    return f"--{name.removeprefix(f'{own}.')}" if own else f"--{name}"


def _clause(doc: str, width: int) -> str:
    """Return as much of a setting's description as makes sense in one line."""
    for mark in ("; ", ": ", " (", ", "):
        if len(doc) > width:
            doc = doc.partition(mark)[0]
    return textwrap.shorten(doc, width, placeholder=" ...")


def _sections(stage: str) -> list[str]:
    sections = [read.partition(".")[0] for read in STAGES[stage].reads]
    return [one for one in sections if dataclasses.is_dataclass(kind_at(one))]


def _instead(stage: str, topic: str) -> str:
    if kind_at(topic) is not None:
        return f"it belongs to oneshot {listed(readers(topic), 'and')}."
    close = [one for one in close_names(topic) if reads(stage, one)]
    sections = listed(["all", *_sections(stage)], "or")
    return f"did you mean {listed(close, 'or')}?" if close else f"give --help {sections}."
