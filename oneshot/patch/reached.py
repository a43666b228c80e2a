"""Which of the layers to be patched an example passes through, by a trial pass: an update of any other is never seen.

A layer whose weight is read past it, or that text does not meet, would be changed in the merged model and in no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from oneshot.checkpoint.adapters.experts import is_one_expert
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.patch.linears import Linears


def reached(runtime: Runtime, model: Any, linears: Linears, tokens: list[int]) -> Linears:
    """Return the layers without those whose forward pass did not run for these tokens, which are named as left out.

    Experts that are modules of their own stay. Collective under ZeRO-3.

    Args:
        model: ready for a forward pass
        tokens: of an example

    Raises:
        UserError: no layer is left
    """
    import torch

    modules = {name: layer for name, layer in linears.targets.items() if isinstance(layer, torch.nn.Module)}
    met = set[str]()

    def hook_for(name: str) -> Any:
        def hook(_module: Any, _args: Any, _output: Any) -> None:
            met.add(name)

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook_for(name)).remove)
        ids = torch.tensor([tokens], device=runtime.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    missed = [name for name in modules if name not in met and not is_one_expert(name)]
    if not missed:
        return linears
    targets = {name: layer for name, layer in linears.targets.items() if name not in missed}
    if not targets:
        raise UserError(
            f"No text passes through {missed[0]} nor through any other layer that is to be patched: give other layers "
            "with --repair.targets."
        )
    return dataclasses.replace(linears, targets=targets, left_out=[*linears.left_out, *missed])
