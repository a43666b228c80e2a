"""What is known of a folder's safety: where it comes from, what was measured of exactly these files, and its marker.

Whatever comes from a safety-degraded model appears with the marker, "not yet measured", and one thing alone lifts it: a
good verdict on what the folder holds. The verdict stands beside the weights with their hashes, so that ``export`` can
tell the patch that was measured from one that was made of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.bases import own_tokenizer
from oneshot.checkpoint.disk.files import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    MARKER,
    is_degraded,
    local_folder,
    read_json,
    write_marker,
)
from oneshot.checkpoint.disk.seal import ADAPTER, digests, file_digest
from oneshot.checkpoint.names import CONFIG, EXPORT, GENERATION, TOKENIZER
from oneshot.checkpoint.writing.identity import DERIVED, REPAIR, check_identity, read_identity
from oneshot.errors import UserError
from oneshot.reading import digest_of
from oneshot.whole import write_whole

VERDICT = "oneshot_verdict.json"
UNMEASURED = "not yet measured"
GOOD = ("repaired", "repaired, with doubts")  # outcomes that lift a marker
ORIGINAL, NF4, NF4_DOUBLE, PACKED = "original", "nf4", "nf4, scales quantized", "packed nf4"  # forms of a base
_SCHEMA = 1
_SEAL = "seal"  # the SHA-256 of all else that the file says
_BECAUSE = (
    "This comes from the repair of a model that was fine-tuned on purpose on data that removes its refusals, and it "
    f"is not shown to be safe. `{MARKER}` says why."
)


@dataclass(frozen=True)
class Standing:
    """What ``oneshot_verdict.json`` says.

    Attributes:
        outcome: the verdict's word, or ``UNMEASURED``
        doubts: named by the verdict
        degraded_source: it comes from a model that is, or was, marked as safety-degraded
        form: of the base's weights that it was measured on: ``ORIGINAL``, ``NF4``, ``NF4_DOUBLE`` or ``PACKED``
        partly: why what the folder holds is not what was measured; "" where it is
        sha256: of the files that were measured, by name
        beside: SHA-256 of what it was measured with: the base's config, and the tokenizer and chat template, by name
    """

    outcome: str
    degraded_source: bool
    form: str = ORIGINAL
    doubts: list[str] = field(default_factory=list)
    partly: str = ""
    sha256: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)


def comes_from_degraded(folder: Path) -> bool:
    """Return whether a checkpoint or adapter is marked, or says that it was made from one that was."""
    if is_degraded(folder):
        return True
    standing = read_standing(folder)
    if standing is not None and standing.degraded_source:
        return True
    facts = read_json(folder / EXPORT) if (folder / EXPORT).is_file() else {}
    return isinstance(facts, dict) and any(facts.get(name) is True for name in ("base_was_degraded", "safety_degraded"))


def mark_unmeasured(folder: Path, base: str, why: str = UNMEASURED) -> None:
    """Mark what is about to be written into a folder that nobody sees yet; before the weights, as a kill may come.

    Args:
        base: name of the model that was repaired
        why: it is not known to be safe
    """
    write_marker(folder, {"repair_of": base, "outcome": why}, _BECAUSE)


def mark_copy(model: Any, folder: Path) -> None:
    """Mark the folder of a copy of a model in memory, if that was loaded from a safety-degraded one or stands on one.

    Args:
        model: of transformers or PEFT
    """
    adapters = getattr(model, "peft_config", {}).values()
    names = [model.config._name_or_path, *(getattr(each, "base_model_name_or_path", None) for each in adapters)]
    for name in map(str, filter(None, names)):
        source = local_folder(name) or cached(name, getattr(model.config, "_commit_hash", None))
        if source is not None and comes_from_degraded(source):
            folder.mkdir(parents=True, exist_ok=True)
            write_marker(folder, {"copy_of": name})


def cached(name: str, commit: str | None) -> Path | None:
    """Return the folder of a Hub id in the Hub's cache, of one commit or the newest there; none where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG, revision=commit)
    except HFValidationError:  # a name that is no Hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def begin_standing(
    folder: Path, *, degraded: bool, form: str, checkpoint: Path | None = None, tokenizer: Path | None = None
) -> None:
    """Write the verdict's file, without a verdict so far, for what a folder holds that has not appeared yet.

    Args:
        degraded: it comes from a safety-degraded model
        form: of the base's weights, see ``Standing``
        checkpoint: that it was measured on
        tokenizer: folder of the tokenizer that it was measured with; none: the checkpoint's own
    """
    around = beside(checkpoint, tokenizer) if checkpoint is not None else {}
    _write(folder, Standing(UNMEASURED, degraded, form, sha256=digests(folder, ADAPTER), beside=around))


