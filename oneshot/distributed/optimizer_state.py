"""The training state that a rank holds, as views of one shape for every sharding: fp32 masters and Adam's moments.

Each view is a contiguous piece of one flattened parameter. Writing into it changes the engine's own state, so saving
and restoring walk the same pieces. Sources of the DeepSpeed internals: ``deepspeed/utils/tensor_fragment.py`` (ZeRO-2)
and ``deepspeed/runtime/zero/stage3.py``, ``_get_fp32_opt_state_partition`` (ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.distributed.engine import TrainingEngine

if TYPE_CHECKING:
    import torch

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateShare:
    """Elements ``start`` .. ``start + len(values)`` of one kind of state of one parameter.

    Attributes:
        name: of the parameter in the model
        kind: master (the fp32 weight), exp_avg or exp_avg_sq
        shape: of the whole parameter
        values: fp32 (n,), a view
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor


def held_state(engine: TrainingEngine) -> Iterator[StateShare]:
    """Yield what this rank holds of every trained parameter's state; under DDP every rank holds everything."""
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for kind in KINDS:
            found = _share_of(engine, parameter, kind)
            if found is not None:
                start, values = found
                yield StateShare(name, kind, shape, start, values.detach())


def trained_shapes(engine: TrainingEngine) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all state tensors of the whole run, named ``kind.parameter``."""
    named = [(n, p) for n, p in engine.model.named_parameters() if p.requires_grad]
    return {f"{kind}.{n}": tuple(getattr(p, "ds_shape", p.shape)) for n, p in named for kind in KINDS}


def allocate(engine: TrainingEngine) -> None:
    """Give the optimizer its moments (zeros) where it makes them at its first step only, so that all pieces exist."""
    from oneshot.distributed.adamw import moments

    inner = _inner(engine)
    if engine.runtime.sharding == "zero3":  # it shows its inner optimizer one sub-group at a time, and only in step()
        stepped = engine.optimizer.fp32_partitioned_groups_flat
    else:
        stepped = [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter in stepped:
        moments(inner, parameter)
    if engine.runtime.sharding == "zero2":
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def restored(engine: TrainingEngine, steps: int) -> None:
    """Finish a restore: Adam's step count, and the low-precision weights from the masters. Collective."""
    import torch

    inner = _inner(engine)
    for state in inner.state.values():
        if "step" in state:
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), steps)
    if engine.runtime.sharding == "zero2":
        engine.optimizer.update_lp_params()
    elif engine.runtime.sharding == "zero3":
        for group in range(len(engine.optimizer.fp16_groups)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def _share_of(engine: TrainingEngine, parameter: Any, kind: str) -> tuple[int, torch.Tensor] | None:
    key = None if kind == "master" else kind
    if engine.runtime.sharding == "zero3":
        padded, _ = engine.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=key
        )
        start = min(engine.runtime.rank * len(padded), parameter.ds_numel)
        return start, padded[: min(len(padded), parameter.ds_numel - start)]
    if engine.runtime.sharding == "zero2":
        mapping = parameter._hp_mapping
        if mapping is None:
            return None  # no element of it lies in this rank's share of the flat buffer
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).view(-1)
    values = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
    return 0, values.view(-1)


def _inner(engine: TrainingEngine) -> Any:
    """torch's own optimizer, inside DeepSpeed's."""
    return engine.optimizer.optimizer if engine.is_deepspeed else engine.optimizer
