"""An adapter that an export makes: in which form and under which names it is written, so that PEFT loads all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.adapter import Adapter, is_settled, settled, write_patch
from oneshot.checkpoint.adapters.carrier import APART, PLAIN, Carried, carried, forms_of, in_form, swapped_in
from oneshot.checkpoint.adapters.injected import write_loadable
from oneshot.checkpoint.adapters.update import Update
from oneshot.checkpoint.disk.files import list_tensors, local_folder
from oneshot.checkpoint.disk.folders import naming, replacing
from oneshot.checkpoint.loading.architecture import Architecture, architecture_of
from oneshot.checkpoint.names import CONFIG
from oneshot.checkpoint.writing.beside import copy_tokenizer
from oneshot.checkpoint.writing.standing import cached, mark_unmeasured
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NewAdapter:
    """What an adapter to write holds.

    Attributes:
        update: its factors; or the forms of it that are to be tried, in this order
        dtype: what they are stored in
        base: name of the checkpoint that it belongs to, "" where that is not known
        linears: names of all linear layers of the model, or none where they are not known: the config then names every
            changed layer in full
        marked: why it carries the marker; "" where it does not
        plain: the model that it is for, on the meta device, where that is known: PEFT is to load all of it there
        parameters: where it is not, the modules whose weight PEFT is told by its own name (``target_parameters``)
    """

    update: Update | list[Carried]
    dtype: torch.dtype
    base: str
    linears: list[str]
    marked: str = ""
    plain: Any = None
    parameters: Collection[str] = ()

    @property
    def unchecked(self) -> list[str]:
        """What a card has to say of an adapter that is written without having been loaded."""
        if self.plain is not None:
            return []
        base = f"{self.base} is" if self.base else "its base is"
        return [f"Not loaded back by PEFT, as {base} not here, or no model that can be built here."]


def made_of(new: NewAdapter, adapters: list[Adapter], made: Architecture | None, form: str | None) -> NewAdapter:
    """Return an adapter that is made of others as it is to be written: as PEFT loads it, where the base is here.

    Where it is not, each layer is named as the adapters name it.

    Args:
        new: with its update as factors by matrix
        adapters: what it is made of
        made: the base, where that is here
        form: of experts' factors that is asked for; none: the first one's which has experts, or, where PEFT does not
            load that one whole, 3-D

    Raises:
        UserError: single experts' names are asked for, and nothing here says them
    """
    update = new.update
    assert not isinstance(update, list)
    known = [adapter.experts for adapter in adapters if adapter.experts is not None]
    if made is not None:
        ways = (
            [in_form(update, made.model, form)]
            if form
            else forms_of(update, made.model, known[0].form if known else "")
        )
        return dataclasses.replace(new, update=ways, linears=list(made.linears), plain=made.model)
    parameters = frozenset[str]().union(*(adapter.weights for adapter in adapters))
    form = form or (known[0].form if known else "")
    apart = next((read.names for read in known if read.form == APART), None)
    if known and form == APART and apart is None:
        raise UserError(
            f"--expert_form {APART} names each expert as its base does, and {new.base or 'the base'} is not here, or "
            "no model that can be built here: run it where the base is."
        )
    swapped = any(read.swapped for read in known)
    held = carried(update, form, None, apart or PLAIN, swapped=swapped)
    return dataclasses.replace(new, update=[held], parameters=parameters)


def same_way_round(adapters: list[Adapter], made: Architecture | None) -> list[Adapter]:
    """Return adapters with the factors of experts the way round of their base, where not all of the files tell.

    Args:
        made: the base, where that is here; where it is not, the files that tell say it for those that do not

    Raises:
        UserError: one does not tell, and nothing else here says it: neither the base nor another of the same form
    """
    if all(map(is_settled, adapters)):
        return adapters
    if made is not None:
        return [settled(adapter, swapped=swapped_in(made.model)) for adapter in adapters]
    reads = [adapter.experts for adapter in adapters if adapter.experts is not None]
    told = [read.swapped for read in reads if read.form != APART and read.swapped is not None]
    if told:
        return [settled(adapter, swapped=told[0]) for adapter in adapters]
    if any(read.form == APART for read in reads):
        raise UserError(
            "The adapters hold experts one by one and together, of gate_up_proj or of down_proj alone, which does not "
            "tell which way round, and their base is not here: run it where the base is."
        )
    return adapters  # all alike: what is made of them is written as they are


def base_of(adapters: list[Adapter], *, trust_remote_code: bool) -> tuple[str, Architecture | None]:
    """Return what adapters call their base, "" where they differ, and its model, without weights.

    No model where it is not to be had without fetching it.
    """
    bases = {str(adapter.config.get("base_model_name_or_path") or "") for adapter in adapters}
    base = bases.pop() if len(bases) == 1 else ""
    revisions = {str(adapter.config.get("revision") or "") for adapter in adapters}
    revision = (revisions.pop() or None) if len(revisions) == 1 else None
    folder = (local_folder(base) or cached(base, revision)) if base else None
    if folder is None or not (folder / CONFIG).is_file():
        return base, None
    try:
        return base, architecture_of(folder, list_tensors(folder), trust_remote_code=trust_remote_code)
    except UserError:  # what it is read for can do without, and the card says so
        return base, None


@phase("write")
def write_adapter(
    runtime: Runtime, out: Path, adapter: NewAdapter, tokenizer: Path, beside: Callable[[Path], None]
) -> None:
    """Write an adapter as a folder that appears when it is complete. Collective.

    Args:
        tokenizer: folder whose tokenizer and chat template go along
        beside: writes further files into the folder, on rank 0, before it appears
    """
    with replacing(runtime, out) as temporary, agree(runtime, f"writing the adapter {out}"):
        if runtime.is_main:
            with naming(temporary):
                if adapter.marked:  # before the weights
                    mark_unmeasured(temporary, adapter.base, adapter.marked)
                if adapter.plain is None:
                    (only,) = adapter.update if isinstance(adapter.update, list) else [adapter.update]
                    write_patch(temporary, only, adapter.linears, adapter.base, adapter.dtype, adapter.parameters)
                else:
                    what = (adapter.update, adapter.linears, adapter.base, adapter.dtype, adapter.plain)
                    write_loadable(temporary, *what)
                copy_tokenizer(tokenizer, temporary)
                beside(temporary)
                if adapter.marked:  # and after the card, in whose place it warns
                    mark_unmeasured(temporary, adapter.base, adapter.marked)
