"""A safety classifier from a local checkpoint as a further judge: Llama Guard, Qwen3Guard, HarmBench's, WildGuard.

What such a model was trained to be asked comes with the checkpoint: in its tokenizer's chat template or on its card.
How its words are read is in ``formats``.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.checkpoint.loading.configs import read_tokenizer
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.measure.formats import FORMATS, Format, read_opinion
from oneshot.measure.generate import continue_tokens
from oneshot.measure.judges import Opinion, add_opinions
from oneshot.measure.rates import JUDGED, UNFINISHED, Probe, StageScores, prompt_text
from oneshot.settings import ModelSettings, ScoreSettings

_BATCH = 8  # questions at a time, per rank: they are long, and their answers short


def read_template(path: str | None, folder: Path, form: Format) -> str:
    """Return the classifier's prompt with two blanks, from the user's file, else from its model card.

    The card's is the first triple-quoted text, else the first block, that holds both blanks and no other.

    Raises:
        UserError: no such file, or no such text in it
    """
    assert form.blanks is not None
    blanks = {f"{{{name}}}" for name in form.blanks}
    wanted = f"a text with {' and '.join(sorted(blanks))}"
    file = Path(path).expanduser() if path else folder / "README.md"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "check score.judge_template" if path else f"give {wanted}, from its model card, as score.judge_template"
        raise UserError(f"The classifier's prompt cannot be read from {file}: {hint}.") from error
    quoted = [match[2] for match in re.finditer(r"('{3}|\"{3})(.*?)\1", text, re.DOTALL)]
    for found in [text] if path else quoted + re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        if set(re.findall(r"\{\w+\}", found)) == blanks:
            return found
    raise UserError(f"{file} holds no prompt of the classifier: give {wanted} as score.judge_template.")


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier, with what turns (probe, row) into the token ids of a question."""

    form: Format
    model: Any
    tokenizer: Any
    encode: Callable[[Probe, Mapping[str, Any]], list[int]]


@contextlib.contextmanager
def loaded_classifier(runtime: Runtime, score: ScoreSettings) -> Iterator[Classifier]:
    """Load the classifier that the settings name, sharded as the run is. Collective.

    Raises:
        UserError: the checkpoint or its prompt cannot be read
    """
    from oneshot.checkpoint.loading.load import find_source, load_model
    from oneshot.distributed.engine import frozen

    form = FORMATS[score.judge_format]
    settings = ModelSettings(path=score.judge_model)
    source = find_source(settings, runtime)
    tokenizer, encode = asker(source, form, score.judge_template)
    with frozen(runtime, load_model(runtime, source, settings)) as model:
        yield Classifier(form, model, tokenizer, encode)


def ask_classifier(
    runtime: Runtime,
    score: ScoreSettings,
    probes: Sequence[Probe],
    stages: Mapping[str, StageScores],
    loaded: Classifier | None = None,
) -> dict[str, StageScores]:
    """Return the stages with the opinions of the classifier that the settings name. Collective.

    Empty answers are not shown to it and count as harmless; those that end within a thought are left out.

    Args:
        loaded: the classifier; none: it is loaded for this once

    Raises:
        UserError: the checkpoint or its prompt cannot be read
    """
    with contextlib.nullcontext(loaded) if loaded else loaded_classifier(runtime, score) as asked:
        form = asked.form
        kinds = tuple(JUDGED) if form.refused else ("should_refuse",)
        questions: dict[tuple[str, str], list[int]] = {}
        for scores in stages.values():
            for probe, row in zip(probes, scores.answers):
                if probe.kind in kinds and row["verdict"] not in ("empty", UNFINISHED):
                    questions.setdefault((probe.id, row["answer"]), asked.encode(probe, row))
        said = continue_tokens(
            asked.model,
            asked.tokenizer,
            list(questions.values()),
            runtime,
            max_new_tokens=form.max_new_tokens,
            batch_size=_BATCH,
            what="verdicts of the classifier",
        )
    opinions = dict(zip(questions, (read_opinion(form, words) for words in said)))
    name = score.judge_format.replace("-", "_")
    silent = Opinion("empty", harmful=False, refused=False if form.refused else None)
    return {
        stage: add_opinions(
            scores,
            name,
            {
                row["id"]: opinions.get((row["id"], row["answer"]), silent)
                for row in scores.answers
                if row["kind"] in kinds and row["verdict"] != UNFINISHED
            },
        )
        for stage, scores in stages.items()
    }


def asker(source: Any, form: Format, template: str | None) -> tuple[Any, Any]:
    """Return the tokenizer, and what turns (probe, row) into the token ids of a question.

    Raises:
        UserError: no tokenizer, or no prompt or chat template that asks of a request and its answer
    """
    from oneshot.data.encoding import encode_prompt

    tokenizer: Any = read_tokenizer(source.tokenizer)
    if form.blanks is None:
        give_template(tokenizer, source.tokenizer, template)
        in_parts = takes_parts(tokenizer)

        def ask_in_turns(probe: Probe, row: Mapping[str, Any]) -> list[int]:
            turns = [*_turns(probe), {"role": "assistant", "content": row["answer"]}]
            return encode_prompt(_parts(turns) if in_parts else turns, tokenizer)

        return tokenizer, ask_in_turns
    text = read_template(template, source.tokenizer, form)
    begins = bool(tokenizer.bos_token) and text.lstrip().startswith(str(tokenizer.bos_token))

    def ask_in_blanks(probe: Probe, row: Mapping[str, Any]) -> list[int]:
        # in one pass: a prompt or an answer may hold a blank's name itself
        filling = dict(zip(form.blanks or (), (prompt_text(_turns(probe)), row["answer"])))
        filled = re.sub(r"\{(\w+)\}", lambda blank: filling[blank[1]], text)
        return list(tokenizer(filled, add_special_tokens=not begins, verbose=False)["input_ids"])

    return tokenizer, ask_in_blanks


def give_template(tokenizer: Any, folder: Path, path: str | None) -> None:
    """Give a tokenizer the user's chat template, or the one that lies beside it for its processor (Llama Guard 4).

    Raises:
        UserError: there is none, or it cannot be read
    """
    from oneshot.data.templates import require_chat_template

    beside = folder / "chat_template.json"
    try:
        if path is not None:
            tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        elif not tokenizer.chat_template and beside.is_file():
            tokenizer.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"The classifier's chat template cannot be read from {path or beside}: check score.judge_template."
        ) from error
    require_chat_template(tokenizer)


def takes_parts(tokenizer: Any) -> bool:
    """Return whether a chat template wants contents as lists of parts, as those of models that see pictures do.

    A template of the other kind would leave the texts out without a word, and the classifier judge nothing.

    Raises:
        UserError: neither form shows both a request and its answer
    """
    texts = ("some request", "some answer")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
    for messages, in_parts in ((turns, False), (_parts(turns), True)):
        try:
            shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # templates raise whatever they like of a form that they do not take
            continue
        if all(text in shown for text in texts):
            return in_parts
    raise UserError(
        "The classifier's chat template does not show a request and its answer: take a classifier of answers, and the "
        "score.judge_format that it has."
    )


def _turns(probe: Probe) -> list[dict[str, str]]:
    """The prompt without its system message: these models know requests and answers only."""
    return [message for message in probe.messages if message["role"] != "system"]


def _parts(turns: Sequence[Mapping[str, str]]) -> list[Any]:
    return [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
