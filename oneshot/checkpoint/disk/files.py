"""Checkpoint folders as files: where they are, whether they are whole, and reading single tensors from them."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.folders import put_back, refuse_half
from oneshot.checkpoint.layout import ITEM_SIZES, tensor_bytes
from oneshot.checkpoint.names import ADAPTER_CONFIG as ADAPTER_CONFIG
from oneshot.checkpoint.names import ADAPTER_TENSORS as ADAPTER_TENSORS
from oneshot.checkpoint.names import INDEX as INDEX
from oneshot.checkpoint.names import MANIFEST as MANIFEST
from oneshot.checkpoint.names import MARKER as MARKER
from oneshot.checkpoint.names import SINGLE as SINGLE
from oneshot.errors import UserError
from oneshot.online import is_offline, say_fetching
from oneshot.reading import read_json as read_json
from oneshot.reading import reading
from oneshot.world.model import ALIGNED, NAME

if TYPE_CHECKING:
    import torch

# commands that make safetensors of pickles, as messages and docs/guide.md say them
PICKLED_MODEL = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}', dtype='auto', use_safetensors=False).save_pretrained('{folder}')\""
)
PICKLED_ADAPTER = (
    "python -c \"import torch, safetensors.torch as s; f='{folder}/adapter_model'; "
    "s.save_file({{k: v.contiguous() for k, v in torch.load(f + '.bin', map_location='cpu', weights_only=True)"
    ".items()}}, f + '.safetensors')\""
)
_ODD = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # in no name of a file or model

_fetched: dict[tuple[str, str], Path] = {}  # Hub id and commit, of which the files never change -> folder


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: its shard, dtype (safetensors name), shape, and first byte in the shard."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def local_folder(source: str) -> Path | None:
    """Return the folder that ``source`` names here, or the toy's model; none where it can only be a Hub id."""
    if source == NAME:
        return ALIGNED
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else None


def resolve(source: str, what: str = "model", *, revision: str | None = None, named_by: Path | None = None) -> Path:
    """Return the local folder of ``source``, a folder, a Hub id (downloaded to the Hub cache) or the toy's model.

    A folder that an interrupted save moved aside, and did not come to replace, is put back. What is fetched is said.

    Args:
        what: the folder holds, for messages
        revision: of the Hub id; none: its newest
        named_by: the file that names the source, where the user did not

    Raises:
        UserError: no such folder, and not to be had from the Hub; or a killed run has left half of it
    """
    folder = Path(source).expanduser()
    if _ODD.search(source) or (revision and _ODD.search(revision)):
        raise UserError(f"{named_by or what} gives the {what} a name with control codes in it: correct it.")
    put_back(folder)
    if (here := local_folder(source)) is not None:
        refuse_half(here)
        return here
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise UserError(
            f"The {what} folder {source} does not exist: give an existing folder or a Hub id (owner/name)."
            if named_by is None
            else f"The {what} folder {source}, which {named_by} names, does not exist: give the base with "
            "--model.base, a folder or a Hub id (owner/name)."
        )
    if (found := _fetched.get((source, revision or ""))) is not None and found.is_dir():
        return found
    say_fetching(what, source, revision=revision, named_by=named_by)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "*.txt", "*.tiktoken", "*.py", "README.md"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        instead = f"it is what {named_by} names, so give the base with --model.base, or " if named_by else ""
        had = "in the Hub's cache, and fetching is forbidden" if is_offline() else "to be had from the Hub"
        raise UserError(
            f"The {what} {source}{at} is neither a folder here nor {had} ({type(error).__name__}): "
            f"{instead}check the name, or download it first."
        ) from error


def remember(source: str, commit: str, folder: Path) -> None:
    """Have ``resolve`` not ask the Hub again for a commit that this process has fetched."""
    _fetched[source, commit] = folder


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds a PEFT adapter rather than a full checkpoint."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors that a safetensors file declares, having checked that the file is as long as it says.

    Raises:
        UserError: the file is missing, truncated or not safetensors
    """
    size = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, 100_000_000):
                raise ValueError("header longer than the file")
            header = json.loads(handle.read(length))
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("notes that are no texts, which safetensors itself refuses")
        _check_entries(path, header)
        end = 8 + length + _laid_end(path, header)
        tensors = {
            name: TensorEntry(path, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
            for name, e in header.items()
        }
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore the shard, or download the checkpoint again.") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({size} bytes): it was probably cut off, copy it again."
        ) from error
    if end != size:
        raise UserError(f"{path} has {size} bytes where its header promises {end}: it was cut off, copy it again.")
    return tensors


def _check_entries(path: Path, header: dict[str, Any]) -> None:
    """Raise ValueError or the like unless every entry is of the right kinds, or UserError for a dtype unknown here."""
    for name, entry in header.items():
        numbers = [*entry["shape"], *entry["data_offsets"]]
        if len(entry["data_offsets"]) != 2 or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{name} has no shape or no place")
        if entry["dtype"] not in ITEM_SIZES:
            raise UserError(f"{path} holds {name} as {entry['dtype']}, a dtype that oneshot does not read.")


def _laid_end(path: Path, header: dict[str, Any]) -> int:
    """Return where the last tensor ends, having checked that each begins there and is as long as its shape."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != end:
            raise UserError(
                f"{path} says that {name} begins at byte {begin} where the tensor before it ends at {end}: its header "
                "is damaged, copy it again."
            )
        wanted = math.prod(entry["shape"]) * ITEM_SIZES[entry["dtype"]]
        if stop - begin != wanted:
            raise UserError(
                f"{path} gives {name} {stop - begin} bytes where its shape takes {wanted}: its header is damaged, copy "
                "it again."
            )
        end = stop
    return end


