"""A model's scores as it is, loaded or behind a server: which answers are missing, and what they are worth."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.update import Update, on_device
from oneshot.checkpoint.disk.files import is_degraded
from oneshot.checkpoint.loading.around import users_adapter
from oneshot.checkpoint.loading.configs import read_config
from oneshot.checkpoint.loading.load import Source, find_source, load_model, load_tokenizer
from oneshot.checkpoint.reads.digests import shared_fingerprint
from oneshot.checkpoint.writing.standing import why_not_as_measured
from oneshot.data.encoding import context_length
from oneshot.data.templates import thinks
from oneshot.data.vocabulary import check_tokens, rendered
from oneshot.distributed.engine import frozen
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError
from oneshot.measure.endpoint import open_endpoint
from oneshot.measure.harness import run_on_endpoint, run_on_model
from oneshot.measure.intervals import Rate
from oneshot.measure.probes import check_systems
from oneshot.measure.rates import Probe, StageScores, most_tokens, score_answers
from oneshot.measure.target import ask_missing, checkpoint_target, collect_answers, endpoint_target, generate_missing
from oneshot.measure.text import measure_text, read_texts
from oneshot.patch.attach import attached_update
from oneshot.patch.write import measured_form
from oneshot.settings import Settings
from oneshot.world.sources import check_words

Open = Callable[[str], Path]  # a name -> the run folder, once all that can be wrong has been looked at


@dataclass(frozen=True)
class Scored:
    """What was scored: what it is called, where the answers are, those of which probes, and what is to be said.

    Attributes:
        thinks: whether answers had room for a thought: by the template, or as a server's answers show
        fingerprint: of the weights, which tells them from all others; "" where they are on a server
    """

    name: str
    run_dir: Path
    probes: list[Probe]
    scores: StageScores
    warnings: list[str]
    thinks: bool
    fingerprint: str = ""


def score_served(runtime: Runtime, settings: Settings, probes: list[Probe], open_run: Open) -> Scored:
    """Ask the server what it has not answered yet; on one process.

    Raises:
        UserError: it cannot be reached, or rejects everything
    """
    score = settings.score
    endpoint = open_endpoint(score.endpoint, "score.endpoint")
    run_dir = open_run(f"{Path(endpoint.model).name}-score")
    asked = ask_missing(endpoint, run_dir, score)
    target = endpoint_target(endpoint, score.thought_tokens)
    answers = collect_answers(runtime, run_dir, target, probes, score.max_new_tokens, asked)
    answered = [(probe, answer) for probe, answer in zip(probes, answers) if answer is not None]
    left_out, warnings = len(probes) - len(answered), []
    if not answered:
        raise UserError(f"{endpoint.url} rejected all {len(probes)} prompts: there is nothing to score.")
    if left_out:
        warnings.append(
            f"The server rejected {left_out} of {len(probes)} prompts, too long for it or stopped by a filter of its "
            "own: they are left out of the figures."
        )
    kept = [probe for probe, _ in answered]
    scores = score_answers(kept, [answer for _, answer in answered], rouge=score.rouge)
    with phase("figures"):
        figures = run_on_endpoint(endpoint, score) if score.lm_eval is not None else {}
    name = f"{endpoint.model} at {endpoint.url}"
    thought = any("thought" in row for row in scores.answers)
    return Scored(name, run_dir, kept, _with_figures(scores, figures), warnings, thought)


def score_local(
    runtime: Runtime, settings: Settings, probes: list[Probe], open_run: Open, tell: Callable[[Source], None]
) -> Scored:
    """Load the model, unless all that is wanted is known, and let it answer. Collective.

    Args:
        tell: told of the model before it is loaded
    """
    score = settings.score
    with phase("check"):
        source = find_source(settings.model, runtime)
        adapter = users_adapter(source, trust_remote_code=settings.model.trust_remote_code)
        tokenizer = load_tokenizer(source, settings.model)
        check_words(settings, tokenizer)
        check_systems(probes, tokenizer)
        config = read_config(source.checkpoint, trust_remote_code=settings.model.trust_remote_code)
        check_tokens(config, tokenizer, rendered(tokenizer, (probe.messages for probe in probes)))
        texts = read_texts(score.text) if score.text is not None else []
    name = settings.called
    run_dir = open_run(f"{Path(name).name}-score")
    with contextlib.ExitStack() as loaded:
        update: Update = {}
        models: list[Any] = []

        def model() -> Any:
            if not models:
                tell(source)
                models.append(loaded.enter_context(frozen(runtime, load_model(runtime, source, settings.model))))
                update.update(on_device(adapter.update, runtime.device) if adapter else {})
                loaded.enter_context(attached_update(models[0], update))
            return models[0]

        answers = collect_answers(
            runtime,
            run_dir,
            checkpoint_target(runtime, source),
            probes,
            most_tokens(tokenizer, score),
            lambda prompts, finish: generate_missing(model(), tokenizer, runtime, score)(prompts, finish),
        )
        # a model in this process leaves no prompt out
        scores = score_answers(probes, [answer or "" for answer in answers], rouge=score.rouge)
        if texts or score.lm_eval is not None:
            scores = _with_figures(scores, _on_weights(runtime, settings, model(), tokenizer, update, texts))
    fingerprint, warnings = shared_fingerprint(runtime, source.checkpoint), list[str]()
    with agree(
        runtime, "looking where the model comes from"
    ):  # on the rank that reports: it may take the base's digests
        if runtime.is_main and _is_marked(source, double_quant=settings.model.double_quant):
            warnings.append("This model is marked as made unsafe by a harmful fine-tune: do not publish or serve it.")
    return Scored(name, run_dir, probes, scores, warnings, thinks(tokenizer), fingerprint)


def _is_marked(source: Source, *, double_quant: bool = False) -> bool:
    """Whether a model is safety-degraded: by its own marker, or its base's, which it is not known to repair."""
    if source.adapter is None or not is_degraded(source.checkpoint):
        return is_degraded(source.adapter or source.checkpoint)
    form = measured_form(source, double_quant=double_quant)
    return is_degraded(source.adapter) or bool(why_not_as_measured(source.adapter, source.checkpoint, form))


@phase("figures")
def _on_weights(
    runtime: Runtime, settings: Settings, model: Any, tokenizer: Any, update: Update, texts: list[str]
) -> dict[str, Rate]:
    """What takes the model itself: text figures and lm-eval's tasks. Collective."""

    @contextlib.contextmanager
    def without_adapter() -> Iterator[None]:
        kept = dict(update)
        update.clear()  # the hooks look it up at each pass
        try:
            yield
        finally:
            update.update(kept)

    found: dict[str, Rate] = {}
    if texts:
        limit = context_length(model.config, tokenizer, settings.model.max_length)
        found |= measure_text(runtime, model, tokenizer, texts, limit, without_adapter if update else None)
    if settings.score.lm_eval is not None:
        found |= run_on_model(model, tokenizer, settings.score)
    return found


def _with_figures(scores: StageScores, figures: dict[str, Rate]) -> StageScores:
    """The scores with further figures: lm-eval's shares among the rates, the others apart."""
    shares = {name: rate for name, rate in figures.items() if name.endswith("(lm-eval)") and 0 <= rate.value <= 1}
    others = {name: rate for name, rate in figures.items() if name not in shares}
    return dataclasses.replace(scores, rates=scores.rates | shares, others=scores.others | others)
