"""What a repair measures of the aligned model, the reference or the base of the user's adapter, and learns of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.loading.load import Source, load_model
from oneshot.distributed.engine import frozen
from oneshot.distributed.phases import phase
from oneshot.measure.rates import score_model
from oneshot.patch.teacher import learn, wanted

if TYPE_CHECKING:
    from oneshot.measure.rates import StageScores
    from oneshot.patch.request import Request
    from oneshot.patch.teacher import Teacher


def scored(request: Request, model: Any, called: str) -> StageScores:
    """Return the scores of a model on a request's probes. Collective."""
    what = f"answers of the {called} model"
    return score_model(model, request.tokenizer, request.probes, request.runtime, request.settings.score, what)


def of_reference(request: Request) -> tuple[dict[str, StageScores], Teacher | None]:
    """Return scores of the reference and what it teaches, as far as wanted; it is loaded at most once. Collective."""
    runtime, settings, reference = request.runtime, request.settings, request.reference
    stages: dict[str, StageScores] = {}
    teacher = None
    asked = request.adapter is None and wanted(request)
    if reference is not None and (settings.score.reference or asked):
        source = Source(reference, None, reference, str(reference), request.source.dtype, request.source.written)
        with frozen(runtime, load_model(runtime, source, settings.model)) as model:
            if settings.score.reference:
                stages["aligned"] = scored(request, model, "aligned")
            if asked:
                with phase("choose"):
                    teacher = learn(request, model)
    return stages, teacher


def of_base(request: Request, base: Any) -> dict[str, StageScores]:
    """Return scores of the base that an adapter was trained on; none where a reference is given, or they are not
    wanted. Collective.
    """
    if request.adapter is None or request.reference is not None or not request.settings.score.reference:
        return {}
    return {"aligned": scored(request, base, "aligned")}
