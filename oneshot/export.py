"""Export: merge adapters into a checkpoint, take them out again, or make one patch from others or from two checkpoints.

Run: ``oneshot export --model DIR --adapter PATCH --out OUT``, or with several processes, which share the tensors,
``accelerate launch --config_file launch/zero3.yaml -m oneshot.export --model DIR --adapter PATCH --out OUT``.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.distributed.runtime import Runtime

PROG = "oneshot export"
DESCRIPTION = "Merge adapters into a checkpoint, take them out again, or make one adapter from others."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot export`` and ``accelerate launch -m oneshot.export``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Export as the command line says."""
    options = parser().parse_args(argv)
    check(options)
    from oneshot.distributed.runtime import start
    from oneshot.report.progress import open_console

    runtime = start()
    job = Job(runtime, options, open_console(runtime), shlex.join(["oneshot", "export", *argv]))
    if options.extract:
        _extract(job)
    elif options.model:
        _merge(job)
    else:
        _derive(job)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    made = CommandParser(prog=PROG, description=DESCRIPTION, allow_abbrev=False)
    add = made.add_argument
    add("--model", metavar="DIR", help="checkpoint to merge into; with --extract: to compare with (folder or Hub id)")
    add("--adapter", metavar="DIR", action="append", default=[], help="PEFT LoRA adapter; several are summed")
    add("--weight", metavar="W", type=float, action="append", default=[], help="of each --adapter, in order (1)")
    add("--out", metavar="DIR", type=Path, required=True, help="folder to write, which must not exist or be empty")
    add("--base", choices=("original", "dequantized"), help="merge into the weights as they are, or as NF4 leaves them")
    add("--double_quant", action="store_true", help="with --base dequantized: the scales were quantized, too")
    add("--subtract", action="store_true", help="take the adapters out of a merged checkpoint")
    add("--rank", metavar="K", type=int, help="of the adapter to write, without --model or with --extract")
    add("--extract", metavar="DIR", help="write what this checkpoint has more than --model as an adapter")
    add("--force", action="store_true", help="use patches that belong to another model")
    add("--trust_remote_code", action="store_true", help="run the model's own Python code to build its config")
    add("--debug", action="store_true", help="full tracebacks")
    return made


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if options.rank is not None and options.rank < 1:
        raise UserError(f"--rank is {options.rank}: give 1 or more.")
    if options.extract:
        given = [f"--{n}" for n in ("adapter", "weight", "base", "double_quant", "subtract") if getattr(options, n)]
        if given:
            raise UserError(f"--extract makes a patch from two checkpoints: leave {given[0]} out.")
        if not options.model or not options.rank:
            raise UserError("--extract needs --model, the checkpoint that the patch is for, and --rank.")
    elif not options.adapter:
        raise UserError("Nothing to export: give --adapter, or --extract with --model.")
    elif options.model and options.rank:
        raise UserError("--rank is for adapters, and a merge has no rank: leave --rank or --model out.")
    elif not options.model and (options.base or options.double_quant or options.subtract):
        raise UserError("--base, --double_quant and --subtract are for a merge: give --model, the checkpoint.")
    elif not options.model and not options.rank and len(options.adapter) == 1 and not options.weight:
        raise UserError("Nothing to do with one adapter alone: give --model to merge it, or --rank to lower its rank.")
    if options.weight and len(options.weight) != len(options.adapter):
        raise UserError(
            f"There are {len(options.adapter)} --adapter and {len(options.weight)} --weight: give one for each or none."
        )
    if any(not 0 < weight < float("inf") for weight in options.weight):
        raise UserError("Every --weight must be a number above 0; --subtract takes adapters out.")
    if options.double_quant and options.base != "dequantized":
        raise UserError("--double_quant says how the base was quantized: give it with --base dequantized.")


@dataclass(frozen=True)
class Job:
    """What every kind of export needs."""

    runtime: Runtime
    options: argparse.Namespace
    console: Console | None
    command: str

    def say(self, lines: list[str]) -> None:
        for line in lines if self.console else []:
            assert self.console is not None
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _merge(job: Job) -> None:
    from oneshot.checkpoint.exports import check_base, check_out, check_space, is_degraded_after, read_given
    from oneshot.checkpoint.files import write_marker
    from oneshot.checkpoint.merge import merge
    from oneshot.checkpoint.merge_plan import adapter_terms, plan_merge
    from oneshot.report.card import merge_card, write_card

    options = job.options
    base, given = _checkpoint(options.model, "model"), read_given(options.adapter, options.weight)
    check_out(options.out, [base, *(one.folder for one in given)])
    degraded = is_degraded_after(base, given, subtract=options.subtract)
    if not options.force:
        check_base(base, given, subtract=options.subtract)
    sign = -1.0 if options.subtract else 1.0
    plan = plan_merge(
        base,
        [(f"The adapter {one.folder}", adapter_terms(one.adapter, sign * one.weight)) for one in given],
        through_nf4=options.base == "dequantized",
        double_quant=options.double_quant,
        trust_remote_code=options.trust_remote_code,
    )
    if plan.packed and options.base:
        raise UserError(
            f"{base} is itself in NF4, and is dequantized as it is read: leave --base out, or give the checkpoint "
            "from before its quantization."
        )
    check_space(options.out, plan.nbytes)
    facts, lines = merge_card(plan, given, base=_name(options.model, base), subtract=options.subtract, marked=degraded)
    facts["command"] = job.command

    def beside(folder: Path) -> None:
        write_card(folder, "Merged checkpoint", facts, lines)
        if degraded:  # after the card, in whose place it warns
            write_marker(folder, {"subtracted": options.adapter, "from": facts["base"]})

    merge(job.runtime, plan, options.out, beside)
    job.say([*lines, f"Checkpoint: {options.out}"])


