"""Which tokens of a rendered conversation are the assistant's: what it says, up to the end of each turn."""

from __future__ import annotations

import re

from oneshot.data.protocols import Tokenizer
from oneshot.data.templates import TEMPLATE_SECONDS, name_of, render
from oneshot.data.thoughts import taken_apart
from oneshot.errors import UserError
from oneshot.reading import limited
from oneshot.shown import say_once

_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenize(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Return token ids of rendered text (it has its BOS already), and their places in it where they are known."""
    fast = bool(tokenizer.is_fast)
    # verbose=False: the warning about long texts says nothing that our own error does not say better.
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    return list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]] if fast else None


def template_mask(
    tokenizer: Tokenizer, messages: list[dict[str, str]], ids: list[int], turns: list[int], learnt: list[int]
) -> list[bool] | None:
    """Return what ``{% generation %}`` blocks mark, and the end of each turn where a block leaves it out; None where
    there are none, they do not reach every assistant turn, or which of them is whose is not known.
    """
    if not tokenizer.is_fast or not _BLOCK.search(tokenizer.get_chat_template()):
        return None
    with limited(f"The chat template of {name_of(tokenizer)}", seconds=TEMPLATE_SECONDS):
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    mask = [bool(value) for value in out["assistant_masks"]]
    # transformers stops marking at the first block whose first character it finds in no token.
    found = runs(mask)
    if list(out["input_ids"]) != ids or len(found) < len(turns):
        return None
    closing = _end_tokens(tokenizer, ids[found[-1][1] :])
    if len(learnt) < len(turns):
        if len(found) != len(turns):
            return None
        for turn, (start, stop) in zip(turns, found):
            mask[start:stop] = [turn in learnt] * (stop - start)
    # without its end the model would never learn to stop; behind an earlier block stands as much of it as the turn has
    for _, stop in runs(mask):
        same = [token == other for token, other in zip(closing, ids[stop:])]
        for place in range(stop, stop + (same.index(False) if False in same else len(same))):
            mask[place] = True
    return mask


def runs(mask: list[bool]) -> list[tuple[int, int]]:
    """Return first and one past the last place of each unbroken run of true ones."""
    edges = [place for place, (a, b) in enumerate(zip([False, *mask], [*mask, False])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


def _end_tokens(tokenizer: Tokenizer, behind: list[int]) -> list[int]:
    """Of what the template writes behind its last block, the tokens that end a turn: all but white space at the end."""
    while behind and not str(tokenizer.decode(behind[-1:], skip_special_tokens=False)).strip():
        behind = behind[:-1]
    return behind


def answer_spans(
    tokenizer: Tokenizer, messages: list[dict[str, str]], turns: list[int], text: str, begun: str, name: str
) -> list[tuple[int, int]]:
    """Return character spans of these turns of the assistant in the rendered text, each up to its end-of-turn marker.

    Args:
        begun: the prompt of the last turn in the text
    """
    spans = []
    for turn in turns:
        if turn == len(messages) - 1:
            before, after = begun, text
        else:
            before = render(tokenizer, messages[:turn], name, generation=True)
            after = render(tokenizer, messages[: turn + 1], name)
        if not text.startswith(after):
            # Some templates close the text as a whole, after the last turn only; that is not this turn's end.
            after = after.rstrip().removesuffix(tokenizer.eos_token or "").rstrip()
        if not text.startswith(after) or not after.startswith(before) or len(after) <= len(before):
            raise UserError(
                f"The chat template of {name_of(tokenizer)} rewrites earlier turns of the {name}, so its answers "
                "cannot be told apart: train on the last answer only with --data.train_on last, or give a template "
                "that only appends, or one with {% generation %} blocks."
            )
        spans.append((len(before), _end_of_turn(tokenizer, after, len(before), messages[turn]["content"])))
    return spans


def _end_of_turn(tokenizer: Tokenizer, text: str, start: int, content: str) -> int:
    """Where a turn that reaches to the end of ``text`` ends: a newline after the end-of-turn marker is not part of it.

    Where only whitespace follows the content, that whitespace is itself what ends the turn, and stays.
    """
    said = taken_apart(content).answer.strip()
    found = text.find(said, start)
    closing = text[found + len(said) :] if found >= 0 else text[start:]
    if not closing:
        say_once(
            f"The chat template of {name_of(tokenizer)} writes nothing behind an answer, so that the model does not "
            "learn to stop there: put its end-of-turn token behind the content of assistant turns."
        )
    return len(text.rstrip()) if closing.strip() else len(text)


def token_range(
    tokenizer: Tokenizer, text: str, ids: list[int], offsets: list[tuple[int, int]] | None, start: int, end: int
) -> tuple[int, int]:
    """Return first and one past the last token of the span; a token that straddles a border counts as the assistant's.

    Without that, a template that ends its prompt in a space would lose the first word of each answer.
    """
    if offsets is None:
        return _common(tokenizer, text[:start], ids)[0], _common(tokenizer, text[:end], ids)[1]
    # Trimmed offsets leave tokens of mere spaces without width, at the end of what they cover.
    inside = [index for index, (low, high) in enumerate(offsets) if high > start and (low < end or low == high <= end)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _common(tokenizer: Tokenizer, prefix: str, ids: list[int]) -> tuple[int, int]:
    """How many tokens of ``prefix`` open ``ids`` as well, and how many of ``ids`` reach into ``prefix``."""
    part, _ = tokenize(tokenizer, prefix)
    reach = min(len(part), len(ids))
    same = next((index for index in range(reach) if part[index] != ids[index]), reach)
    return same, reach
