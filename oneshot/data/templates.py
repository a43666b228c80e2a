"""Chat templates: messages to text, what generation begins with, and what a template does with thoughts and system."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from oneshot.data.protocols import Tokenizer
from oneshot.data.thoughts import (
    CHANNEL,
    FINAL,
    MARKS,
    mentions_thoughts,
    opened_at_end,
    opening,
    taken_apart,
    written,
)  # fmt: skip
from oneshot.errors import UserError
from oneshot.reading import limited
from oneshot.shown import say_once

# What rendering a conversation may take, and how much longer than the conversation the text may be. Templates of known
# models take milliseconds, and add a system message and some markers to each turn.
TEMPLATE_SECONDS, _TEMPLATE_MEMORY = 5.0, 1 << 30
_TEMPLATE_ADDS, _TEMPLATE_TIMES = 1_000_000, 10
THOUGHT = "reasoning_content"  # of a message; templates that call it otherwise get it under their name
_THOUGHT_NAMES = (THOUGHT, "thinking", "reasoning")
_SWITCHES = ("enable_thinking", "thinking", "reasoning")  # variables with which templates let a model think or not
_HARMONY = "<|start|>assistant"  # with which gpt-oss's generation prompt ends
_TELLING = 20  # characters that do not stand in a text by chance
_HELLO = [{"role": "user", "content": "Hello?"}]

Messages = Sequence[Mapping[str, str]]


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Raise UserError where the tokenizer has no chat template (or several, none of them called default)."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or (isinstance(template, dict) and not template.get("default")):
        raise UserError(
            f"Tokenizer {name_of(tokenizer)} has no chat template: use an instruction-tuned checkpoint or put a "
            "chat_template.jinja into its folder."
        )


def render(tokenizer: Tokenizer, messages: Messages, name: str, *, generation: bool = False, **options: Any) -> str:
    """Return messages as the template writes them.

    Args:
        name: of what is rendered, for messages
        generation: with the generation prompt at the end
        options: variables of the template

    Raises:
        UserError: the template rejects the messages, leaves their system message out, or is damaged
    """
    text = _rendered(tokenizer, messages, name, generation, options)
    _check_system(tokenizer, messages, name, text)
    return text


def generation_prompt(tokenizer: Tokenizer, messages: Messages, name: str, *, closed: bool) -> str:
    """Return messages as the template writes them, up to where the model's answer begins.

    Args:
        name: of what is rendered, for messages
        closed: behind an empty thought, closed as the family writes it, where the model would think first

    Raises:
        UserError: as ``render``
    """
    text = render(tokenizer, messages, name, generation=True)
    if not closed or not mentions_thoughts(_template(tokenizer)):
        return text
    off = switched_off(tokenizer)
    if off:
        quiet = render(tokenizer, messages, name, generation=True, **off)
        if quiet != text and not opened_at_end(quiet):
            return quiet
    if CHANNEL in _template(tokenizer) and text.endswith(_HARMONY):
        return text + FINAL
    mark = opened_at_end(text)
    return without_mark(text, mark) + written("", mark) if mark else text


def without_mark(prompt: str, mark: str) -> str:
    """Return a prompt that ends with the mark of a thought without it."""
    return prompt.rstrip().removesuffix(mark)


def switched_off(tokenizer: Tokenizer) -> dict[str, bool]:
    """Return the template's variables that have the model not think, as they are given to it; empty for none."""
    template = _template(tokenizer)
    return {name: False for name in _SWITCHES if re.search(rf"\b{name}\b", template)}


def opens_thought(tokenizer: Tokenizer) -> str:
    """Return the mark of the thought that the generation prompt opens, "" where it opens none."""
    if not mentions_thoughts(_template(tokenizer)):
        return ""
    return opened_at_end(render(tokenizer, _HELLO, "prompt", generation=True))


def thinks(tokenizer: Tokenizer) -> bool:
    """Return whether a model asked through this template may think before it answers.

    So it is where the template knows of thoughts, and its generation prompt does not close one.
    """
    if not mentions_thoughts(_template(tokenizer)):
        return False
    return not render(tokenizer, _HELLO, "prompt", generation=True).rstrip().endswith((*MARKS.values(), FINAL))