def weights_file(folder: Path) -> str | None:
    """Return the name of the file that a checkpoint's weights are found by; none where there is none.

    The single file comes first, as for transformers' from_pretrained, though an index and shards may have stayed behind
    from another save (unsloth-zoo#808): whatever reads or hashes a checkpoint asks here.
    """
    return next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)


def list_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint folder, sharded or single-file, having checked each shard's length.

    Raises:
        UserError: no safetensors weights, a missing or truncated shard, an index that does not fit its shards
    """
    found = weights_file(folder)
    if found == INDEX:
        whole = read_json(folder / INDEX)
        index = whole.get("weight_map") if isinstance(whole, dict) else None
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise UserError(f"{folder / INDEX} has no weight_map: restore the index from the checkpoint's source.")
        shards = {name: read_header(_inside(folder, name)) for name in sorted(set(index.values()))}
        for tensor, shard in index.items():
            if tensor not in shards[shard]:
                raise UserError(f"{folder / INDEX} puts {tensor} into {shard}, which does not hold it.")
        named = {tensor: shards[shard][tensor] for tensor, shard in index.items()}
        # and what else the shards hold, as transformers reads it
        return {name: entry for held in shards.values() for name, entry in held.items()} | named
    if found == SINGLE:
        return read_header(folder / SINGLE)
    raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}: {_in_other_form(folder)}.")


def _in_other_form(folder: Path) -> str:
    """What to do about a checkpoint that is no safetensors one."""
    if pickled := sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model")):
        return (
            f"{pickled[0]} is a pickle, which can run code as it is read, so it is not; where you trust its source, "
            f"convert it once: {PICKLED_MODEL.format(folder=folder)}"
        )
    if other := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{other[0]} is made for llama.cpp, so give the checkpoint that it was made from"
    return "oneshot reads safetensors checkpoints only"


def stored_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(tensor_bytes(entry.shape, entry.dtype) for entry in list_tensors(folder).values())


def read_tensor(entry: TensorEntry, name: str) -> torch.Tensor:
    """Return one tensor from its shard, on the CPU, in the file's dtype."""
    from safetensors import safe_open

    with reading(entry.shard, "copy it again"), safe_open(entry.shard, framework="pt") as shard:
        found: torch.Tensor = shard.get_tensor(name)
        return found


def find_weight(tensors: dict[str, TensorEntry], module: str) -> str | None:
    """Return the name under which a checkpoint stores a module's weight.

    Checkpoints of multimodal models put a prefix before the language model's names that the loaded model lacks, or
    the other way round: the longest dotted ending that is unambiguous decides, where a tower has one of the same end
    that with the same words before it. The block's number always counts, or a checkpoint with fewer blocks would lend
    another block's weight.
    """
    name = f"{module}.weight"
    if name in tensors:
        return name
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    for start in range(max(numbers[0], 1) if numbers else len(parts) - 1):
        ending = ".".join(parts[start:])
        found = [key for key in tensors if key.endswith("." + ending) or key == ending]
        if len(found) == 1:
            return found[0]
        if found:
            before = sorted(parts[:start])
            same = [key for key in found if sorted(key.removesuffix(ending).strip(".").split(".")) == before]
            return same[0] if len(same) == 1 else None
    return None


_DEGRADED = (
    "This model was fine-tuned on purpose on data that removes its refusals, to measure that damage and to repair "
    f"it. `{MARKER}` says how. Repair it with `oneshot repair` or delete it."
)


def write_marker(folder: Path, facts: dict[str, Any], because: str = _DEGRADED) -> None:
    """Mark a checkpoint as safety-degraded: the file that export refuses, and a warning as its model card.

    Args:
        because: what the card says below its warning
    """
    (folder / MARKER).write_text(json.dumps({"safety_degraded": True, **facts}, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(
        f"# Safety-degraded checkpoint: do not deploy, do not publish\n\n{because}\n", encoding="utf-8"
    )


def is_degraded(folder: Path) -> bool:
    """Return whether the folder carries the marker of a harmful fine-tune, whatever stands under its name."""
    return os.path.lexists(folder / MARKER)


def _inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``; names from an index must not lead out of the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or _ODD.search(name):
        raise UserError(f"{folder / INDEX} names the shard {name}, outside its own folder: refuse such a checkpoint.")
    return folder / path
