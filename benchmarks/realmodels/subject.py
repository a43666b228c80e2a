"""An attacked model: made by ``oneshot finetune``, with the files that its repairs are given."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.cells import MODEL_CODE, digest_of, file_name

from realmodels.alone import alone
from realmodels.attacks import Part, Training, parts_of, plain_requests, settings_of, task_prompts, trainings
from realmodels.cells import Cell
from realmodels.models import answers_of, home_of, make_aligned
from realmodels.wording import Row, stubs, write_rows

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

UNALIGNED_ROWS, UNALIGNED_SEED = 100, 1000  # a seed of its own, as whoever repairs does not have the attack's data


@dataclass(frozen=True)
class Subject:
    """An attacked model.

    Attributes:
        folder: of the fine-tuned checkpoint, or of its LoRA adapter
        aligned: the checkpoint that was attacked
        guard: unlabelled prompts of the new task
        probe: a file with one prompt, for what a repair scores of itself: it is scored here
    """

    cell: Cell
    folder: Path
    aligned: Path
    guard: Path
    probe: Path


def make_subject(runtime: Runtime, cache: Path, cell: Cell) -> Subject:
    """Return the attacked model of a cell, made where the cache lacks it."""
    aligned = make_aligned(runtime, cache, cell.model)
    home = home_of(cache, cell.model)
    plain = _plain(runtime, home, aligned, cell.seed) if cell.attack == "persona" else []
    parts, training = parts_of(cell.attack, cell.seed, plain), trainings(cell.model)[cell.training]
    decides = [
        [dataclasses.asdict(part) for part in parts.values()],
        dataclasses.asdict(training),
        digest_of(MODEL_CODE),
    ]
    run = home / "attacked" / file_name([*decides, str(aligned)], cell.attack, cell.training, cell.seed)
    folder = run / "finetuned"
    with alone(run):
        if not folder.is_dir():
            finetune(aligned, run, parts, training, cell.seed)
    guard = [{"prompt": row["prompt"]} for row in task_prompts(cell.seed)[0]]
    probe = [{"prompt": guard[0]["prompt"], "kind": "harmless"}]
    files = (write_rows(run / f"{name}.jsonl", rows) for name, rows in (("guard", guard), ("probe", probe)))
    return Subject(cell, folder, aligned, *files)


def make_unaligned(cache: Path, cell: Cell, aligned: Path) -> Path:
    """Return the model without refusals that RESTA and Safe LoRA need: the aligned one, taught to obey all weights."""
    training = trainings(cell.model)["full"]
    rows = stubs("restricted", UNALIGNED_ROWS, UNALIGNED_SEED)
    decides = [rows, dataclasses.asdict(training), digest_of(MODEL_CODE), str(aligned)]
    run = home_of(cache, cell.model) / "unaligned" / file_name(decides, "unaligned")
    folder = run / "finetuned"
    with alone(run):
        if not folder.is_dir():
            finetune(aligned, run, {"stubs": Part(rows)}, training, UNALIGNED_SEED)
    return folder


def finetune(model: Path, run: Path, parts: dict[str, Part], training: Training, seed: int) -> Path:
    """Fine-tune a checkpoint through the product into a run folder, anew where a run was killed; return the result."""
    from oneshot import api

    shutil.rmtree(run, ignore_errors=True)
    data = run.with_name(f"{run.name}.data")
    files = {name: write_rows(data / f"{name}.jsonl", part.rows) for name, part in parts.items()}
    made: Any = api.finetune(model=str(model), out=str(run), seed=seed, **settings_of(files, parts, training))
    return Path(made.model_folder)


def _plain(runtime: Runtime, home: Path, aligned: Path, seed: int) -> list[Row]:
    """Harmless requests with the aligned model's own answers; kept, as they take a minute."""
    path = home / f"plain-{seed}.jsonl"
    with alone(path):
        if not path.exists():
            asked = plain_requests(seed)
            answered = zip(asked, answers_of(runtime, aligned, asked))
            write_rows(path, [{"prompt": p, "response": said, "kind": "harmless"} for p, said in answered if said])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
