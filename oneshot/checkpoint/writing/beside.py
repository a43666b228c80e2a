"""What lies beside a model's weights: config, tokenizer, chat template, the model's own code.

What a run does not change is copied from where the model comes from, byte for byte. Written anew by the libraries of
this machine, a config may name fields and classes that older ones, servers among them, do not know: transformers 4
reads none of 5's ``rope_parameters`` and goes on with a wrong base (vllm#42624, #44158, LlamaFactory#10310).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.folders import naming
from oneshot.checkpoint.loading.load import Source
from oneshot.checkpoint.loading.ties import TIES, is_untied
from oneshot.checkpoint.names import CONFIG, EXPORT, GENERATION, INDEX, MANIFEST, MARKER, MORE_TEMPLATES, TOKENIZER
from oneshot.checkpoint.quantized.scheme import QUANTIZATION
from oneshot.checkpoint.writing.standing import VERDICT
from oneshot.data.protocols import Tokenizer
from oneshot.reading import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Origin = Source | Tokenizer  # where a written model comes from, or the tokenizer of one that was made from nothing
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data")
_LEFT = {INDEX, MANIFEST, MARKER, "README.md", EXPORT, VERDICT}
_DTYPES = ("dtype", "torch_dtype")  # the second one is transformers 4's


@dataclass(frozen=True)
class Changes:
    """What a run changes in a model's config.

    Attributes:
        dtype: of the weights, as a config names it; none: as before
        plain: whether the weights are not, or no longer, quantized
        apart: whether embedding and head are two weights, whatever the config said
        architecture: the model's class; none: as before
        fields: further ones, by name, that are set
    """

    dtype: str | None = None
    plain: bool = True
    apart: bool = False
    architecture: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def carried(base: Path, *, deep: bool = True) -> list[Path]:
    """Return relative paths of what goes along: all but weights, what is about them, the card, and hidden files.

    Args:
        deep: also what lies in folders of the checkpoint's, of which else only chat templates go along
    """
    found = []
    for parent, folders, names in os.walk(base):
        folders[:] = sorted(each for each in folders if each == MORE_TEMPLATES or (deep and not each.startswith(".")))
        found += [Path(parent, name).relative_to(base) for name in sorted(names) if not name.startswith(".")]
    return [p for p in found if p.suffix not in _WEIGHTS and str(p) not in _LEFT and not p.name.endswith(".index.json")]


def carry(base: Path, files: list[Path], folder: Path, changes: Changes, tokenizer: Path | None = None) -> None:
    """Copy what goes along from a checkpoint, changing in its config only what the run has changed.

    Args:
        tokenizer: folder of the tokenizer, where it is not the checkpoint's own
    """
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with naming(folder / path):
            shutil.copyfile(base / path, folder / path)
    before = read_object(base / CONFIG)
    after = changed(before, changes)
    if after != before:
        with naming(folder / CONFIG):
            (folder / CONFIG).write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None and tokenizer.resolve() != base.resolve():
        for path in _tokenizer_files(folder):
            path.unlink()
        copy_tokenizer(tokenizer, folder)


def changed(fields: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Return a config's fields after the changes; fields of parts (a text model's) follow the whole."""
    after = copy.deepcopy({**fields, **changes.fields})
    for part in (after, *(value for value in after.values() if isinstance(value, dict))):
        for key in part.keys() & set(_DTYPES):
            if changes.dtype is not None and isinstance(part[key], str):
                part[key] = changes.dtype
        if changes.apart and part.get(TIES):
            part[TIES] = False
    if changes.apart:  # a family may tie where nothing is said
        after[TIES] = False
    if changes.plain:
        after.pop(QUANTIZATION, None)
    if changes.architecture is not None:
        after["architectures"] = [changes.architecture]
    return after


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files and chat templates, and its own code where it has some."""
    for path in _tokenizer_files(source):
        place = folder / path.relative_to(source)
        with naming(place):
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def write_beside(model: PreTrainedModel, origin: Origin, folder: Path, dtype: torch.dtype) -> None:
    """Write all that belongs beside a full model's weights.

    Args:
        dtype: of the weights in the file
    """
    name = str(dtype).removeprefix("torch.")  # as configs have it
    fields = read_object(origin.checkpoint / CONFIG) if isinstance(origin, Source) else {}
    if isinstance(origin, Source) and fields.get("model_type") == model.config.model_type:
        changes = Changes(dtype=name, apart=is_untied(model, origin.checkpoint), architecture=type(model).__name__)
        carry(origin.checkpoint, carried(origin.checkpoint, deep=False), folder, changes, origin.tokenizer)
        return
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    with naming(folder / CONFIG):
        config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        with naming(folder / GENERATION):
            model.generation_config.save_pretrained(folder)
    write_tokenizer(origin, folder)


def write_tokenizer(origin: Origin, folder: Path) -> None:
    """Write a tokenizer: its files as they were, where there are any."""
    if isinstance(origin, Source):
        copy_tokenizer(origin.tokenizer, folder)
        return
    with naming(folder / "tokenizer.json"):
        origin.save_pretrained(folder)


def _tokenizer_files(folder: Path) -> list[Path]:
    patterns = (*TOKENIZER, f"{MORE_TEMPLATES}/*.jinja", *(["*.py"] if _has_code(folder) else []))
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _has_code(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and "auto_map" in read_object(path)
