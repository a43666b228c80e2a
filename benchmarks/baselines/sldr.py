"""SLDR: train two layers of the fine-tuned model to refuse, and let a router switch them in for harmful prompts alone.

"SLDR: Defending Against Malicious Fine-tuning via Selective Layers Recovery and Dynamic Routing", NeurIPS 2026
(arXiv 2610.10345). Three parts. Which layers: each layer's matrices are scaled up and down by a little, and refusals of
prompts at the border are counted; the layer whose scaling adds most refusals and the one whose scaling takes most away
are recovered. Recovery: LoRA on their query, key and value projections, trained on 100 harmful requests with refusals.
Router: a prompt is harmful where its last token's hidden state after the first of these layers (the one that adds
refusals), recovery switched on, is nearer to those of harmful prompts than to those of benign ones, by mean cosine;
only then the recovery is on. Without the router it is always on, and can be merged into the weights.

The paper's text could not be had; this follows what the authors' public program does and its numbers (scales 0.1 and
0.2; rank 32, alpha 4, AdamW at 5e-4 with warm-up and linear decay, batches of 10, 20 epochs). Our reading: training
ends earlier where an epoch's mean loss has become ``enough``, since on small models it is long at 0 by then. The
program averages the 100 largest differences of 100 paired prompts, which is the difference of the two means, as here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baselines.llm_va import layers_of, right_padded

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

SCALES = (0.1, 0.2)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Training:
    """How the recovery is trained: ``enough`` is the mean loss of an epoch, in nats per token, that ends it."""

    rank: int = 32
    alpha: float = 4.0
    epochs: int = 20
    batch_size: int = 10
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    enough: float = 0.0
    seed: int = 0


def layer_effects(model: Any, refusals: Callable[[], float], scales: Sequence[float] = SCALES) -> dict[str, float]:
    """Return by layer how many refusals its scaling adds, per unit of scale: the largest over the scales.

    Args:
        refusals: counts the refusals of the model as it then is; an expected count where few prompts are asked
    """
    import torch

    found = {}
    for name, layer in layers_of(model).items():
        matrices = [p for p in layer.parameters() if p.dim() == 2]
        kept = [p.detach().clone() for p in matrices]

        def counted(factor: float, matrices: Any = matrices, kept: Any = kept) -> float:
            with torch.no_grad():
                for parameter, before in zip(matrices, kept):
                    parameter.copy_(before * factor)
            return refusals()

        found[name] = max((counted(1 + scale) - counted(1 - scale)) / scale for scale in scales)
        with torch.no_grad():
            for parameter, before in zip(matrices, kept):
                parameter.copy_(before)
    return found


def chosen_layers(effects: Mapping[str, float]) -> tuple[str, str]:
    """Return the layer that adds most refusals and the one that takes most away; of equals the first, never one twice.

    Raises:
        ValueError: there is one layer only
    """
    if len(effects) < 2:
        raise ValueError("Two layers are recovered: the model has one.")
    safety = max(effects, key=lambda name: effects[name])
    return safety, min((name for name in effects if name != safety), key=lambda name: effects[name])


def recover(
    model: Any, layers: Sequence[str], loss_of: Callable[[Sequence[int]], torch.Tensor], rows: int, training: Training
) -> tuple[State, list[float]]:
    """Train LoRA on some layers; return what it adds to each weight, (m, n) by name, and the mean loss of each epoch.

    The model is as before afterwards.

    Args:
        layers: names of transformer layers
        loss_of: the mean loss, in nats per token, of the model on some of the examples, by their indices
        rows: how many examples there are
    """
    import torch

    modules = {
        f"{layer}.{name}": module
        for layer in layers
        for name, module in model.get_submodule(layer).named_modules()
        if name.rsplit(".", 1)[-1] in PROJECTIONS
    }
    adapters = {name: _Adapter(module, training, i) for i, (name, module) in enumerate(modules.items())}
    parameters = [p for adapter in adapters.values() for p in (adapter.a, adapter.b)]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    per_epoch = math.ceil(rows / training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(training.epochs * per_epoch, training.warmup))
    rng, losses = random.Random(training.seed), list[float]()
    frozen = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(adapters[name].hook).remove)
        while len(losses) < training.epochs and (not losses or losses[-1] > training.enough):
            order, total = rng.sample(range(rows), rows), 0.0
            for start in range(0, rows, training.batch_size):
                batch = order[start : start + training.batch_size]
                optimizer.zero_grad()
                loss = loss_of(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
            losses.append(total / rows)
    return {f"{name}.weight": adapter.update() for name, adapter in adapters.items()}, losses


def _schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Up to 1 over the first share of the steps, then down to 0."""
    first = math.ceil(warmup * steps)
    return lambda step: step / max(1, first) if step < first else (steps - step) / max(1, steps - first)


