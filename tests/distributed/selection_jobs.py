"""What ranks do in the tests of the choice: factored arithmetic on shared rows, and every rule on a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (imported once, where ranks are forked from)
import torch
import transformers

from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.data.encoding import Encoded, encode
from oneshot.distributed.engine import frozen
from oneshot.distributed.runtime import Runtime, gather_rows
from oneshot.patch.attach import Gradients
from oneshot.patch.factored import inner, singular_values
from oneshot.patch.guard import RepairBatch, build_batch
from oneshot.patch.halving import Trial
from oneshot.patch.linears import select_linears
from oneshot.patch.methods import METHODS, lowrank
from oneshot.patch.objective import RefusalRows, aligned_logits, passes, row_losses, sample
from oneshot.patch.path import Attempt
from oneshot.patch.recipe import with_method
from oneshot.patch.select import Criterion, pick
from oneshot.patch.trace import Tracer
from oneshot.settings import ModelSettings, RepairSettings
from oneshot.world import language
from oneshot.world.model import build_tokenizer

SHAPES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# plain; with biases; tied embeddings; fused attention weights
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
}


def build(family: str) -> Any:
    """A random fp64 model, alike wherever it is built."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    shapes = {k: v for k, v in SHAPES.items() if family != "gpt_neox" or k != "num_key_value_heads"}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**shapes, **options}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.double().eval().requires_grad_(False)


def rows(seed: int) -> list[Encoded]:
    """Five conversations of unequal lengths, so that ranks have unequal shares, and padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (9, 4, 12, 7, 6):
        ids = torch.randint(7, 100, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [-100] * (length - 3) + ids[-3:]))
    return found


def arithmetic(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """By family and layer: inner product, both norms and singular values of two gradients, from all ranks' rows."""
    found = {}
    for family in FAMILIES:
        loaded = build(family)
        linears = select_linears(loaded).targets
        with frozen(runtime, loaded) as model:
            one, two = (_pairs(runtime, model, linears, rows(seed)) for seed in (1, 2))
        found[family] = {
            name: {
                "inner": float(inner(one[name], two[name])),
                "squares": [float(inner(pair[name], pair[name])) for pair in (one, two)],
                "singular": singular_values(one[name]).tolist(),
                "dtype": str(one[name][0].dtype),
            }
            for name in linears
        }
    return found


def _pairs(runtime: Runtime, model: Any, linears: Any, batch: list[Encoded]) -> dict[str, Any]:
    """The factors of the batch's summed loss, each rank's rows from its own passes."""
    gradients, parts = Gradients(linears), []
    with gradients.capturing(model):
        for part in passes(runtime, batch, 0, size=2):
            losses = row_losses(model, part, None)
            torch.stack([loss * float(i < part.own) for i, loss in enumerate(losses)]).sum().backward()
            gradients.keep = part.inputs["attention_mask"].bool()
            parts.append({name: gradients.pair(name) for name in linears})
    return {
        name: tuple(gather_rows(runtime, torch.cat([part[name][side] for part in parts])) for side in (0, 1))
        for name in linears
    }


def choices(
    runtime: Runtime, model: str, aligned: str, count: int, checkpointing: bool = False
) -> dict[str, dict[str, Any]]:
    """By rule: what is chosen, and the table. With an aligned model and without, and on top of an update."""
    tokenizer = build_tokenizer()
    pool = [encode(row, tokenizer, 64) for row in language.pool(count)]
    settings = ModelSettings(path=model, gradient_checkpointing=checkpointing)
    known = _aligned(runtime, aligned, pool)
    found = {}
    with frozen(runtime, load_model(runtime, find_source(settings, runtime), settings)) as loaded:
        linears = select_linears(loaded).targets
        prompts = [row.prompt for row in language.guard_prompts(5)]
        batch = build_batch(runtime, loaded, tokenizer, pool[0], prompts, answer_tokens=6)
        recipe = with_method(RepairSettings(epochs=3, rank=4), METHODS["lowrank"], "as asked")

        def begin(batch: RepairBatch, _index: int) -> Trial:
            attempt = Attempt(Tracer(), 0.3)
            return Trial(lowrank.descend(runtime, loaded, linears, batch, attempt, recipe), attempt)

        for name, rule, harm, own in (
            ("bilevel", "bilevel", known, {}),
            ("no aligned model", "bilevel", RefusalRows(known.places, known.rows), {}),
            ("on an update", "alignment", known, _update(linears)),
            ("hardest", "hardest", known, {}),
            ("random", "random", known, {}),
        ):
            question = Criterion(rule, 3, recipe.epochs, 0, 0, own, harm, batch, batch)
            chosen = pick(runtime, loaded, linears, pool, question, begin)
            table = chosen.selection.get("table", [])
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in table]
            found[name] = {"index": chosen.index, "table": rows}
    return found


def _aligned(runtime: Runtime, path: str, pool: list[Encoded]) -> RefusalRows:
    settings, harm = ModelSettings(path=path), sample(pool, 0)
    with frozen(runtime, load_model(runtime, find_source(settings, runtime), settings)) as model:
        logits = aligned_logits(runtime, harm.rows, Path(path), "test", 0, model)
    again = aligned_logits(runtime, harm.rows, Path(path), "test", 0)  # what was just written
    assert again is not None
    assert logits is not None
    assert all(torch.equal(again[place], logits[place]) for place in again)
    return RefusalRows(harm.places, harm.rows, again)


def _update(linears: Any) -> Update:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Factors(
            0.05 * torch.randn(module.out_features, 2, generator=generator),
            torch.randn(2, module.in_features, generator=generator),
        )
        for name, module in linears.items()
    }
