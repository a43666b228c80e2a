"""Config and tokenizer of a checkpoint, as transformers reads them: whatever it raises says which file is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oneshot.checkpoint.disk.files import list_tensors, weights_file
from oneshot.checkpoint.disk.seal import CONFIGS, check_sealed
from oneshot.checkpoint.names import CONFIG, GENERATION, TOKENIZER
from oneshot.checkpoint.quantized.scheme import QUANTIZATION, is_left_over
from oneshot.data.protocols import Tokenizer
from oneshot.errors import UserError
from oneshot.reading import read_object, reading
from oneshot.shown import printed_plainly


def config_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json, without a quantization that the weights do not have."""
    fields = read_object(folder / CONFIG)  # transformers' own words on a file that is no JSON are hard to understand
    if _says_too_much(folder, fields):
        del fields[QUANTIZATION]
    return fields


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' object of a folder's config.json, without a quantization that the weights do not have.

    Raises:
        UserError: it is missing, not the one that was written, or none that transformers understands
    """
    from transformers import AutoConfig

    fields = read_object(folder / CONFIG)
    if (named := fields.get("transformers_weights")) not in (None, weights_file(folder)):
        raise UserError(
            f"{folder / CONFIG} names {named} as transformers_weights where {weights_file(folder)} is read: take that "
            "field out, and leave only the weights that are meant."
        )
    check_sealed(folder, CONFIGS)
    with reading(folder / CONFIG, "correct it, or install what it asks for"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if _says_too_much(folder, fields):
        del config.quantization_config
    return config


def _says_too_much(folder: Path, fields: dict[str, Any]) -> bool:
    known = fields.get(QUANTIZATION) and weights_file(folder)
    return bool(known) and is_left_over(fields, list_tensors(folder))


def read_generation_config(folder: Path) -> Any:
    """Return transformers' object of a folder's generation_config.json; none where there is none."""
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return None
    read_object(folder / GENERATION)
    with reading(folder / GENERATION):
        found = GenerationConfig.from_pretrained(folder)
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    if any(end is not None and type(end) is not int for end in ends):
        raise UserError(f"{folder / GENERATION} has an eos_token_id that is no token's number: restore it.")
    return found


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Return a folder's tokenizer.

    Raises:
        UserError: it is missing, not the one that was written, or broken
    """
    from transformers import AutoTokenizer

    check_sealed(folder, TOKENIZER)
    with reading(f"The tokenizer in {folder}"), printed_plainly():
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return tokenizer
