"""Does PEFT find the place of every factor of a patch? Asked of PEFT itself, on the model without its weights.

PEFT names what it loads by its own rules, rewrites targets of some architectures, and only warns of factors for which
it found no place (huggingface/peft#3711): such a patch loads, and is another one than was measured.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.adapter import PREFIX, write_patch
from oneshot.checkpoint.adapters.carrier import INNER, SINGLE_EXPERT, Carried, forms_of, model_path
from oneshot.checkpoint.adapters.carrier_read import parameter_of
from oneshot.checkpoint.adapters.effective import factor_of
from oneshot.checkpoint.adapters.experts import bare_matrices, fused_experts
from oneshot.checkpoint.adapters.update import Update
from oneshot.checkpoint.disk.files import read_header
from oneshot.checkpoint.names import ADAPTER_TENSORS
from oneshot.errors import UserError, first_line
from oneshot.versions import package_version

if TYPE_CHECKING:
    import torch

_SHOWN = 3  # names of layers in a message
_ADVICE = (
    "leave the layers out with --repair.targets, a regular expression of those to patch, or, in an export, give "
    "--expert_form 3d, or --model to merge"
)


def write_loadable(
    folder: Path,
    update: Update | Carried | list[Carried],
    linears: list[str],
    base: str,
    dtype: torch.dtype,
    model: Any,
    commit: str | None = None,
) -> None:
    """Write an update as ``write_patch`` does, in the first way that PEFT loads whole.

    Experts' factors in the form that the model's class in vLLM takes, or else in 3-D. Layers by one of three ways to
    name them: short names; full ones, where another module has a name of the same end; and the names of weights, for
    those that PEFT takes for a part of fused experts (gate_proj, up_proj and down_proj of dense and shared MLPs in some
    mixtures). Routers always by that.

    Args:
        folder, linears, base, dtype, commit: as of ``write_patch``
        update: what to add to the base; or the forms of it that are to be tried, in this order
        model: the base's, of transformers, its parameters on the meta device

    Raises:
        UserError: PEFT does not load all of it in any way
    """
    held = [update] if isinstance(update, Carried) else update
    ways = held if isinstance(held, list) else forms_of(held, model)
    for way in ways:
        try:
            _write_whole(folder, way, linears, base, dtype, model, commit)
            return
        except UserError:
            if way is ways[-1]:
                raise


def _write_whole(
    folder: Path, held: Carried, linears: list[str], base: str, dtype: torch.dtype, model: Any, commit: str | None
) -> None:
    """Write an update in its form under the first names that PEFT loads whole; see ``write_loadable``."""
    lost, weights = list[str](), held.linears.keys() & bare_matrices(model).keys()
    for names in [linears, []] if linears else [[]]:
        write_patch(folder, held, names, base, dtype, weights, commit)
        try:
            if not (lost := not_injected(folder, model)):
                return
        except UserError:  # a short name is that of a wrapper as well
            lost = []
    write_patch(folder, held, [], base, dtype, weights | (held.linears.keys() & set(lost)), commit)
    check_loads(folder, model)


def check_loads(folder: Path, model: Any) -> None:
    """Raise UserError if PEFT would not load all of an adapter.

    Args:
        model: see ``write_loadable``
    """
    if why := why_not_loaded(folder, model):
        raise UserError(f"{why}, so that this would be loaded as another patch: {_ADVICE}.")


def why_not_loaded(folder: Path, model: Any) -> str:
    """Return why PEFT would not load all of an adapter, as a clause; "" where it would.

    Args:
        model: see ``write_loadable``
    """
    try:
        lost = not_injected(folder, model)
    except UserError as error:
        return str(error)
    if not lost:
        return ""
    said = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
    return f"PEFT {package_version('peft')} finds no place for what belongs to {said}"


def not_injected(folder: Path, model: Any) -> list[str]:
    """Return the layers of which PEFT would not load the stored factors where they are meant to be, sorted.

    Reads the adapter's header alone: where a factor goes is a matter of names and shapes. PEFT gets a copy of the
    model, as it leaves its wrappers there where it fails.

    Args:
        folder: of a LoRA adapter
        model: see ``write_loadable``

    Raises:
        UserError: PEFT does not load it at all; a clause
    """
    import torch
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    entries = read_header(folder / ADAPTER_TENSORS)
    tensors = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    config = PeftConfig.from_pretrained(str(folder))
    fused = set(fused_experts(model))
    parameters = config.target_parameters or []  # as the file has them: PEFT adds to them
    config.inference_mode = True
    config.init_lora_weights = True  # what is loaded takes its place, and not every kind can be on the meta device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are missing: found below
        try:
            loaded = PeftModel(copy.deepcopy(model), config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            result: Any = set_peft_model_state_dict(loaded, dict(tensors), low_cpu_mem_usage=True)
        except Exception as error:  # what PEFT cannot place shows as an error of any kind
            raise UserError(f"PEFT {package_version('peft')} ends in an error ({first_line(error)})") from error
    unmatched = [*result.missing_keys, *result.unexpected_keys]
    lost = _lost(loaded, _meant(tensors, fused), unmatched)
    return sorted({*lost, *_misplaced(loaded, tensors, [str(name) for name in parameters])})


def _lost(loaded: Any, meant: dict[tuple[str, str], tuple[int, ...]], unmatched: list[str]) -> list[str]:
    """Layers whose factors PEFT has put nowhere, in another shape, or which it gave factors that the file has not.

    Args:
        loaded: the model with the adapter, on the meta device
        meant: see ``_meant``
        unmatched: names of tensors for which there was no place, or of places for which there was no tensor
    """
    modules = dict(loaded.base_model.model.named_modules())
    lost = {name.split(".lora_")[0].removeprefix(PREFIX) for name in unmatched if ".lora_" in name}
    for (module, which), shape in meant.items():
        factors = getattr(modules.get(module), f"lora_{which}", {})
        if "default" not in factors or factors["default"].weight.shape != shape:
            lost.add(module)
    injected = {name for name, module in modules.items() if "default" in getattr(module, "lora_A", {})}
    return sorted(lost | (injected - {module for module, _ in meant}))


def _meant(tensors: dict[str, torch.Tensor], fused: set[str]) -> dict[tuple[str, str], tuple[int, ...]]:
    """Of which shape a factor is in the model, by module and which one: those of single experts PEFT makes one.

    Args:
        fused: names of the model's modules of fused experts
    """
    found: dict[tuple[str, str], tuple[int, ...]] = {}
    projections: dict[tuple[str, str], set[str]] = {}
    for key, stored in tensors.items():
        if (factor := factor_of(key)) is None:
            continue
        module, which = factor
        single = SINGLE_EXPERT.fullmatch(module)
        if single is None or model_path(single[1]) not in fused:
            found[module, which] = tuple(stored.shape)
            continue
        path = model_path(single[1]) + ("" if single[3] in ("down_proj", "w2") else INNER)
        rows, columns = stored.shape
        before = found.get((path, which), (0, columns) if which == "A" else (0, 0))
        if which == "A":
            found[path, which] = (before[0] + rows, columns)
        else:  # the ranks add up; the rows are those of gate and up
            known = projections.setdefault((path, which), set())
            more = 0 if single[3] in known else rows
            known.add(single[3])
            found[path, which] = (before[0] + more, before[1] + columns)
    return found


def _misplaced(loaded: Any, tensors: dict[str, torch.Tensor], parameters: list[str]) -> list[str]:
    """Experts' factors that PEFT has put onto another parameter than the one that they are read as."""
    modules = dict(loaded.base_model.model.named_modules())
    found: list[str] = []
    shapes: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in tensors.items():
        if (factor := factor_of(key)) is not None:
            shapes.setdefault(factor[0], {})[factor[1]] = tensor.shape
    sizes = {module: (each["B"][0], each["A"][1]) for module, each in shapes.items()}
    for module in shapes:
        meant = parameter_of(module, parameters, sizes)
        if meant is not None and getattr(modules.get(module), "parameter_name", None) != meant.rsplit(".", 1)[-1]:
            found.append(module)
    return found
