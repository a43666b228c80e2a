"""oneshot in Python: what the commands do, as functions that return values and raise ``UserError``.

They work in a script, in a notebook, and in every process of a run that accelerate or torchrun started, where each is a
collective: call it on all ranks alike. Several calls in one process are fine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.distributed.resources import own_threads
from oneshot.errors import UserError
from oneshot.online import going_offline
from oneshot.report.trackers import own_tracker
from oneshot.results import Finetuned, Repair, Scores, watched_of
from oneshot.settings import Settings

if TYPE_CHECKING:
    from oneshot.planning.plan import Plan
    from oneshot.report.exports import Exported

_PLACE = "in the call"
_IN_MEMORY = "given"  # folder of a run for a model that came as an object
_BASE_IN_MEMORY = "given_base"  # for what such a PEFT model stands on


def settings_for(
    stage: str, settings: Settings | str | Path | None = None, /, *, model: Any = None, **values: Any
) -> Settings:
    """Return the checked settings of a call, as the command line of that stage would make them.

    Args:
        stage: repair, finetune, score, spectrum or plan
        settings: settings to start from, a settings file, or the name of one that ships (``oneshot list``); none: the
            defaults, and below them the toy world's where no model is named
        model: path or Hub id, a ``ModelSettings`` or a dict of its fields
        values: further settings by name: sections as dicts or instances, such as ``repair={"rank": 16}``

    Raises:
        UserError: an unknown setting, a wrong value, or a file that cannot be read
    """
    from oneshot.commandline import known_kind, layered
    from oneshot.settings.layers import named
    from oneshot.stages import STAGES

    if stage not in STAGES:
        raise UserError(f"There is no stage {stage!r}: give one of {', '.join(STAGES)}.")
    if model is not None:
        values["model"] = {"path": str(model)} if isinstance(model, (str, Path)) else model
    if isinstance(settings, Settings):
        return _complete(stage, _changed(settings, values))
    files = [] if settings is None else [str(settings)]
    flat = {name: value for section, given in values.items() for name, value in named(section, given)}
    for name in flat:
        known_kind(name, stage, _PLACE)
    return layered(stage, files, flat, _PLACE)


def repair(
    settings: Settings | str | Path | None = None,
    /,
    *,
    model: Any = None,
    tokenizer: Any = None,
    quiet: bool = True,
    **values: Any,
) -> Repair:
    """Repair a fine-tuned model with one safety example; without a model, the toy world from end to end. Collective.

    Args:
        settings, values: as in ``settings_for``
        model: also a transformers or PEFT model in memory: it is left as it is, and a copy is written into the run
            folder and repaired; for one process
        tokenizer: of a model in memory
        quiet: print nothing

    Raises:
        UserError: as on the command line, where it is printed and ends the process with 2
    """
    from oneshot.repair import run
    from oneshot.report.runfolder import PAGE, PATCH, REPAIRED
    from oneshot.report.verdict import verdict_of

    asked = _settings("repair", settings, model, tokenizer, values)
    with own_threads(), going_offline(asked.offline), own_tracker():
        finished = run(asked, quiet=quiet)
    done, folder = finished.repaired, finished.run_dir
    report = _of_rank_0(finished.report)
    chosen, verdict = done.choice.chosen, verdict_of(report)
    taken = done.request.conversations[chosen.index]
    merged = folder / REPAIRED
    return Repair(
        outcome=verdict.word,
        doubts=list(verdict.doubts),
        method=done.request.recipe.method.name,
        example={
            "id": taken.id, "prompt": taken.prompt[-1]["content"], "response": taken.response,
            "selected_by": chosen.selected_by, "score": chosen.score,
        },
        scores=done.stages,
        trace=done.solution.trace,
        watch=watched_of(done.solution.watch),
        patch=done.solution.update,
        report=report,
        folder=folder,
        patch_folder=folder / PATCH,
        merged_folder=merged if asked.repair.merge and merged.is_dir() else None,
        page=folder / PAGE,
    )  # fmt: skip


def finetune(
    settings: Settings | str | Path | None = None,
    /,
    *,
    model: Any = None,
    tokenizer: Any = None,
    quiet: bool = True,
    **values: Any,
) -> Finetuned:
    """Fine-tune a model on harmful, mixed or benign data, to reproduce how its safety is lost. Collective.

    Args:
        settings, model, tokenizer, quiet, values: as in ``repair``

    Raises:
        UserError: as on the command line; its subclass Diverged, where the loss became no number
    """
    from oneshot.finetune import run

    asked = _settings("finetune", settings, model, tokenizer, values)
    with own_threads(), going_offline(asked.offline), own_tracker():
        folder = run(asked, quiet=quiet)
    return Finetuned(folder, folder.parent)


def score(
    settings: Settings | str | Path | None = None,
    /,
    *,
    model: Any = None,
    tokenizer: Any = None,
    quiet: bool = True,
    **values: Any,
) -> Scores:
    """Measure refusals, over-refusal and utility of a checkpoint, an adapter, or (score.endpoint) a server. Collective.

    Args:
        settings, model, tokenizer, quiet, values: as in ``repair``

    Raises:
        UserError: as on the command line
    """
    from oneshot.score import run

    asked = _settings("score", settings, model, tokenizer, values)
    with own_threads(), going_offline(asked.offline), own_tracker():
        finished = run(asked, quiet=quiet)
    (stage,) = finished.stages.values()
    report = _of_rank_0(finished.report)
    return Scores(stage.rates, stage.others, stage.answers, report["warnings"], report, finished.scored.run_dir)


def plan(settings: Settings | str | Path | None = None, /, *, model: Any = None, **values: Any) -> Plan:
    """Return what a run takes in memory, disk and minutes, from config.json alone: no GPU, no weights.

    Args:
        settings, model: as in ``settings_for``
        values: the same; the settings of its own section also without it, such as ``gpus=8``

    Raises:
        UserError: a model or value that cannot be planned with
    """
    from oneshot.planning.plan import make_plan
    from oneshot.settings import PlanSettings
    from oneshot.settings.layers import named

    own = {field.name: values.pop(field.name) for field in dataclasses.fields(PlanSettings) if field.name in values}
    if own:
        said = {name.removeprefix("plan."): value for name, value in named("plan", values.get("plan") or {})}
        values["plan"] = {**said, **own}
    asked = settings_for("plan", settings, model=model, **values)
    with going_offline(asked.offline):
        return make_plan(asked)


def export(out: str | Path, **options: Any) -> Exported:
    """Merge patches into a checkpoint, take them out again, or make one adapter from others. Collective.

    Args:
        out: folder to write, which must not exist or be empty
        options: fields of ``oneshot.report.exports.ExportRequest``, as ``model="DIR", adapters=["PATCH"]``

    Raises:
        UserError: as on the command line
    """
    from oneshot.distributed.runtime import start
    from oneshot.report.exports import ExportRequest, check_request
    from oneshot.report.exports import export as write
    from oneshot.settings.checks import fitted
    from oneshot.settings.kinds import kinds

    if isinstance(options.get("adapters"), (str, Path)):  # a text would be taken for a list of letters
        options["adapters"] = [options["adapters"]]
    known = kinds(ExportRequest)
    if unknown := sorted(options.keys() - known):
        raise UserError(f"export knows no {unknown[0]}: give some of {', '.join(sorted(known))}.")
    held = {name: fitted(known[name], value, name) if value != [] else value for name, value in options.items()}
    request = ExportRequest(out=Path(out), **held)
    check_request(request)
    return write(start(), request, "oneshot.export(...)")


def _settings(stage: str, settings: Any, model: Any, tokenizer: Any, values: dict[str, Any]) -> Settings:
    if hasattr(model, "save_pretrained"):
        asked = _written(stage, settings, model, tokenizer, values)
    elif tokenizer is not None:
        raise UserError("A tokenizer is given without a model in memory: give both, or a path alone.")
    else:
        asked = settings_for(stage, settings, model=model, **values)
    if asked.model.paths is not None:
        raise UserError("Setting model.paths is for the command oneshot repair: in Python repair one model.path each.")
    return asked


def _written(stage: str, settings: Any, model: Any, tokenizer: Any, values: dict[str, Any]) -> Settings:
    """The settings with a model in memory as the one that they name, a copy of it having been written."""
    from transformers.utils import logging

    from oneshot.checkpoint.writing.standing import mark_copy
    from oneshot.distributed.runtime import start
    from oneshot.report.runfolder import new_folder

    logging.disable_progress_bar()
    if tokenizer is None:
        raise UserError("A model in memory needs its tokenizer: give tokenizer=..., too.")
    if start().world_size > 1:
        raise UserError("A model in memory is for one process: save it, and give its folder as model.")
    name = Path(str(model.config._name_or_path or "model")).name or "model"  # the current folder has none
    asked = settings_for(stage, settings, model=name, **values)  # what is wrong is found before the copy is written
    out = new_folder(asked.out, asked.name or name)
    folder = out / _IN_MEMORY
    if folder.exists():
        raise UserError(f"{folder} is there already: give another out.")
    mark_copy(model, folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mark_copy(model, folder)  # again: PEFT writes into the card
    base = _write_base(model, out / _BASE_IN_MEMORY) or asked.model.base
    given = dataclasses.replace(asked.model, path=str(folder), base=base)
    return dataclasses.replace(asked, model=given, name=asked.name or name, out=str(out))


def _write_base(model: Any, folder: Path) -> str | None:
    """Write what a PEFT model stands on, whose weights in memory need not be those of the folder that it names."""
    from oneshot.checkpoint.writing.standing import mark_copy

    if not hasattr(model, "peft_config") or getattr(model.get_base_model(), "is_quantized", False):
        return None
    base = model.get_base_model()
    plain = {k.replace(".base_layer.", "."): v for k, v in base.state_dict().items() if ".lora_" not in k}
    mark_copy(model, folder)
    base.save_pretrained(folder, state_dict=plain)
    return str(folder)


def _complete(stage: str, settings: Settings) -> Settings:
    """Settings that were made in Python, where they can run: what layers of them would have found."""
    from oneshot.commandline import lacks_model
    from oneshot.patch.recipe import check_names

    check_names(settings.repair.method, settings.repair.learning_rate)
    if lacks_model(stage, settings.model.path, settings.score.endpoint.url):
        raise UserError("The settings name no model: give model=..., or leave the settings out to run the toy world.")
    return settings


def _changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with some of their fields, or of their sections' fields, changed; they check themselves."""
    from oneshot.settings.layers import over

    known = {field.name for field in dataclasses.fields(settings)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"There is no setting {unknown[0]}: give some of {', '.join(sorted(known))}.")
    return dataclasses.replace(settings, **{name: over(getattr(settings, name), values[name]) for name in values})


def _of_rank_0(report: dict[str, Any]) -> dict[str, Any]:
    from oneshot.distributed.runtime import gather_objects, start

    return gather_objects(start(), report)[0]
