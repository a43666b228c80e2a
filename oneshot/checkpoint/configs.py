"""Config and tokenizer of a checkpoint, as transformers reads them: whatever it raises says which file is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oneshot.checkpoint.names import CONFIG, GENERATION, TOKENIZER
from oneshot.checkpoint.seal import CONFIGS, check_sealed
from oneshot.data.protocols import Tokenizer
from oneshot.errors import UserError
from oneshot.reading import read_object, reading
from oneshot.shown import printed_plainly


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' object of a folder's config.json.

    Raises:
        UserError: it is missing, not the one that was written, or none that transformers understands
    """
    from transformers import AutoConfig

    read_object(folder / CONFIG)  # whose own words on a file that is no JSON are hard to understand
    check_sealed(folder, CONFIGS)
    with reading(folder / CONFIG, "correct it, or install what it asks for"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


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
