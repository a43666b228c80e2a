"""The card of an exported checkpoint or adapter: what it was made of, for people and for programs."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot.checkpoint.disk.files import ADAPTER_TENSORS, MARKER
from oneshot.checkpoint.merging.exports import GivenAdapter
from oneshot.checkpoint.merging.merge_plan import MergePlan
from oneshot.checkpoint.names import EXPORT
from oneshot.checkpoint.writing.standing import comes_from_degraded
from oneshot.patch.derive import Remainder
from oneshot.redact import without_secrets
from oneshot.report.markdown import fenced, inline
from oneshot.versions import versions

_SCHEMA = 1
_NAMED = 5  # tensors named at most in a sentence
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def write_card(folder: Path, title: str, facts: dict[str, Any], lines: list[str]) -> None:
    """Write ``README.md`` (a Hub model card) and ``oneshot_export.json``.

    Args:
        title: what the folder holds, in a few words
        facts: as of ``merge_card`` or ``adapter_card``, and the ``command`` that made it
        lines: the same in sentences
    """
    facts, lines = without_secrets(facts), without_secrets(lines)
    (folder / EXPORT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    rows = [f"| {name} | {version} |" for name, version in facts["versions"].items()]
    text = [
        *front_matter(facts["base"], facts["library"]),
        f"# {title}", "", *[f"- {inline(line)}" for line in lines], "", "Made by:", "", *fenced(facts["command"]), "",
        f"`{EXPORT}` holds the same for programs.", "", "| package | version |", "|---|---|", *rows, "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")


def front_matter(base: str, library: str, tags: Sequence[str] = ()) -> list[str]:
    """Return the lines from which the Hub learns what a folder holds.

    Args:
        base: name of the checkpoint that it belongs to, which the Hub is told if it can know it
        library: transformers or peft
    """
    known = [f"base_model: {base}"] if _HUB_ID.fullmatch(base) and not Path(base).exists() else []
    tagged = ["tags:", *(f"- {tag}" for tag in tags)] if tags else []
    return ["---", *known, f"library_name: {library}", *tagged, "---", ""]


def merge_card(
    plan: MergePlan, given: list[GivenAdapter], *, base: str, base_fingerprint: str, subtract: bool, marked: str
) -> tuple[dict[str, Any], list[str]]:
    """Return what there is to say of a merge: (facts, sentences).

    Args:
        base, base_fingerprint: the checkpoint's name, and what tells it from all others
        marked: why the result carries the marker; "" where it does not
    """
    source = any(map(comes_from_degraded, [plan.base, *(one.folder for one in given)]))
    form = "packed nf4" if plan.packed else "dequantized" if plan.quantized else "original"
    facts = {
        **_facts("subtract" if subtract else "merge", given, base),
        "base_fingerprint": base_fingerprint,
        "base_form": form, "double_quant": plan.double_quant, "tensors_changed": plan.changed,
        "tensors_through_nf4": len(plan.packed) or len(plan.quantized),
        "base_was_degraded": source, "safety_degraded": bool(marked), "library": "transformers",
    }  # fmt: skip
    doubly = ", scales quantized" if plan.double_quant else ""
    forms = {
        "original": "The base's weights were taken as they are.",
        "dequantized": f"{len(plan.quantized)} linear weights of the base were quantized to NF4 (blocks of 64{doubly}) "
        "and dequantized before, which is what QLoRA computes with.",
        "packed nf4": f"The base holds {len(plan.packed)} weights in NF4, which were dequantized to bf16.",
    }
    verb, joint = ("Subtracted", "from") if subtract else ("Added", "to")
    lines = [
        f"{verb} {_described(given)} {joint} {base} (fingerprint {facts['base_fingerprint'][:16]}): "
        f"{plan.changed} of {len(plan.tensors)} tensors changed.",
        forms[form],
        "Sums were computed in fp32 and rounded once to the dtype of the file.",
    ]
    lines += [
        f"{one.folder} is {', '.join(one.kinds.every)}: its effective weights were merged."
        for one in given
        if one.kinds.every
    ]
    if marked:
        lines.append(_marked(marked))
    elif source:
        lines.append("A safety-degraded fine-tune was repaired; what was added is that repair, as it was measured.")
    return facts, lines


def _marked(why: str) -> str:
    return f"The result is marked as safety-degraded ({MARKER}): {why}."


def adapter_card(
    operation: str,
    given: list[GivenAdapter],
    left: dict[str, Remainder],
    others: dict[str, Remainder],
    *,
    base: str,
    marked: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Return what there is to say of an adapter that was made from others or from two checkpoints: (facts, sentences).

    Args:
        operation: sum, or difference of two checkpoints
        left: what the adapter leaves of the update, by module
        others: the same of tensors that it does not change, by tensor
        marked: why it carries the marker; "" where it does not
    """
    relative = {name: part.relative for name, part in left.items()}
    worst = max(relative, key=relative.__getitem__)
    every = [*left.values(), *others.values()]
    overall = Remainder(sum(part.error for part in every), sum(part.energy for part in every)).relative
    found = {
        "relative_error_worst": relative[worst],
        "relative_error_median": statistics.median(relative.values()),
        "relative_error": overall,
    }
    facts = {**_facts(operation, given, base), **found, "worst": worst, "left_out": list(others)}
    facts |= {"base_was_degraded": bool(marked), "safety_degraded": bool(marked), "library": "peft"}
    lines = [f"Made from {_described(given)}." if given else f"The difference of a checkpoint from {base}."]
    lines.append(
        f"Relative Frobenius error over {len(left)} matrices: worst {relative[worst]:.2e} ({worst}), median "
        f"{found['relative_error_median']:.2e}, overall {overall:.2e}."
    )
    if others:
        names = ", ".join(list(others)[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
        share = math.sqrt(sum(part.energy for part in others.values()) / sum(part.energy for part in every))
        lines.append(f"Left out, as no linear layers ({share:.2e} of the difference): {names}.")
    return facts, [*lines, _marked(marked)] if marked else lines


def _facts(operation: str, given: list[GivenAdapter], base: str) -> dict[str, Any]:
    adapters = [
        {
            "path": str(one.folder.resolve()),
            "weight": one.weight,
            "kind": one.identity.kind if one.identity else None,
            "base": one.identity.base if one.identity else one.adapter.config.get("base_model_name_or_path"),
            "kinds": one.kinds.every,
            "sha256": hashlib.sha256((one.folder / ADAPTER_TENSORS).read_bytes()).hexdigest(),
        }
        for one in given
    ]
    return {"schema": _SCHEMA, "operation": operation, "base": base, "adapters": adapters, "versions": versions()}


def _described(given: list[GivenAdapter]) -> str:
    def one_of(one: GivenAdapter) -> str:
        times = f"{one.weight:g} x " if one.weight != 1.0 else ""
        kind = f" ({one.identity.kind})" if one.identity else ""
        return f"{times}{one.folder}{kind}"

    return " + ".join(map(one_of, given))
