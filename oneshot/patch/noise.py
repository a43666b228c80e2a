"""Noise on the one example's request, so that its neighbours are refused, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from oneshot.data.encoding import IGNORE
from oneshot.patch.guard import RepairBatch

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def noisy_example(model: Any, batch: RepairBatch, scale: float, generator: torch.Generator) -> Iterator[None]:
    """Within the block the embeddings of the example's request are blurred: refuse what is near it, too.

    One request alone says nothing of its neighbours. After NEFTune (arXiv 2310.05914), here with Gaussian noise, on the
    request only, and alike on every rank. The guard's rows see none.

    Args:
        scale: standard deviation, in units of the request's own root mean square; 0 for none
        generator: on the CPU; of the same state on every rank
    """
    if not scale or not len(batch.own):
        yield
        return
    import torch

    request = batch.own[: next(i for i, label in enumerate(batch.example.labels) if label != IGNORE)]

    def blur(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        flat = output.flatten(0, 1)
        here = flat.index_select(0, request)
        noise = torch.randn(here.shape, generator=generator).to(here.device, here.dtype)
        blurred = here + scale * here.detach().square().mean().sqrt() * noise
        return flat.index_copy(0, request, blurred).view_as(output)

    handle = model.get_input_embeddings().register_forward_hook(blur)
    try:
        yield
    finally:
        handle.remove()
