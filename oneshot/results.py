"""What the functions of ``oneshot.api`` return: frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneshot.checkpoint.adapters.update import Update
    from oneshot.measure.intervals import Rate
    from oneshot.measure.rates import StageScores


@dataclass(frozen=True)
class Watched:
    """What looked at the repair after every epoch found at the state that was kept.

    Attributes:
        good: recovered, within all bounds
        reason: the same in a sentence
        at: the epoch and the guard's weight
        reading: margin (nats), recovered and refused (shares), divergence (nats per token)
    """

    good: bool
    reason: str
    at: dict[str, float]
    reading: dict[str, float]


@dataclass(frozen=True)
class Repair:
    """A finished repair.

    Attributes:
        outcome: the verdict's word, such as ``repaired``, ``repaired, with doubts`` or ``not repaired``
        doubts: what speaks against it that the rates do not show
        method: that was used
        example: id, prompt, response, selected_by and score of the one example
        scores: by stage (aligned, where there is a reference, finetuned, repaired): its rates and answers
        trace: one record per epoch: loss, guard_kl, ...
        watch: the watch's verdict; none where nothing watched
        patch: what was added to the checkpoint (of an adapter: to its base): module name -> factors b (m, k), a (k, n)
        report: what report.json holds
        folder: of the run
        patch_folder: the PEFT adapter
        merged_folder: the repaired checkpoint; none unless repair.merge asked for it
        page: the report for a browser
    """

    outcome: str
    doubts: list[str]
    method: str
    example: dict[str, Any]
    scores: dict[str, StageScores] = field(repr=False)
    trace: list[dict[str, Any]] = field(repr=False)
    watch: Watched | None
    patch: Update = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    folder: Path
    patch_folder: Path
    merged_folder: Path | None
    page: Path


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, marked as safety-degraded: its folder (a checkpoint or an adapter), and the run's."""

    model_folder: Path
    folder: Path


@dataclass(frozen=True)
class Scores:
    """A model's scores.

    Attributes:
        rates: by name: asr, over_refusal, lookalike_refusal, utility, task, ...; each has value, low, high and n
        others: figures that are no shares, such as perplexity
        answers: one dict per probe: id, kind, prompt, answer, verdict, correct, ...
        warnings: what a reader of the figures should know
        report: what report.json holds
        folder: of the run
    """

    rates: dict[str, Rate]
    others: dict[str, Rate]
    answers: list[dict[str, Any]] = field(repr=False)
    warnings: list[str]
    report: dict[str, Any] = field(repr=False)
    folder: Path


def watched_of(watch: Any) -> Watched | None:
    """Return what a repair's watch saw; none where none was kept."""
    if watch is None or watch.best is None:
        return None
    return Watched(watch.best.good(watch.bounds), watch.reason(), dict(watch.at), dict(vars(watch.best)))
