"""How a patch is served: the command that a run ends with, on console, card and report."""

from __future__ import annotations

import shlex
from pathlib import Path

from oneshot.checkpoint.files import ADAPTER_CONFIG, read_json

# what vLLM 0.32 takes as --max-lora-rank (vllm/config/lora.py); without the flag it serves ranks up to the default
RANKS, DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16


def serve_command(base: str, patch: str, rank: int) -> str:
    """Return the command by which vLLM serves a patch beside the model that it is for; "" where it takes no such rank.

    Args:
        base: the checkpoint that it belongs to, a folder or a Hub id
        patch: folder of the adapter
        rank: the largest of its modules; 0 where that is not known
    """
    fits = next((taken for taken in RANKS if taken >= rank), None)
    if not rank or fits is None:
        return ""
    wide = [] if rank <= DEFAULT_RANK else ["--max-lora-rank", str(fits)]
    return shlex.join(["vllm", "serve", base, "--enable-lora", *wide, "--lora-modules", f"safe={patch}"])


def largest_rank(patch: Path) -> int:
    """Return the largest rank of an adapter's modules, as its config states them; 0 where there is none."""
    if not (patch / ADAPTER_CONFIG).is_file():
        return 0
    config = read_json(patch / ADAPTER_CONFIG)
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))
