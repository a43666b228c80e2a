"""A user's adapter that PEFT loads in part is found before a repair, and its repair is written so that PEFT loads it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_carrier import close, logits_of, merged, product, tiny
from tiny import build_tokenizer, tiny_runtime

from oneshot.checkpoint.adapters import injected
from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.adapters.carrier import APART, Carried
from oneshot.checkpoint.adapters.injected import not_injected
from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.checkpoint.loading.load import Source, find_source
from oneshot.errors import UserError
from oneshot.patch import given
from oneshot.patch.check import check
from oneshot.patch.given import check_given
from oneshot.settings import ModelSettings

GATED = ("gate_proj", "up_proj", "down_proj")


def stored_update(base: Path, leaves: tuple[str, ...]) -> Update:
    """Random factors of every stored matrix of these names, as an adapter of transformers 4 has them."""
    from safetensors.torch import load_file

    generator, found = torch.Generator().manual_seed(2), {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in leaves:
            m, n = tensor.shape
            found[module] = Factors(*(0.1 * torch.randn(*s, generator=generator) for s in ((m, 2), (2, n))))
    return found


def adapter_on(name: str, leaves: tuple[str, ...], folder: Path) -> tuple[Any, Source]:
    """A mixture on disk, and an adapter of single experts on it."""
    model = tiny(name)
    model.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    update = stored_update(folder / "base", leaves)
    experts = frozenset(one for one in update if ".experts." in one)
    held = Carried(update, APART, {"down_proj": 2}, leaves, (), experts)
    write_patch(folder / "own", held, [], str(folder / "base"), torch.float32)
    config = json.loads((folder / "own" / "adapter_config.json").read_text())
    config |= {"target_modules": list(leaves), "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "own" / "adapter_config.json").write_text(json.dumps(config))
    return model, find_source(ModelSettings(path=str(folder / "own"), dtype="float32"), tiny_runtime())
