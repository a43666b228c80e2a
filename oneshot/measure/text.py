"""Plain text: how well a model predicts it, and how far an adapter moves the prediction."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from oneshot.data.protocols import CausalLM, Tokenizer
from oneshot.data.rows import read_rows
from oneshot.distributed.runtime import Runtime, gather_objects
from oneshot.distributed.steps import each
from oneshot.distributed.watchdog import alive
from oneshot.errors import UserError
from oneshot.measure.generate import evaluating, share_of
from oneshot.measure.intervals import Rate, ratio_rate

COLUMN = "text"


def read_texts(source: str) -> list[str]:
    """Return the texts of a file: of a .txt its paragraphs (blank lines between them), else its column ``text``.

    Raises:
        UserError: a file that cannot be read, or without texts
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".txt":
        try:
            whole = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Setting score.text names {source}, which is no readable UTF-8 text file.") from error
        texts = ["\n".join(block).strip() for block in _blocks(whole)]
    else:
        texts = []
        for place, row in read_rows(source, "train"):
            if not isinstance(row, dict) or not isinstance(row.get(COLUMN), str):
                raise UserError(f"{place}: no column {COLUMN!r} with a text, which score.text needs.")
            texts.append(row[COLUMN].strip())
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{source} holds no texts: give a file with at least one.")
    return texts


def measure_text(
    runtime: Runtime,
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: list[str],
    limit: int,
    without_adapter: Callable[[], AbstractContextManager[Any]] | None = None,
) -> dict[str, Rate]:
    """Return ``perplexity`` and, for a model with an adapter, ``perplexity_without_adapter`` and ``kl_per_token``.

    Each text is cut after ``limit`` tokens and predicted by itself, from its first token on (its beginning-of-text
    token, where the tokenizer writes one). The divergence is KL(without || with), in nats per predicted token. n is the
    number of texts that predict anything; intervals come from resampling texts. Collective.

    Args:
        limit: longest sequence in tokens
        without_adapter: within its context the model computes without the adapter; none: there is no adapter
    """
    import torch

    from oneshot.training.objective import cross_entropy_sum, kl_sum

    encoded = [tokenizer(text, truncation=True, max_length=limit, verbose=False)["input_ids"] for text in texts]
    encoded = [ids for ids in encoded if len(ids) > 1]
    if not encoded:
        raise UserError("The texts of score.text have no two tokens each: give longer ones.")
    indices, own = share_of([len(ids) for ids in encoded], runtime.rank, runtime.world_size)
    mine = []
    with evaluating(model), torch.no_grad():
        for place, index in enumerate(each(indices, "texts", "texts of this rank")):
            alive()
            ids = torch.tensor([encoded[index]], device=runtime.device)  # (1, tokens) int64
            logits = model(input_ids=ids, use_cache=False).logits
            loss, before, moved = float(cross_entropy_sum(logits, ids)), 0.0, 0.0
            if without_adapter is not None:
                with without_adapter():
                    reference = model(input_ids=ids, use_cache=False).logits
                before = float(cross_entropy_sum(reference, ids))
                moved = float(kl_sum(logits[0, :-1], reference[0, :-1]))
            if place < own:
                mine.append((index, loss, before, moved, float(len(encoded[index]) - 1)))
    rows = sorted(row for share in gather_objects(runtime, mine) for row in share)
    _, losses, unmoved, moves, tokens = (list(column) for column in zip(*rows))
    found = {"perplexity": ratio_rate(losses, tokens, of=_exp)}
    if without_adapter is not None:
        found["perplexity_without_adapter"] = ratio_rate(unmoved, tokens, of=_exp)
        found["kl_per_token"] = ratio_rate(moves, tokens)
    return found


def _exp(nats: float) -> float:
    with contextlib.suppress(OverflowError):
        return math.exp(nats)
    return math.inf


def _blocks(whole: str) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in whole.splitlines():
        if line.strip():
            blocks[-1].append(line)
        else:
            blocks.append([])
    return blocks
