"""Thoughts that a model writes before its answer: how families mark them, where they end, and what is said after them.

A thought is not an answer. Who judges, compares or shows what a model says takes what follows the last closing mark;
where a thought was opened and never closed there is no answer yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK = "<think>"
# What opens a thought -> what closes it. Qwen3, QwQ, DeepSeek-R1, GLM and most others; Magistral; Seed-OSS; Command A;
# Kimi; Gemma; Sky-T1.
MARKS = {
    THINK: "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
    "<|channel>thought": "<channel|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
# Tags that an answer may hold for its own reasons, too: they count where it begins with them.
_AT_THE_START = {tag: tag.replace("<", "</") for tag in ("<thinking>", "<thought>", "<reasoning>")}
# What some families put around the answer proper, behind the thought.
_AROUND = re.compile(
    r"^\s*(?:<\|START_RESPONSE\|>|<\|begin_of_solution\|>|<response>)|"
    r"(?:<\|END_RESPONSE\|>|<\|end_of_solution\|>|</response>)\s*$"
)
CHANNEL = "<|channel|>"  # of gpt-oss: every message names its channel, and the one called final is the answer
FINAL = f"{CHANNEL}final<|message|>"
_FINAL = re.compile(r"<\|channel\|>final[^<]{0,40}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>")
_MESSAGE_ENDS = re.compile(r"<\|(?:end|return|call|start)\|>")
# The same where a server has left special tokens out: "analysisThe user asks ...assistantfinalHello."
_BARE_CHANNEL, _BARE_FINAL = re.compile(r"^\s*analysis(?=[A-Z])"), "assistantfinal"
# Special tokens that stay in decoded text, since they tell thought from answer.
KEPT_TOKENS = frozenset(
    {*MARKS, *MARKS.values(), CHANNEL, "<|channel>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>"}
)


@dataclass(frozen=True)
class Said:
    """What a model said, taken apart.

    Attributes:
        answer: what follows the last thought, "" where a thought is not finished; the whole where there is no thought
        thought: what comes before the answer, marks and all; none: no thought
        finished: false where a thought was opened and not closed
    """

    answer: str
    thought: str | None = None
    finished: bool = True


def taken_apart(text: str) -> Said:
    """Take apart what a model said, its special tokens that mark thoughts included."""
    if CHANNEL in text:
        return _channels(text)
    if _BARE_CHANNEL.search(text):
        thought, found, answer = text.rpartition(_BARE_FINAL)
        return Said(answer, thought) if found else Said("", text, finished=False)
    begun = text.lstrip()
    marks = MARKS | {tag: closing for tag, closing in _AT_THE_START.items() if begun.startswith(tag)}
    end = max((text.rfind(closing) + len(closing) for closing in marks.values() if closing in text), default=0)
    if opening(text[end:]) or any(mark in text[end:] for mark in MARKS):  # also after some words: "Okay. <think>"
        return Said("", text, finished=False)
    return Said(_AROUND.sub("", text[end:]).lstrip("\n"), text[:end]) if end else Said(text)


def opening(text: str) -> str:
    """Return the mark with which the text opens a thought, "" where it opens with none."""
    begun = text.lstrip()
    return next((mark for mark in (*MARKS, *_AT_THE_START) if begun.startswith(mark)), "")


def opened_at_end(prompt: str) -> str:
    """Return the mark with which a prompt ends, so that the model goes on with a thought; "" where with none."""
    end = prompt.rstrip()
    return next((mark for mark in MARKS if end.endswith(mark)), "")


def closed_unopened(text: str) -> str:
    """Return the mark of the thought that the text closes without having opened it, as the prompt has; "" for none."""
    return next((mark for mark, closing in MARKS.items() if closing in text and mark not in text), "")


def written(thought: str, mark: str = THINK) -> str:
    """Return a thought between its marks, as most families write it before the answer; an empty one is closed, too."""
    if mark != THINK:
        return f"{mark}{thought.strip()}{MARKS[mark]}"
    return f"{mark}\n{thought.strip()}\n{MARKS[mark]}\n\n"


def mentions_thoughts(template: str) -> bool:
    """Return whether a chat template knows of thoughts."""
    return CHANNEL in template or any(mark in template for mark in (*MARKS, *MARKS.values()))


def _channels(text: str) -> Said:
    finals = list(_FINAL.finditer(text))
    if not finals:
        return Said("", text, finished=False)
    start = finals[-1].end()
    ends = _MESSAGE_ENDS.search(text, start)
    return Said(text[start : ends.start() if ends else None], text[:start])
