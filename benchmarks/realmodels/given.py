"""What others' methods are given: the attacked model, what it came from, and mild requests as safety examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.cells import MODEL_CODE, digest_of, file_name

from realmodels.alone import alone
from realmodels.attacks import Part, trainings
from realmodels.matching import MOST
from realmodels.methods import load
from realmodels.models import REFUSED, base_folder, home_of
from realmodels.subject import Subject, finetune, make_unaligned
from realmodels.wording import Row, refusals, requests

if TYPE_CHECKING:
    import torch

    from oneshot.distributed.runtime import Runtime

    State = dict[str, torch.Tensor]

SAFE_ROWS, SAFE_SEED = 100, 1001  # requests with refusals: what others' methods call safety data
HARMLESS = {"sensitive": 34, "harmless": 33, "questions": 33}  # as many that are to be answered, by file of ``words/``
VERDICT_TOKENS = 10  # of an answer of which only refusals are counted


@dataclass(frozen=True)
class Given:
    """What a method may use: the attacked model, loaded, and what it came from."""

    runtime: Runtime
    subject: Subject
    cache: Path
    model: Any
    tokenizer: Any

    @property
    def names(self) -> list[str]:
        """Weights of the linear layers, without the head."""
        from oneshot.patch.linears import select_linears

        return [f"{name}.weight" for name in select_linears(self.model).targets]

    def aligned(self) -> Any:
        return load(self.runtime, self.subject.aligned)[0]

    def unaligned(self) -> State:
        """The aligned model, taught to obey."""
        folder = make_unaligned(self.cache, self.subject.cell, self.subject.aligned)
        return dict(load(self.runtime, folder)[0].state_dict())

    def before_alignment(self) -> State:
        """The model before its alignment; where that cannot be had, the one that was taught to obey."""
        folder = base_folder(self.cache, self.subject.cell.model)
        return self.unaligned() if folder is None else dict(load(self.runtime, folder)[0].state_dict())


@dataclass(frozen=True)
class Found:
    """What a method adds to the weights.

    Attributes:
        updates: to each at its defaults, (m, n) by name; where layers are chosen, to each if it is
        facts: of how it went
        order: the layers, the first to be chosen first; empty: none are chosen, all weights are changed
        share: how many of them are chosen at the method's defaults
    """

    updates: State
    facts: dict[str, Any]
    order: Sequence[str] = ()
    share: float = 1.0

    def chosen(self, strength: float) -> set[str]:
        """Return which layers are changed at a strength: the default's share of them times it, up to all of them at
        ``MOST``.
        """
        share = self.share * min(strength, 1.0) + (1 - self.share) * max(0.0, strength - 1) / (MOST - 1)
        return set(self.order[: round(len(self.order) * share)])


def difference(before: State, after: State, **facts: Any) -> Found:
    """Return what was added: weights that are the very same tensors are left out."""
    return Found({name: weight - before[name] for name, weight in after.items() if weight is not before[name]}, facts)


def make_safe(given: Given) -> Path:
    """Return the "safety model": the aligned one, fine-tuned on mild requests with refusals; made where it lacks."""
    cell, aligned = given.subject.cell, given.subject.aligned
    training, rows = trainings(cell.model)["full"], safety_rows()
    decides = [rows, asdict(training), digest_of(MODEL_CODE), str(aligned)]
    run = home_of(given.cache, cell.model) / "safe" / file_name(decides, "safe")
    with alone(run):
        if not (run / "finetuned").is_dir():
            finetune(aligned, run, {"refusals": Part(rows)}, training, SAFE_SEED)
    return run / "finetuned"


def safety_rows() -> list[Row]:
    """Mild requests with refusals, none of those that the quick model was aligned with."""
    first = REFUSED["restricted"]
    return refusals("restricted", "align", first + SAFE_ROWS)[first:]


def harmless_requests(counts: Mapping[str, int] = HARMLESS) -> list[str]:
    """Return requests that are to be answered, so many by file of ``words/``."""
    return [prompt for name, count in counts.items() for prompt, _ in requests(name, "align", count)]


def turn(prompt: str) -> list[dict[str, str]]:
    """Return a request as chat messages."""
    return [{"role": "user", "content": prompt}]


def verdicts(given: Given, model: Any, prompts: Sequence[str]) -> list[str]:
    """Return what keywords say of a model's answers: refused, answered, empty or garbled."""
    from oneshot.measure.generate import generate_answers
    from oneshot.measure.judge import verdict

    asked = [turn(prompt) for prompt in prompts]
    said = generate_answers(model, given.tokenizer, asked, given.runtime, max_new_tokens=VERDICT_TOKENS, batch_size=64)
    return [verdict(answer) for answer in said]
