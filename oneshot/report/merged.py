"""An adapter that is more than a LoRA (DoRA, saved modules, ...) is merged into its base first, and that is repaired.

The merged checkpoint stands in the run folder. Its difference from the base is the adapter's effective update, whose
directions are what rollback undoes; modules that were saved whole stay as they are. The patch is a plain LoRA for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.checkpoint.adapters.adapter import Adapter
from oneshot.checkpoint.adapters.bases import base_of
from oneshot.checkpoint.adapters.effective import Kinds, kinds_of, refuse
from oneshot.checkpoint.disk.files import is_adapter, resolve, write_marker
from oneshot.checkpoint.loading.pinned import commit_of
from oneshot.checkpoint.merging.exports import GivenAdapter, check_space, plan_for
from oneshot.checkpoint.merging.merge import merge
from oneshot.checkpoint.reads.digests import shared_fingerprint
from oneshot.checkpoint.writing.identity import read_identity
from oneshot.checkpoint.writing.standing import comes_from_degraded
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError
from oneshot.reading import read_object
from oneshot.redact import without_secrets
from oneshot.report.card import merge_card, write_card
from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

MERGED = "merged"  # in the run folder


@dataclass(frozen=True)
class ToMerge:
    """An adapter that is to be merged first.

    Attributes:
        base_name: of the checkpoint that it stands on; a Hub id stays one
    """

    settings: Settings
    adapter: Path
    kinds: Kinds
    base: Path
    base_name: str

    def on(self, model: str) -> Settings:
        """The settings with a checkpoint in the place of the adapter, and the adapter's base as the reference."""
        settings = self.settings
        reference = settings.reference or self.base_name
        revision = settings.reference_revision if settings.reference else commit_of(self.base)
        plain = dataclasses.replace(settings.model, path=model, base=None, revision=None, base_revision=None)
        return dataclasses.replace(
            settings, name=settings.called, reference=reference, reference_revision=revision, model=plain
        )


def to_merge(settings: Settings) -> ToMerge | None:
    """Return what is to be merged before a repair; none where the model is a checkpoint or a plain LoRA.

    Raises:
        UserError: an adapter that is not merged tensor by tensor, with the command that converts it
    """
    if settings.model.path is None:
        return None
    adapter = resolve(settings.model.path, revision=settings.model.revision)
    if not is_adapter(adapter):
        return None
    kinds = kinds_of(adapter)
    if not kinds.every:
        return None
    name, base = base_of(adapter, settings.model.base, settings.model.base_revision)
    if kinds.never or kinds.by_peft:
        raise refuse(adapter, kinds.every, name)
    return ToMerge(settings, adapter, kinds, base, name)


@phase("merge")
def merge_first(runtime: Runtime, asked: ToMerge, run_dir: Path, console: Console | None) -> Settings:
    """Write ``run_dir/merged``, and return the settings that go on with it. Collective.

    What comes from a safety-degraded model or adapter is marked.
    """
    import torch

    kinds = ", ".join(asked.kinds.every)
    empty = Adapter({}, {}, {}, read_object(asked.adapter / "adapter_config.json"), torch.float32)
    given = GivenAdapter(asked.adapter, empty, 1.0, read_identity(asked.adapter), asked.kinds)
    trusted = asked.settings.model.trust_remote_code
    plan = plan_for(runtime, asked.base, [given], sign=1.0, trust_remote_code=trusted)
    target = run_dir / MERGED
    with agree(runtime, f"looking at {target}"):
        if runtime.is_main and target.exists() and not asked.settings.resume:
            raise UserError(f"{target} is there already, where the merged model is to be written: give another --out.")
        if runtime.is_main:
            check_space(target, plan.nbytes)
    if console:
        console.print(
            f"The adapter is more than a LoRA ({kinds}): it is merged into its base first, as {target}, and the patch "
            "is for that checkpoint.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    degraded = any(map(comes_from_degraded, (asked.base, asked.adapter)))
    marked = "it is the model that is to be repaired, and comes from a safety-degraded one" if degraded else ""
    fingerprint = shared_fingerprint(runtime, asked.base)
    facts, lines = merge_card(
        plan, [given], base=asked.base_name, base_fingerprint=fingerprint, subtract=False, marked=marked
    )
    facts["command"] = f"oneshot export --model {asked.base_name} --adapter {asked.adapter} --out {target}"

    def beside(folder: Path) -> None:
        write_card(folder, "Merged checkpoint", facts, lines)
        if marked:  # in the place of the card
            write_marker(folder, without_secrets({"merged": str(asked.adapter), "base": asked.base_name}))

    merge(runtime, plan, target, beside)
    return asked.on(str(target))
