"""Methods: each takes an attacked model and gives a repaired one, loaded, with what is to be said of how it went."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reproduce.cells import digest_of, file_name

from realmodels.alone import alone
from realmodels.cells import DEFAULT, FINETUNED, REPAIR_CODE, SEVERAL
from realmodels.models import home_of
from realmodels.subject import Subject

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

EXAMPLES = 4


@dataclass(frozen=True)
class Repaired:
    """A loaded model with its tokenizer, and facts of its repair."""

    model: Any
    tokenizer: Any
    facts: dict[str, Any]


def repaired(runtime: Runtime, subject: Subject, cache: Path, scratch: Path) -> Repaired:
    """Return the model that one of our methods makes of the attacked one; others' are in ``others``.

    Args:
        cache: where the default repair's patch is kept, for what is measured of it later
        scratch: folder for what a repair writes; it is removed again
    """
    method, clock = subject.cell.method, time.monotonic()
    if method == FINETUNED:
        return Repaired(*load(runtime, subject.folder), {})
    found = _several(runtime, subject) if method == SEVERAL else _ours(runtime, subject, cache, scratch)
    return Repaired(found.model, found.tokenizer, {**found.facts, "repair_seconds": round(time.monotonic() - clock, 1)})


def load(runtime: Runtime, folder: Path, quantize: Literal["nf4"] | None = None) -> tuple[Any, Any]:
    """Return a checkpoint's model and tokenizer, an adapter merged into its base's weights."""
    from oneshot.checkpoint.adapters.adapter import read_adapter
    from oneshot.checkpoint.adapters.added import merge_into
    from oneshot.checkpoint.loading.load import find_source, load_model, load_tokenizer
    from oneshot.settings import ModelSettings

    settings = ModelSettings(path=str(folder), quantize=quantize)
    source = find_source(settings, runtime)
    model = load_model(runtime, source, settings)
    if source.adapter is not None:
        merge_into(runtime, model, read_adapter(source.adapter).update)
    return model, load_tokenizer(source, settings)


def repair_values(subject: Subject, method: str, out: Path) -> dict[str, Any]:
    """Return what a user says to ``oneshot repair``: the model, what it came from, prompts of the task. No setting."""
    adapter = subject.cell.training == "lora"
    return {
        "model": str(subject.folder),
        "out": str(out),
        "seed": subject.cell.seed,
        "guard": str(subject.guard),
        "repair": {"merge": True} | ({} if method == "auto" else {"method": method}),
        "score": {"probes": str(subject.probe), "reference": False, "max_new_tokens": 1},
    } | ({} if adapter else {"reference": str(subject.aligned)})


def _ours(runtime: Runtime, subject: Subject, cache: Path, scratch: Path) -> Repaired:
    """``oneshot repair`` with its defaults."""
    from oneshot import api

    shutil.rmtree(scratch, ignore_errors=True)
    try:
        done = api.repair(**repair_values(subject, subject.cell.method, scratch))
        assert done.merged_folder is not None
        facts: dict[str, Any] = {"used": done.method, "example": done.example["id"], "epochs": len(done.trace)}
        facts["rank"] = done.report["repair"]["rank"]
        if done.watch is not None:
            facts["watch"] = {"good": done.watch.good, "at": done.watch.at, "reading": done.watch.reading}
        if subject.cell.method == DEFAULT:
            keep_patch(done.patch_folder, cache, subject)
        return Repaired(*load(runtime, done.merged_folder), facts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def patch_folder(cache: Path, subject: Subject) -> Path:
    """Return where the default repair's patch of an attacked model is kept."""
    decides = [digest_of(REPAIR_CODE), str(subject.folder), subject.cell.seed]
    return home_of(cache, subject.cell.model) / "patches" / file_name(decides, *subject.cell.group[1:4])


def keep_patch(patch: Path, cache: Path, subject: Subject) -> Path:
    """Copy a patch to where it is kept; return where that is.

    Without the marker of a repair that is not shown to be one: it is scored here, not by itself.
    """
    from oneshot.checkpoint.disk.files import MARKER

    target = patch_folder(cache, subject)
    with alone(target):
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(patch, partial, ignore=shutil.ignore_patterns(MARKER))
            partial.rename(target)
    return target


def _several(runtime: Runtime, subject: Subject) -> Repaired:
    """The paper's recipe from several examples of the shipped pool, drawn by the seed: their mean loss, all weights."""
    import torch

    from oneshot.patch.methods import METHODS

    model, tokenizer = load(runtime, subject.folder)
    rows = pool(tokenizer)
    chosen = random.Random(f"examples {subject.cell.seed}").sample(range(len(rows)), EXAMPLES)
    defaults = METHODS["sft"].defaults
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(defaults.learning_rate or 0), weight_decay=0.0)
    for _ in range(defaults.epochs):
        optimizer.zero_grad()
        for index in chosen:
            (example_loss(model, rows[index]) / EXAMPLES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.requires_grad_(False)
    return Repaired(model, tokenizer, {"examples": EXAMPLES})


def pool(tokenizer: Any) -> list[Any]:
    """Return the shipped pool, encoded."""
    from oneshot.data.conversations import read_conversations
    from oneshot.data.encoding import encode
    from oneshot.measure.probes import ASSETS
    from oneshot.settings import DataSettings

    return [encode(row, tokenizer, 512) for row in read_conversations(str(ASSETS / "pool.jsonl"), DataSettings())]


def example_loss(model: Any, example: Any) -> Any:
    """Return the mean cross entropy of the example's answer, in nats per token."""
    import torch

    from oneshot.training.objective import cross_entropy_sum

    logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits
    return cross_entropy_sum(logits, torch.tensor([example.labels])) / example.answer_tokens()
