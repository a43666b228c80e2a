"""LLM-VA: in the weights, make whether the model answers a copy of whether the request is benign.

Zhang, Wang, Liu, Chen and Wang, "LLM-VA: Resolving the Jailbreak-Overrefusal Trade-off via Vector Alignment", ACL 2026
(arXiv 2601.19487). At the last token of a prompt, what each attention and MLP block adds to the residual stream is
looked at. A linear support vector machine without an intercept separates benign from harmful prompts: its normal is the
benign vector b; another separates answered from refused ones: the answer vector a. The blocks whose two vectors agree
best with those of the last residual, weighed by how well they separate prompts that they were not fitted to, are
changed: the block's output along a becomes its output along b, scaled to the spread that a had. Of all changes of the
output matrix that do this the one of least norm is W + a ((s_a / s_b) b - a)^T W. This is repeated, and the round
with the best F1 kept.

Our reading: the paper's blocks are 24 of the 64 of its models, here the same share of any. A model that refuses next to
nothing, as after an attack, has no answer vector of its own: then the aligned model's is taken, from its own answers
and what its blocks write. The paper repairs no attacked models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

WRITERS = ("o_proj", "down_proj")  # the last matrices of attention and MLP blocks, by their modules' last name
SHARE = 24 / 64  # of the blocks, how many are changed
RESIDUAL = ""  # the name of the last residual among what is seen


@dataclass(frozen=True)
class Seen:
    """What a model did with prompts.

    Attributes:
        written: by module what it added to the residual stream at each prompt's last token, (prompts, width), and
            under ``RESIDUAL`` the residual stream after the last layer
        answered: bool (prompts), which ones it answered
    """

    written: Mapping[str, torch.Tensor]
    answered: torch.Tensor


@dataclass(frozen=True)
class Vectors:
    """Unit vectors (width) with the standard deviations of what is written along them, and accuracies, 0 to 1."""

    benign: torch.Tensor
    answer: torch.Tensor
    benign_spread: float
    answer_spread: float
    benign_accuracy: float
    answer_accuracy: float


def separate(features: torch.Tensor, wanted: torch.Tensor, cost: float = 1.0, rounds: int = 50) -> torch.Tensor:
    """Return the unit normal of a linear support vector machine (squared hinge, no intercept).

    It minimizes |w|^2 / 2 + cost * sum(max(0, 1 - y w.x)^2) by finite Newton steps: between changes of which rows lie
    within the margin, a least-squares problem, solved over rows, which are fewer than the width.

    Args:
        features: (rows, width)
        wanted: bool (rows), which ones are on the side that the normal points to
    """
    import torch

    x = features.double()
    y = wanted.double() * 2 - 1
    w, kernel = x.new_zeros(x.shape[1]), x @ x.T

    def value(at: torch.Tensor) -> float:
        return float(at @ at / 2 + cost * (1 - y * (x @ at)).clamp_min(0).square().sum())

    for _ in range(rounds):
        within = (y * (x @ w) < 1).nonzero().flatten()
        if not len(within):
            break
        ridge = torch.eye(len(within), dtype=x.dtype) / (2 * cost)
        goal = x[within].T @ torch.linalg.solve(kernel[within][:, within] + ridge, y[within])
        step, before = 1.0, value(w)
        while value(w + step * (goal - w)) > before and step > 1e-6:  # too far where rows would come within meanwhile
            step /= 2
        move = step * (goal - w)
        w = w + move
        if float(move.norm()) <= 1e-9 * float(w.norm()):
            break
    found: torch.Tensor = (w / w.norm().clamp_min(torch.finfo(w.dtype).tiny)).to(features.dtype)
    return found


def vectors(own: torch.Tensor, benign: torch.Tensor, others: torch.Tensor, answered: torch.Tensor) -> Vectors:
    """Return a block's vectors; each fourth row is kept from the fit, for its accuracy.

    Args:
        own: what the block wrote, (rows, width); the spreads are of this
        benign: bool (rows)
        others: what the block of the model that ``answered`` is about wrote, (rows, width)
        answered: bool (rows)
    """
    import torch

    kept = torch.arange(len(own)) % 4 == 3
    found = [
        (normal := separate(x[~kept], wanted[~kept]), float(((x[kept] @ normal > 0) == wanted[kept]).float().mean()))
        for x, wanted in ((own, benign), (others, answered))
    ]
    (b, b_accuracy), (a, a_accuracy) = found
    return Vectors(b, a, float((own @ b).std()), float((own @ a).std()), b_accuracy, a_accuracy)


def tied(weight: torch.Tensor, found: Vectors) -> torch.Tensor:
    """Return the matrix (width, n) whose outputs along the answer vector follow those along the benign one."""
    import torch

    ratio = found.answer_spread / found.benign_spread if found.benign_spread else 0.0
    return weight + torch.outer(found.answer, (ratio * found.benign - found.answer) @ weight)


def aligned_round(
    state: State, seen: Seen, benign: torch.Tensor, teacher: Seen, share: float = SHARE
) -> tuple[State, list[str]]:
    """Return the state after one round, and the modules that it changed.

    Args:
        state: weights by name, those of the modules in ``seen`` among them
        benign: bool (prompts)
        teacher: what the answer vectors are fitted to: ``seen`` itself, or the aligned model's
    """
    by_block = {
        name: vectors(written, benign, teacher.written[name], teacher.answered)
        for name, written in seen.written.items()
    }
    last = by_block.pop(RESIDUAL)
    worth = {
        name: float(v.benign @ last.benign) * v.benign_accuracy + float(v.answer @ last.answer) * v.answer_accuracy
        for name, v in by_block.items()
    }
    chosen = sorted(worth, key=lambda name: -worth[name])[: max(1, round(share * len(worth)))]
    changes = {f"{name}.weight": tied(state[f"{name}.weight"], by_block[name]) for name in chosen}
    return state | changes, chosen


def written(model: Any, prompts: Sequence[Sequence[int]], batch_size: int = 32) -> dict[str, torch.Tensor]:
    """Return what each block adds to the residual stream at the last token of each prompt (token ids): ``Seen``'s."""
    import torch

    modules = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in WRITERS}
    modules[RESIDUAL] = last_layer(model)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    ends = torch.empty(0)

    def keep(name: str) -> Any:
        def hook(_module: Any, _given: Any, out: Any) -> None:
            found = out[0] if isinstance(out, tuple) else out
            parts[name].append(found[torch.arange(len(found)), ends].detach().clone())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            ids, ends = right_padded(rows)
            with torch.no_grad():
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in parts.items()}


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (rows, tokens) and the place of each row's last one: what follows changes nothing before it."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([len(row) - 1 for row in rows])


def layers_of(model: Any) -> dict[str, Any]:
    """Return a transformer's layers by their names, in order."""
    from torch import nn

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    home = max(lists, key=lambda name: len(lists[name]))
    return {f"{home}.{i}": layer for i, layer in enumerate(lists[home])}


def last_layer(model: Any) -> Any:
    """Return the last of a transformer's layers, after which comes the residual stream as the head's norm takes it."""
    return list(layers_of(model).values())[-1]
