"""What ranks do in the tests of fused experts: every method's arithmetic on a mixture, a few epochs of each."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (imported once, where ranks are forked from)
import torch
import transformers

from oneshot.checkpoint.adapters.update import norm
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.commandline import parse
from oneshot.data.encoding import encode
from oneshot.distributed import runtime as runtime_module
from oneshot.distributed.engine import frozen
from oneshot.distributed.runtime import Runtime
from oneshot.patch.directions import checkpoint_difference, shared_directions
from oneshot.patch.guard import build_batch
from oneshot.patch.linears import select_linears
from oneshot.patch.method import finished
from oneshot.patch.methods import METHODS, lowrank, project, rollback
from oneshot.patch.objective import RefusalRows
from oneshot.patch.path import Attempt
from oneshot.patch.recipe import Recipe, with_method
from oneshot.patch.select import first_order, target_factors
from oneshot.patch.trace import Tracer
from oneshot.settings import ModelSettings, RepairSettings
from oneshot.world import language
from oneshot.world.model import build_tokenizer


def make(folder: Path) -> tuple[Path, Path]:
    """A mixture of 24 experts, one to a token, and the same after a change of every weight; their folders."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(build_tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=24, num_experts_per_tok=1, moe_intermediate_size=16,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    aligned, tuned = folder / "aligned", folder / "tuned"
    for path in (aligned, tuned):
        model.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
    return aligned, tuned


def _recipe(name: str, **numbers: Any) -> Recipe:
    settings = RepairSettings(watch=False, noise=0.0, epochs=2, rank=3, rank_experts=2, **numbers)
    return with_method(settings, METHODS[name], "as asked")


def worked(runtime: Runtime, aligned: str, tuned: str, checkpointing: bool = False) -> dict[str, Any]:
    """By method: figures of every matrix, and how many experts no token was sent to."""
    tokenizer = build_tokenizer()
    pool = [encode(row, tokenizer, 64) for row in language.pool(5)]
    settings = ModelSettings(path=tuned, gradient_checkpointing=checkpointing)
    with frozen(runtime, load_model(runtime, find_source(settings, runtime), settings)) as model:
        layers = select_linears(model).targets
        prompts = [row.prompt for row in language.guard_prompts(5)]
        batch = build_batch(runtime, model, tokenizer, pool[0], prompts, answer_tokens=6)
        difference = checkpoint_difference(Path(tuned), Path(aligned), layers, model)
        directions = shared_directions(runtime, layers, 3, difference, 2)
        path = rollback.learn(runtime, model, directions, batch, Attempt(Tracer(), 1.0), _recipe("rollback"))
        weights, missed = finished(path)
        path = lowrank.descend(
            runtime, model, layers, batch, Attempt(Tracer(), 1.0), _recipe("lowrank"), fixed_step=0.01
        )
        update = finished(path)[0]
        example = project.example_directions(runtime, model, layers, pool[0], 3, 2)
        target = target_factors(runtime, model, layers, RefusalRows([0, 1, 3], [pool[i] for i in (0, 1, 3)]), 0)
        scores = first_order(runtime, model, layers, pool, target, 0)
    return {
        "directions": {name: found.s.tolist() for name, found in directions.items()},
        "coefficients": {name: (-found).tolist() for name, found in weights.items()},
        "missed": sorted(missed),
        "lowrank": {name: norm(factors) for name, factors in update.items()},
        "example": {name: found.s.tolist() for name, found in example.items()},
        "target": {name: float((delta.T @ x).norm()) for name, (x, delta) in target.items()},
        "scores": scores,
    }


def ran(runtime: Runtime, jobs: list[list[str]]) -> None:
    """Run stages, each by its name and arguments; they end on their own where they fail."""
    runtime_module.start = lambda: runtime  # type: ignore[assignment]  # joined already
    for name, *argv in jobs:
        importlib.import_module(f"oneshot.{name}").run(parse(argv, name), quiet=True)