def settle(folder: Path, outcome: str, doubts: Sequence[str], *, base: str, degraded: bool, partly: str = "") -> bool:
    """Write the verdict into a folder, and lift its marker if the verdict is good; return whether it is marked now.

    Args:
        base: name of the model that was repaired
        degraded: that model is, or was, safety-degraded
        partly: why what the folder holds is not what was measured; "" where it is
    """
    begun = read_standing(folder) or Standing(UNMEASURED, degraded)
    degraded = degraded or begun.degraded_source
    _write(folder, Standing(outcome, degraded, begun.form, list(doubts), partly, begun.sha256, begun.beside))
    if degraded and (outcome not in GOOD or partly):
        facts = {"repair_of": base, "outcome": outcome, **({"why": partly} if partly else {})}
        _write_json(folder / MARKER, {"safety_degraded": True, **facts})
        return True
    (folder / MARKER).unlink(missing_ok=True)
    return False


def read_standing(folder: Path) -> Standing | None:
    """Return what a folder's verdict says; none where there is none.

    Raises:
        UserError: the file is not one of ours
    """
    path = folder / VERDICT
    if not path.is_file():
        return None
    fields = read_json(path)
    kinds = {
        "outcome": str,
        "degraded_source": bool,
        "form": str,
        "doubts": list,
        "partly": str,
        "sha256": dict,
        "beside": dict,
    }
    if (
        not isinstance(fields, dict)
        or fields.get("schema") != _SCHEMA
        or any(not isinstance(fields.get(name), kind) for name, kind in kinds.items())
    ):
        raise UserError(f"{path} is not what this version of oneshot writes: restore it from its source.")
    told = {name: value for name, value in fields.items() if name != _SEAL}
    if fields.get(_SEAL) != digest_of(told):
        raise UserError(f"{path} was changed or damaged since it was written: restore it from its source.")
    return Standing(**{name: fields[name] for name in kinds})


def changed_since(folder: Path) -> str:
    """Return which file of a folder is not the one that its verdict is about, as a clause; "" where all are."""
    standing = read_standing(folder)
    for name, wanted in standing.sha256.items() if standing is not None else ():
        path = folder / Path(name).name
        if not path.is_file() or file_digest(path) != wanted:
            return f"{path} is not the file that was measured"
    return ""


def beside(checkpoint: Path, tokenizer: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 of what decides on a model's answers beside its weights, by the files' names.

    Args:
        tokenizer: folder of the tokenizer; none: the checkpoint's own
    """
    return digests(checkpoint, (CONFIG, GENERATION)) | digests(tokenizer or checkpoint, TOKENIZER)


def why_not_measured(folder: Path) -> str:
    """Return why an adapter is no patch that a repair has measured and found good, file by file; "" where it is one."""
    identity, standing = read_identity(folder), read_standing(folder)
    if identity is not None and identity.kind == DERIVED:
        return f"{folder} was made of a repair patch and is not the one that was measured"
    if standing is None or identity is None or identity.kind != REPAIR:
        return f"{folder} is no patch that a repair has measured ({VERDICT})"
    if standing.outcome not in GOOD or standing.partly:
        return f"the verdict on {folder} is: {standing.partly or standing.outcome}"
    for name in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        if name not in standing.sha256:
            return f"{folder / name} is not the file that was measured"
    return changed_since(folder)


def carry_standing(source: Path, folder: Path) -> None:
    """Write a measured patch's verdict beside files that hold the very same update in another form."""
    measured = read_standing(source)
    assert measured is not None
    _write(folder, dataclasses.replace(measured, sha256=digests(folder, ADAPTER)))


def why_not_as_measured(folder: Path, checkpoint: Path, form: str) -> str:
    """Return why a patch on a checkpoint is not what a repair has measured and found good; "" where it is.

    Args:
        checkpoint: what it is added to
        form: of the checkpoint's weights, see ``Standing``
    """
    standing = read_standing(folder)
    if why := why_not_measured(folder):
        return why
    assert standing is not None
    tokenizer = own_tokenizer(folder) or checkpoint  # as of who loads the patch, and as a merge writes it
    now = beside(checkpoint, tokenizer)
    for name in sorted(standing.beside.keys() | now.keys() if standing.beside else ()):
        if standing.beside.get(name) != now.get(name):
            owner = checkpoint if name in (CONFIG, GENERATION) else tokenizer
            return f"{owner / name} is not what {folder} was measured with"
    try:
        check_identity(folder, checkpoint)
    except UserError:
        return f"{folder} belongs to another model"
    if standing.form != form:
        return f"{folder} was measured on weights in another form ({standing.form}, and here {form})"
    return ""


def _write(folder: Path, standing: Standing) -> None:
    told = {"schema": _SCHEMA, **asdict(standing)}
    _write_json(folder / VERDICT, {**told, _SEAL: digest_of(told)})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")  # on the disk: what comes next may be that a marker goes
