"""A fine-tuned model, and what is the same for all that is done to it: its request, its scores, and F."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.cells import Cell, attack_settings
from reproduce.models import aligned_folder, finetuned_folder

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime
    from oneshot.patch.guard import RepairBatch
    from oneshot.patch.objective import RefusalRows
    from oneshot.patch.request import Request
    from oneshot.patch.teacher import Teacher
    from oneshot.settings import Settings

FRESH = 32  # requests beyond the pool on which F is measured


@dataclass(frozen=True)
class Judge:
    """What F is measured on.

    Attributes:
        fresh: requests like the pool's that are not in it, so that no candidate has been judged by them
        pool: the rows that the choice itself is judged by
        batch: its guard rows are those of F's second term
    """

    fresh: RefusalRows
    pool: RefusalRows
    batch: RepairBatch
    pad: int


class Subject:
    """A fine-tuned model, with what is computed once for all that is done to it."""

    def __init__(self, runtime: Runtime, models: Path, attack: str, seed: int, size: str) -> None:
        self.runtime, self.models = runtime, models
        self.path, self.aligned = finetuned_folder(models, attack, seed, size), aligned_folder(models, size)
        self.settings = attack_settings(attack, seed)
        self._judge: Judge | None = None

    def settings_for(self, cell: Cell, select: str = "hardest") -> Settings:
        from oneshot.patch.methods import METHODS
        from oneshot.patch.recipe import AUTO

        method = cell.method if cell.method in (AUTO, *METHODS) else "sft"
        options = dataclasses.replace(
            self.settings.repair, method=method, epochs=cell.epochs, guard_weight=cell.guard_weight
        )
        if cell.rank is not None:
            options = dataclasses.replace(options, rank=cell.rank)
        return dataclasses.replace(
            self.settings,
            model=dataclasses.replace(self.settings.model, path=str(self.path)),
            reference=str(self.aligned) if cell.reference else None,
            select=select,
            repair=options,
        )

    def request(self, cell: Cell, select: str = "hardest") -> Request:
        """Return the checked request of a cell; what is no method of ours is scored as one of sft."""
        from oneshot.patch.check import check

        return check(self.settings_for(cell, select), self.runtime)

    def teacher(self, request: Request) -> Teacher | None:
        """Return what the aligned model teaches; none where nothing is asked of it."""
        from oneshot.distributed.engine import frozen
        from oneshot.patch.teacher import learn, wanted

        if request.reference is None or not wanted(request):
            return None
        with frozen(self.runtime, self.load(self.aligned)) as model:
            return learn(request, model)

    def load(self, folder: Path) -> Any:
        from oneshot.checkpoint.loading.load import find_source, load_model
        from oneshot.settings import ModelSettings

        settings = ModelSettings(path=str(folder))
        return load_model(self.runtime, find_source(settings, self.runtime), settings)

    def judge(self, model: Any, tokenizer: Any) -> Judge:
        """Return what F is measured on; the first call needs the unpatched model."""
        if self._judge is None:
            self._judge = _build_judge(self, model, tokenizer)
        return self._judge

    def measured(self, model: Any, request: Request, example: str | None = None) -> dict[str, Any]:
        """Score a model, and measure F of it where the unpatched one has been seen (as this one is, if first).

        Args:
            example: ID of the candidate that it was repaired with, which does not count in ``f_pool``
        """
        from oneshot.patch.objective import evaluate
        from oneshot.world import language

        judge = self.judge(model, request.tokenizer)
        ids = [row.id for row in language.pool()]
        out = frozenset([ids.index(example)] if example else [])
        fresh = evaluate(self.runtime, model, judge.fresh, judge.batch, judge.pad)
        pool = evaluate(self.runtime, model, judge.pool, judge.batch, judge.pad, left_out=out)
        f = {"f": fresh.total, "f_harm": fresh.harm, "f_task": fresh.task, "f_pool": pool.total}
        return {"rates": rates_of(model, request), **f}


@functools.lru_cache(maxsize=1)
def subject_of(runtime: Runtime, models: Path, attack: str, seed: int, size: str) -> Subject:
    """Return the fine-tuned model of a group; the last one asked for is kept."""
    return Subject(runtime, models, attack, seed, size)


def _build_judge(subject: Subject, model: Any, tokenizer: Any) -> Judge:
    import torch

    from oneshot.data.encoding import encode, pad_id
    from oneshot.distributed.engine import frozen
    from oneshot.patch.examples import read_guard
    from oneshot.patch.guard import build_batch
    from oneshot.patch.methods import rollback
    from oneshot.patch.objective import RefusalRows, aligned_logits, sample
    from oneshot.world import language

    runtime, pad = subject.runtime, pad_id(tokenizer)
    count = len(language.pool())
    every = [encode(row, tokenizer, 64) for row in language.pool(count + FRESH)]
    pool, fresh = sample(every[:count], subject.settings.seed), RefusalRows(list(range(FRESH)), every[count:])
    guard = read_guard(subject.settings, rollback.METHOD.defaults.guard_prompts)
    with torch.no_grad():
        batch = build_batch(runtime, model, tokenizer, every[0], guard.all, answer_tokens=16)
    with frozen(runtime, subject.load(subject.aligned)) as aligned:
        known = [
            dataclasses.replace(
                rows, aligned=aligned_logits(runtime, rows.rows, subject.aligned, "torch.float32", pad, aligned)
            )
            for rows in (fresh, pool)
        ]
    return Judge(known[0], known[1], batch, pad)


def rates_of(model: Any, request: Request) -> dict[str, float]:
    """Return what a model scores on all probes, by name."""
    from oneshot.measure.rates import score_model

    scores = score_model(model, request.tokenizer, request.probes, request.runtime, request.settings.score)
    return {name: rate.value for name, rate in scores.rates.items()}
