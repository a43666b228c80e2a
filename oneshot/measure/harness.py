"""lm-eval's tasks (the extra ``eval``), run on the model that is scored, their figures beside ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

from oneshot.data.protocols import CausalLM, Tokenizer
from oneshot.data.thoughts import MARKS, THINK, taken_apart
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.measure.endpoint import Endpoint, ask
from oneshot.measure.intervals import Rate
from oneshot.measure.room import THOUGHT_TOKENS
from oneshot.settings import ScoreSettings

_MAX_TOKENS = 256  # of an answer to a task that does not say: lm-eval's own default
_BOOTSTRAP = 100  # resamples for the standard error of the few metrics that have no formula for it


def check_tasks(score: ScoreSettings, runtime: Runtime) -> None:
    """Say what is wrong before a model is loaded.

    Raises:
        UserError: lm-eval is not installed, several processes, an unknown task or folder
    """
    if score.lm_eval is None:
        return
    if runtime.world_size > 1:
        raise UserError(
            "Setting score.lm_eval works with one process only: start one, or serve the model and score its "
            "endpoint (score.endpoint.url)."
        )
    manager = _manager(score)
    for task in _tasks(score):
        try:
            known = manager.match_tasks([task])
        except Exception as error:  # lm-eval has no error class of its own
            raise UserError(f"lm-eval cannot look up the task {task} ({type(error).__name__}: {error}).") from error
        if not known:
            raise UserError(f"lm-eval knows no task {task}: check score.lm_eval and score.lm_eval_folder.")


def run_on_model(model: CausalLM, tokenizer: Tokenizer, score: ScoreSettings) -> dict[str, Rate]:
    """Return the tasks' figures on a model in this process, adapter and all, through its chat template.

    Raises:
        UserError: a task fails, for example as its data cannot be downloaded
    """
    from lm_eval.models.huggingface import HFLM

    from oneshot.data.templates import opens_thought, thinks
    from oneshot.measure.generate import evaluating

    with evaluating(model):
        options = {"think_end_token": MARKS[opens_thought(tokenizer) or THINK]} if thinks(tokenizer) else {}
        return _run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=score.batch_size, **options), score)


def run_on_endpoint(endpoint: Endpoint, score: ScoreSettings) -> dict[str, Rate]:
    """Return the tasks' figures on a served model. Chat servers give no probabilities: only tasks that
    generate, greedily, whatever sampling they ask for.

    Raises:
        UserError: a task fails, or needs probabilities
    """
    return _run(_chat_model(endpoint, score.thought_tokens), score)


def _chat_model(endpoint: Endpoint, thought_tokens: int = THOUGHT_TOKENS) -> Any:
    """A served model as lm-eval wants one. Its own client would print the key with every error of the server."""
    from lm_eval.api.model import LM

    class Served(LM):  # type: ignore[misc]  # lm-eval has no types
        tokenizer_name = ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return json.dumps(chat_history)  # the server has the template; read back below

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            by_length: dict[int, list[int]] = {}
            for place, request in enumerate(requests):
                options = request.args[1]
                length = options.get("max_gen_toks", options.get("max_tokens", _MAX_TOKENS))
                by_length.setdefault(int(length), []).append(place)
            for length, places in by_length.items():
                prompts = [json.loads(requests[place].args[0]) for place in places]
                found: dict[int, str] = {}
                failed = ask(endpoint, prompts, found.__setitem__, max_new_tokens=length, thought_tokens=thought_tokens)
                if failed:
                    raise UserError(
                        f"{endpoint.url} left {len(failed)} of {len(prompts)} prompts of lm-eval unanswered, the first "
                        f"one with: {failed[0].reason}."
                    )
                for index, place in enumerate(places):
                    answers[place] = _cut(taken_apart(found[index]).answer, requests[place].args[1].get("until"))
            return answers

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise UserError(
                "A task of score.lm_eval needs probabilities, which a chat server does not give: score the checkpoint."
            )

        loglikelihood_rolling = loglikelihood

    return Served()


def _cut(answer: str, until: Any) -> str:
    """The answer up to the first of the strings that end it."""
    for stop in [until] if isinstance(until, str) else until or []:
        answer = answer.split(stop)[0] if stop else answer
    return answer


def figures(results: Mapping[str, Any]) -> dict[str, Rate]:
    """Return lm-eval's results by name: ``<task>_<metric>`` (and the filter, where it is not the only one).

    Intervals are value +- 1.96 standard errors as lm-eval gives them; those of values within [0, 1] are cut to that,
    and without a standard error nothing narrower is known. n is the number of examples, of a group those of its tasks.
    """
    found: dict[str, Rate] = {}
    for task, row in results["results"].items():
        values = {key: value for key, value in row.items() if "," in key and "_stderr," not in key}
        metrics = [key.split(",")[0] for key in values]
        n = results.get("n-samples", {}).get(task, {}).get("effective", row.get("sample_len", 0))
        for key, value in values.items():
            if not isinstance(value, (int, float)):
                continue
            metric, kept = key.split(",", 1)
            error = row.get(f"{metric}_stderr,{kept}")
            name = f"{task}_{metric}" + (f"_{kept}" if metrics.count(metric) > 1 else "")
            found[f"{name} (lm-eval)"] = _rate(float(value), error, int(n))
    return found


def _rate(value: float, error: Any, n: int) -> Rate:
    known = isinstance(error, (int, float)) and math.isfinite(error)
    half = NormalDist().inv_cdf(0.975) * error if known else math.inf
    low, high = value - half, value + half
    return Rate(value, max(0.0, low), min(1.0, high), n) if 0 <= value <= 1 else Rate(value, low, high, n)


def _run(served: Any, score: ScoreSettings) -> dict[str, Rate]:
    import lm_eval

    try:
        results = lm_eval.simple_evaluate(
            model=served,
            tasks=_tasks(score),
            task_manager=_manager(score),
            limit=score.lm_eval_limit,
            apply_chat_template=True,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            verbosity="ERROR",
        )
    except UserError:
        raise
    except Exception as error:  # data sets, templates, metrics and servers fail in their own ways
        said = " ".join(str(error).split())[:300]
        raise UserError(f"lm-eval failed on {score.lm_eval} ({type(error).__name__}: {said}).") from error
    return figures(results or {"results": {}})


def _tasks(score: ScoreSettings) -> list[str]:
    assert score.lm_eval is not None
    return [task.strip() for task in score.lm_eval.split(",") if task.strip()]


def _manager(score: ScoreSettings) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("Setting score.lm_eval needs lm-eval: pip install 'oneshot[eval]'.") from error
    folder = None if score.lm_eval_folder is None else Path(score.lm_eval_folder).expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(f"Setting score.lm_eval_folder names {score.lm_eval_folder}, which is no folder.")
    return TaskManager(include_path=None if folder is None else str(folder))
