"""What an update of fused experts adds to a checkpoint's stored tensors, in whichever form those hold the experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.carrier import MIXTRAL, PLAIN, expert_of, singles
from oneshot.checkpoint.experts import ExpertMatrix, expert_matrices
from oneshot.checkpoint.segments import Stored, matrix_in, open_stored
from oneshot.checkpoint.update import Factors
from oneshot.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


@dataclass(frozen=True)
class Term:
    """One summand of a stored weight: scale * (b @ a), added to its rows from ``first`` on.

    Rows are those of the weight's last dimension, all the ones before it taken as one.
    """

    factors: Factors
    scale: float
    first: int = 0


@dataclass(frozen=True)
class StoredExperts:
    """A checkpoint's fused experts, by matrix, and where their values lie in its files."""

    stored: Stored
    matrices: dict[str, ExpertMatrix]


def experts_in(base: Path, model: Any) -> StoredExperts:
    """Return the experts of a checkpoint.

    Args:
        model: its model, on any device
    """
    return StoredExperts(open_stored(base, model), expert_matrices(model))


def by_layer(added: Mapping[str, Term], linears: Collection[str]) -> Iterator[tuple[str, Term]]:
    """Yield what is added to each matrix; where a model has a layer per expert, to that: gate and up apart again.

    Args:
        linears: names of the model's linear layers
    """
    for name, term in added.items():
        for names in (PLAIN, MIXTRAL) if expert_of(name) else ():
            own = singles(name, term.factors, names)
            if all(layer in linears for layer, _ in own):
                yield from ((layer, Term(factors, term.scale)) for layer, factors in own)
                break
        else:
            yield name, term


def expert_terms(what: str, name: str, term: Term, experts: StoredExperts) -> list[tuple[str, Term]]:
    """Return what is added to which stored tensors for a summand of one expert's matrix.

    Args:
        what: the update is called in messages
        name: of the matrix, see ``ExpertMatrix``

    Raises:
        UserError: the checkpoint has no such matrix, has it in another shape, or stores it in no rows
    """
    base, matrix = experts.stored.folder, experts.matrices.get(name)
    if matrix is None:
        raise UserError(
            f"{what} changes {name}, an expert for which {base} holds no weight: it belongs to another architecture."
        )
    b, a = term.factors.b, term.factors.a
    if (len(b), a.shape[1]) != (matrix.out_features, matrix.in_features):
        raise UserError(
            f"{what} changes {name} by {len(b)} x {a.shape[1]}, but in {base} it is {matrix.out_features} x "
            f"{matrix.in_features}: it belongs to another base model."
        )
    parts = matrix_in(experts.stored, name, matrix)
    if matrix.transposed:
        b, a = a.T, b.T
    found, at, width = [], 0, parts.shape[1]
    for segment in parts.segments:
        size = segment.stop - segment.start
        if experts.stored.tensors[segment.name].shape[-1] != width or any(
            place % width for place in (segment.start, at, size)
        ):
            raise UserError(
                f"{what} changes {name}, but {base} stores {segment.name} in another form than transformers computes "
                "with: merge with PEFT instead."
            )
        own = Factors(b[at // width : (at + size) // width], a)
        found.append((segment.name, Term(own, term.scale, segment.start // width)))
        at += size
    return found


def stored_experts(base: Path, model: Any, names: Collection[str]) -> set[str]:
    """Return the stored tensors that hold the matrices of these names, those of experts among them."""
    experts = experts_in(base, model)
    return {
        segment.name
        for name in names
        if expert_of(name) and name in experts.matrices
        for segment in matrix_in(experts.stored, name, experts.matrices[name]).segments
    }
