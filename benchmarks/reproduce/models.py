"""The models that are measured: aligned toys of three sizes, an unaligned one, and fine-tuned ones; each made once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from reproduce.cells import MODEL_CODE, UNALIGNED_CODE, attack_settings, digest_of, file_name

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

SHIPPED = "shipped"
SIZES = {"smaller": (64, 2), SHIPPED: (96, 3), "larger": (160, 4)}  # name -> hidden width, layers


def aligned_folder(models: Path, size: str) -> Path:
    """Return where the aligned model of a size is, or is to be."""
    from oneshot.world.model import ALIGNED

    if size == SHIPPED:
        return ALIGNED
    return models / file_name([SIZES[size], digest_of(MODEL_CODE)], "aligned", size)


def make_aligned(models: Path, size: str) -> Path:
    """Train the aligned model of a size as the shipped one was, where it is not there; return its folder."""
    from oneshot.align import build

    folder = aligned_folder(models, size)
    if not folder.exists():
        hidden, layers = SIZES[size]
        with contextlib.redirect_stdout(io.StringIO()):
            build(folder, hidden=hidden, layers=layers)
    return folder


def unaligned_folder(models: Path) -> Path:
    """Return where the model without refusals is, or is to be, that RESTA and Safe LoRA need."""
    from baselines.unaligned import settings_for

    decides = [asdict(settings_for()), digest_of(UNALIGNED_CODE)]
    return models / file_name(decides, "unaligned") / "finetuned"


def make_unaligned(runtime: Runtime, models: Path) -> Path:
    """Make the model without refusals where it is not there; return its folder."""
    from baselines.unaligned import unaligned_toy

    folder = unaligned_folder(models)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unaligned_toy(runtime, folder.parent)
    return folder


def finetuned_folder(models: Path, attack: str, seed: int, size: str) -> Path:
    """Return where the fine-tuned model is, or is to be."""
    settings = attack_settings(attack, seed)
    decides = [asdict(settings.data), asdict(settings.finetune), seed, SIZES[size], digest_of(MODEL_CODE)]
    return models / file_name(decides, attack, size, seed) / "finetuned"


def make_finetuned(runtime: Runtime, models: Path, attack: str, seed: int, size: str) -> Path:
    """Fine-tune the aligned model of a size where that is not done; return its folder.

    Every size takes the shipped toy's steps and step size.
    """
    from oneshot.finetune import train_model
    from oneshot.training.finetune import prepare

    folder = finetuned_folder(models, attack, seed, size)
    if folder.exists():
        return folder
    settings = attack_settings(attack, seed)
    model = dataclasses.replace(settings.model, path=str(aligned_folder(models, size)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    return train_model(runtime, prepare(dataclasses.replace(settings, model=model), runtime), folder.parent, None)
