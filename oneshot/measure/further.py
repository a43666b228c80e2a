"""What is measured beside the keywords' rates: further judges, one after the other, and their part of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.errors import UserError
from oneshot.measure.classifier import Classifier, ask_classifier, asker
from oneshot.measure.conditions import conditions, set_facts
from oneshot.measure.endpoint import Endpoint, open_endpoint
from oneshot.measure.formats import FORMATS
from oneshot.measure.judges import agreement
from oneshot.measure.overlap import Overlap
from oneshot.measure.rates import Probe, StageScores, unfinished_warnings
from oneshot.measure.rubric import ask_rubric, rubric_of
from oneshot.settings import ModelSettings, ScoreSettings


def check_judges(runtime: Runtime, score: ScoreSettings) -> None:
    """Say what is wrong with the further judges before anything is generated. Collective.

    Raises:
        UserError: a checkpoint, prompt, address or key that cannot be used, or a server that cannot be reached
    """
    from oneshot.checkpoint.loading.load import find_source

    with agree(runtime, "checking the judges"):
        if runtime.is_main and score.judge_model is not None:
            source = find_source(ModelSettings(path=score.judge_model), runtime)
            asker(source, FORMATS[score.judge_format], score.judge_template)
        if runtime.is_main and score.rubric.url is not None:
            rubric_of(score)
            open_endpoint(score.rubric, "score.rubric")


@phase("judge")
def ask_judges(
    runtime: Runtime,
    run_dir: Path,
    score: ScoreSettings,
    probes: Sequence[Probe],
    stages: Mapping[str, StageScores],
    classifier: Classifier | None = None,
) -> tuple[dict[str, StageScores], list[str]]:
    """Return the stages with all further judges' opinions and rates, and warnings. Collective.

    A judge that fails takes nothing from the figures that are there: it becomes a warning.

    Args:
        classifier: the one that the settings name, where it is loaded already
    """
    judged, warnings = dict(stages), unfinished_warnings(stages, score)
    if score.judge_model is not None:
        judged = ask_classifier(runtime, score, probes, judged, classifier)
    if score.rubric.url is not None:
        endpoint, problem = _opened(runtime, score)
        if not problem:
            judged, problem = ask_rubric(runtime, run_dir, endpoint, rubric_of(score), probes, judged)
        if problem:
            warnings.append(problem)
    return judged, warnings


def _opened(runtime: Runtime, score: ScoreSettings) -> tuple[Endpoint, str]:
    """The rubric's server, opened on rank 0 (the key stays there), and what is wrong with it."""
    endpoint, problem = Endpoint("", "", score.rubric), ""
    if runtime.is_main:
        try:
            endpoint = open_endpoint(score.rubric, "score.rubric")
        except UserError as error:
            problem = str(error)
    return endpoint, gather_objects(runtime, problem)[0]


def report_fields(
    score: ScoreSettings, stages: Mapping[str, StageScores], overlaps: Sequence[Overlap], *, thinks: bool
) -> dict[str, Any]:
    """Return what report.json holds of all this: under what conditions was judged, and what each figure of a set is;
    figures that are no shares and agreement of judges, both by stage; overlap.

    Args:
        thinks: whether answers had room for a thought
    """
    found = conditions(score, thinks=thinks)
    return {
        "conditions": found,
        "sets": set_facts(score, found, stages),
        "figures": {
            stage: {n: rate.as_dict() for n, rate in scores.others.items()} for stage, scores in stages.items()
        },
        "agreement": {stage: agreement(scores.answers) for stage, scores in stages.items()},
        "overlap": [dataclasses.asdict(overlap) for overlap in overlaps],
    }
