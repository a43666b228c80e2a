"""How a patch is served: the command that a run ends with, on console, card and report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.carrier import STACKED, served_form
from oneshot.checkpoint.adapters.experts import PROJECTIONS
from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, local_folder, read_json
from oneshot.checkpoint.names import CONFIG
from oneshot.checkpoint.writing.identity import read_identity

# what vLLM 0.32 takes as --max-lora-rank (vllm/config/lora.py); without the flag it serves ranks up to the default
RANKS, DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16


def serve_command(patch: Path, shown: str) -> str:
    """Return the command by which vLLM serves a patch beside the model that it is for; "" where it takes no such patch.

    So it is of some ranks, and of Llama-4's experts, whose A and B PEFT has the other way round: these are merged.

    Args:
        patch: folder of the adapter, which says what its base is, and of which commit
        shown: how the folder is called in the command
    """
    if not (patch / ADAPTER_CONFIG).is_file():
        return ""
    config, identity = read_json(patch / ADAPTER_CONFIG), read_identity(patch)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    fits = next((taken for taken in RANKS if taken >= rank), None)
    if fits is None:
        return ""
    base = identity.base if identity is not None else config.get("base_model_name_or_path") or "BASE"
    pinned = ["--revision", config["revision"]] if config.get("revision") else []
    wide = [] if rank <= DEFAULT_RANK else ["--max-lora-rank", str(fits)]
    named, mixed = f"safe={shown}", list[str]()
    kind = _model_type(base) if _experts_together(config) else ""
    if kind.startswith("llama4"):
        return ""
    if kind and served_form(kind) != STACKED:  # of a model that is not here it is believed that they are taken as is
        mixed = ["--enable-mixed-moe-lora-format"]
        named = json.dumps({"name": "safe", "path": shown, "is_3d_lora_weight": True})
    return shlex.join(["vllm", "serve", base, *pinned, "--enable-lora", *wide, *mixed, "--lora-modules", named])


def _experts_together(config: dict[str, Any]) -> bool:
    """Whether an adapter holds the factors of all experts of a parameter together (3-D)."""
    return any(str(name).rsplit(".", 1)[-1] in PROJECTIONS for name in config.get("target_parameters") or [])


def _model_type(base: str) -> str:
    """The type that a base's config names; "" where the base is not here."""
    folder = local_folder(base)
    if folder is None or not (folder / CONFIG).is_file():
        return ""
    fields = read_json(folder / CONFIG)
    return str(fields.get("model_type") or "") if isinstance(fields, dict) else ""
