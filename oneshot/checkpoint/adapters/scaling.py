"""How PEFT scales the factors of each module of a LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from oneshot.errors import UserError
from oneshot.reading import first_match, limited

_PEFT_ALPHA = 8  # PEFT's default, where a config names none
_PATTERN_SECONDS = 5.0  # for all modules of a model together, of which there are thousands


def rank_of(config: dict[str, Any], name: str, path: Path) -> int:
    """Return the rank that PEFT gives to what a config means by a name: its ``r``, or that of a pattern.

    Args:
        path: of the config, for messages

    Raises:
        UserError: it is no rank
    """
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path} has a rank_pattern that is no JSON object: restore it from its source.")
    with limited(f"Matching the rank_pattern of {path}", seconds=_PATTERN_SECONDS):
        own = first_match(patterns, name, path)
    rank = config.get("r") if own is None else own
    if type(rank) is not int or rank < 1:
        raise UserError(f"{path} gives {name} the rank {str(rank)[:80]!r}, which is none: restore it from its source.")
    return rank


def scalings(config: dict[str, Any], ranks: dict[str, int], path: Path) -> dict[str, float]:
    """PEFT's scaling of every module: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA.

    Args:
        ranks: by module; one of 0 has none
        path: of the config, for messages
    """
    alphas, patterns = config.get("lora_alpha", _PEFT_ALPHA), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path} has an alpha_pattern that is no JSON object: restore it from its source.")
    for name, alpha in (
        ("lora_alpha", alphas),
        *((f"alpha_pattern {key[:80]!r}", one) for key, one in patterns.items()),
    ):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise UserError(f"{path} has {name} {alpha!r}, which is no number: restore it from its source.")
    found = {}
    with limited(f"Matching the alpha_pattern of {path}", seconds=_PATTERN_SECONDS):
        for module, rank in ranks.items():
            own = first_match(patterns, module, path)
            alpha = float(alphas if own is None else own)
            if rank:
                found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found