def whole(tokenizer: Tokenizer, messages: list[dict[str, str]], name: str, *, closed: bool) -> tuple[str, str]:
    """Return the conversation as the model sees and writes it, and the prompt of its last answer in it; "" for none.

    Templates whose generation prompt opens a thought write an answer without one as if none had been opened; what the
    model sees is the prompt, so that the thought is put back, or an empty one, closed.
    """
    if messages[-1]["role"] != "assistant":
        return render(tokenizer, messages, name), ""
    thought = messages[-1].get(THOUGHT, "")
    prompt = generation_prompt(tokenizer, messages[:-1], name, closed=False)
    mark = opened_at_end(prompt)
    if closed:
        begun = shut = generation_prompt(tokenizer, messages[:-1], name, closed=True)
    else:
        begun, shut = prompt, without_mark(prompt, mark) + written(thought, mark) if mark else prompt
    text = render(tokenizer, messages, name, **(switched_off(tokenizer) if begun != prompt else {}))
    dropped = bool(thought) and thought not in text
    if dropped and not mark and mentions_thoughts(tokenizer.get_chat_template()):
        shut = prompt + written(thought)
    elif dropped and not mark:
        say_once(
            f"The chat template of {name_of(tokenizer)} leaves {THOUGHT} of the answers out: they are learnt without."
        )
    stem = next((start for start in (prompt, without_mark(prompt, mark)) if text.startswith(start)), None)
    if stem is None or shut == prompt or (text.startswith(begun) and not dropped):
        return text, begun
    rest = text[len(stem) :]
    if dropped and opening(rest):
        rest = taken_apart(rest).answer  # an empty thought that the template has put in its place
    return shut + rest, begun


def thought_apart(tokenizer: Tokenizer, message: dict[str, str], *, keep: bool) -> dict[str, str]:
    """Return the message with its thought, which may stand in its content, in a field of its own; or without it."""
    if message["role"] != "assistant":
        return message
    said = taken_apart(message["content"])
    knows = mentions_thoughts(tokenizer.get_chat_template())
    inside = said.thought if said.answer.strip() and (knows or not keep) else None
    thought = _bare(message.get(THOUGHT) or inside or "")
    found = {"role": message["role"], "content": message["content"] if inside is None else said.answer}
    if thought and not keep:
        say_once("Thoughts before the example's refusal are left out: a repair learns it behind an empty thought.")
    return {**found, THOUGHT: thought} if thought and keep else found


def _bare(thought: str) -> str:
    """A thought without the marks around it."""
    for mark, closing in MARKS.items():
        thought = thought.strip().removeprefix(mark).removesuffix(closing)
    return thought.strip()


def name_of(tokenizer: Tokenizer) -> str:
    """Return what a tokenizer is called in messages."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _rendered(tokenizer: Tokenizer, messages: Messages, name: str, generation: bool, options: Mapping[str, Any]) -> str:
    import jinja2

    given = [_with_thought(tokenizer, message) for message in messages]
    try:
        with limited(f"The chat template of {name_of(tokenizer)}", seconds=TEMPLATE_SECONDS, memory=_TEMPLATE_MEMORY):
            made = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generation, **options)
            text = str(made)
    except UserError:
        raise
    except (
        jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()).rstrip(".")
        system = bool(given) and given[0].get("role") == "system"
        hint = "; --data.system user puts a system message before the first user turn" if system else ""
        raise UserError(
            f"The chat template of {name_of(tokenizer)} rejects the {name} ({reason}): "
            f"give messages whose roles it knows (some take no system message){hint}."
        ) from error
    most = _TEMPLATE_ADDS + _TEMPLATE_TIMES * sum(len(content) for m in messages for content in m.values())
    if len(text) > most:
        raise UserError(
            f"The chat template of {name_of(tokenizer)} makes {len(text):,} characters of the {name}, more than "
            f"{most:,}: it is damaged or hostile, leave it out."
        )
    return text


def _check_system(tokenizer: Tokenizer, messages: Messages, name: str, text: str) -> None:
    """Raise UserError where the template leaves the system message out: what it asks for would silently not be."""
    if not messages or messages[0].get("role") != "system":
        return
    content = messages[0]["content"].strip()
    if content in text and len(content) > _TELLING:
        return
    # a few letters may be there by chance, and it may write them in another form: another message gives another text
    others = [{**messages[0], "content": "Something else."}, *messages[1:]]
    if _rendered(tokenizer, others, name, False, {}) == _rendered(tokenizer, messages, name, False, {}):
        raise UserError(
            f"The chat template of {name_of(tokenizer)} leaves out the system message of the {name}: put it before the "
            "first user turn with --data.system user, or leave it out."
        )


def _with_thought(tokenizer: Tokenizer, message: Mapping[str, str]) -> dict[str, str]:
    """The message, its thought under the name that the template knows it by."""
    given = dict(message)
    if THOUGHT in given:
        template = _template(tokenizer)
        known = next((name for name in _THOUGHT_NAMES if re.search(rf"\b{name}\b", template)), THOUGHT)
        given[known] = given.pop(THOUGHT)
    return given


def _template(tokenizer: Tokenizer) -> str:
    return tokenizer.get_chat_template()