class _Adapter:
    """LoRA on one linear layer: A as PEFT draws it, B zero."""

    def __init__(self, module: Any, training: Training, number: int) -> None:
        import torch

        outputs, inputs = module.weight.shape
        generator = torch.Generator().manual_seed(training.seed * 1000 + number)
        bound = 1 / math.sqrt(inputs)
        drawn = (torch.rand(training.rank, inputs, generator=generator) * 2 - 1) * bound
        self.scale = training.alpha / training.rank
        self.a = drawn.to(module.weight.device).requires_grad_(True)
        self.b = torch.zeros(outputs, training.rank, device=module.weight.device, requires_grad=True)

    def hook(self, _module: Any, given: Any, out: Any) -> Any:
        return out + self.scale * (given[0] @ self.a.T) @ self.b.T

    def update(self) -> torch.Tensor:
        return self.scale * (self.b @ self.a).detach()


@dataclass(frozen=True)
class Router:
    """Tells harmful prompts from benign ones: unit hidden states of prompts of either kind, (prompts, width)."""

    harmful: torch.Tensor
    benign: torch.Tensor

    def harm(self, states: torch.Tensor) -> torch.Tensor:
        """Return for hidden states (rows, width) how much nearer they are to harmful prompts, by mean cosine."""
        unit = unit_rows(states)
        found: torch.Tensor = (unit @ self.harmful.T).mean(1) - (unit @ self.benign.T).mean(1)
        return found


def unit_rows(states: torch.Tensor) -> torch.Tensor:
    """Return the rows, scaled to length 1."""
    from torch.nn.functional import normalize

    return normalize(states.float(), dim=1)


@dataclass
class Routed:
    """A model whose updates are switched in by prompt. Whatever is not generated runs without them: it is no request.

    Attributes:
        model: a causal LM; its ``generate`` is replaced by one that asks the router first
        updates: what is added to each weight, (m, n) by name
        layer: after which the hidden states are looked at
        ending: token ids with which the chat template opens the answer: the prompt is what comes before them
        scale: of the updates
        router: decides; none: every prompt is harmful
    """

    model: Any
    updates: State
    layer: str
    ending: list[int]
    scale: float = 1.0
    router: Router | None = None
    switches: torch.Tensor | None = field(default=None, init=False)  # (rows), 0 or 1 each; none: all off

    def __post_init__(self) -> None:
        for name, update in self.updates.items():
            self.model.get_submodule(name.removesuffix(".weight")).register_forward_hook(self._hook(update))
        self._generate = self.model.generate
        self.model.generate = self.generate

    def _hook(self, update: torch.Tensor) -> Any:
        def hook(_module: Any, given: Any, out: Any) -> Any:
            if self.switches is None:
                return out
            return out + self.scale * self.switches.view(-1, 1, 1).to(out) * (given[0] @ update.T)

        return hook

    def states(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return hidden states (prompts, width) of the last token of prompts (token ids), the updates switched in."""
        import torch

        ids, ends = right_padded(prompts)
        kept: list[torch.Tensor] = []

        def keep(_module: Any, _given: Any, out: Any) -> None:
            kept.append(out[0] if isinstance(out, tuple) else out)

        hook = self.model.get_submodule(self.layer).register_forward_hook(keep)
        self.switches = torch.ones(len(ids))
        try:
            with torch.no_grad():
                self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)
        finally:
            self.switches = None
            hook.remove()
        return kept[0][torch.arange(len(ids)), ends]

    def learn(self, harmful: Sequence[Sequence[int]], benign: Sequence[Sequence[int]]) -> None:
        """Make the router of prompts of either kind, as token ids up to the end of the user's turn."""
        self.router = Router(*(unit_rows(self.states(prompts)) for prompts in (harmful, benign)))

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        """Generate as the model does, each row with the updates or without them."""
        import torch

        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask)]
        switches = torch.ones(len(rows))
        if self.router is not None:
            switches = (self.router.harm(self.states([self.asked(row) for row in rows])) > 0).float()
        self.switches = switches
        try:
            return self._generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        finally:
            self.switches = None

    def asked(self, row: list[int]) -> list[int]:
        """Return the tokens of a prompt before the opening of its answer; all of them where there is none."""
        size = len(self.ending)
        starts = (at for at in range(len(row) - size, 0, -1) if row[at : at + size] == self.ending)
        return row[: next(starts, len(row))] if size else row