def _derive(job: Job) -> None:
    """Write one adapter from the given ones: their sum, of lower rank if asked for."""
    import torch

    from oneshot.checkpoint.exports import check_out, read_given, write_adapter
    from oneshot.checkpoint.identity import same_base, store_identity
    from oneshot.patch.derive import is_exact, lowered, summed
    from oneshot.report.card import adapter_card, write_card

    options = job.options
    given = read_given(options.adapter, options.weight)
    check_out(options.out, [one.folder for one in given])
    identity = None if options.force else same_base([(one.folder, one.identity) for one in given])
    total = summed([(one.folder, one.adapter.update, one.weight) for one in given])
    dtypes = {one.adapter.dtype for one in given}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if options.rank is None and not is_exact(total, dtype):
        dtype = torch.float32  # a bf16 adapter times its scaling need not be one
    update, left = lowered(total, options.rank, dtype)
    bases = {str(one.adapter.config.get("base_model_name_or_path") or "") for one in given}
    base = bases.pop() if len(bases) == 1 else ""
    facts, lines = adapter_card("sum", given, left, {}, base=base)
    facts["command"] = job.command

    def beside(folder: Path) -> None:
        write_card(folder, "LoRA adapter", facts, lines)
        if identity is not None:
            store_identity(folder, identity)

    write_adapter(job.runtime, options.out, update, [], base, dtype, given[0].folder, beside)
    job.say([*lines, f"Adapter: {options.out}"])


def _extract(job: Job) -> None:
    """Write the difference of two checkpoints as an adapter."""
    from oneshot.checkpoint.architecture import architecture_of
    from oneshot.checkpoint.exports import check_out, refuse_degraded, write_adapter
    from oneshot.checkpoint.files import find_weight, is_degraded, list_tensors
    from oneshot.checkpoint.identity import REPAIR, UPDATE, write_identity
    from oneshot.checkpoint.ranges import torch_dtype
    from oneshot.patch.derive import extracted
    from oneshot.report.card import adapter_card, write_card

    options = job.options
    changed, base = _checkpoint(options.extract, "changed checkpoint"), _checkpoint(options.model, "model")
    check_out(options.out, [changed, base])
    refuse_degraded(changed)
    tensors = list_tensors(base)
    made = architecture_of(base, tensors, trust_remote_code=options.trust_remote_code)
    linears = {name: made.linears[name] for name in made.patchable}
    if not made.patchable:
        raise UserError(f"{base} has no linear layer that a patch could change.")
    first = find_weight(tensors, made.patchable[0])
    assert first is not None
    dtype = torch_dtype(tensors[first], first)
    update, left, others = extracted(job.runtime, changed, base, linears, options.rank, dtype)
    name = _name(options.model, base)
    facts, lines = adapter_card("difference", [], left, others, base=name)
    facts |= {"changed": _name(options.extract, changed), "command": job.command}

    def beside(folder: Path) -> None:
        write_card(folder, "LoRA adapter", facts, lines)
        write_identity(folder, base, kind=REPAIR if is_degraded(base) else UPDATE, base=name)

    write_adapter(job.runtime, options.out, update, list(made.linears), name, dtype, base, beside)
    job.say([*lines, f"Adapter: {options.out}"])


def _checkpoint(source: str, what: str) -> Path:
    """The folder of a full checkpoint, a Hub id included."""
    from oneshot.checkpoint.files import is_adapter, resolve

    folder = resolve(source, what)
    if is_adapter(folder):
        raise UserError(f"{folder} is an adapter where a full checkpoint belongs: give it with --adapter.")
    return folder


def _name(source: str, folder: Path) -> str:
    """How a card names a checkpoint: a Hub id stays one, a folder is said in full."""
    return str(folder.resolve()) if Path(source).expanduser().is_dir() else source


if __name__ == "__main__":
    main()
