"""A repair step where the vocabulary is large: the output head on the places that count, against all logits.

    python benchmarks/large_vocabulary.py

The shape of Qwen2.5-0.5B with random weights and a vocabulary of 150,000, in fp32, one process of one thread; CPU
seconds. The example and 32 guard prompts of 50 to 60 tokens begin with the same 24 (a template's head and a system
prompt); of their answers 16 tokens are held. Steps of rollback along random directions. ``all`` computes every logit of
separate rows, takes those that count and differentiates through torch's own losses; ``needed`` is what the package
does; ``needed, separate rows`` is that without shared prefixes. Losses of the first step are compared. The last line of
output is one JSON object. Run by ``repair_step.py``, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

from random_llama import random_directions, random_llama  # noqa: E402

VARIANTS = ("all", "needed", "needed, separate rows")
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 150_000}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 30_000}
SIZES = {"0.5b": QWEN, "tiny": TINY}
GUARD, HEAD, HELD, RANK = 32, 24, 16, 20


def main() -> None:
    """Measure every variant in a process of its own, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        args.out.write_text(json.dumps(work(args.variant, args.size, args.steps)))
        return
    found = measure(args.size, args.steps)
    print(json.dumps(found))


def measure(size: str, steps: int) -> dict[str, Any]:
    """Run the variants one after the other, print a table, and return the figures."""
    figures: dict[str, dict[str, Any]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            out = Path(folder) / "found.json"
            command = [sys.executable, str(Path(__file__).resolve()), f"--size={size}", f"--steps={steps}"]
            command += [f"--variant={variant}", f"--out={out}"]
            subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
            figures[variant] = json.loads(out.read_text())
    print(f"A step of rollback with {GUARD} guard prompts, {SIZES[size]['vocab_size']:,} words, fp32, 1 thread")
    for name, row in figures.items():
        memory = f"{row['peak_bytes'] / 2**30:6.2f} GiB, {row['above_bytes'] / 2**30:6.2f} above the model"
        print(f"{name:24s} {row['seconds']:8.2f} s/step {memory}, first loss {row['losses'][0]:.6f}")
    every, needed = figures["all"], figures["needed"]
    return {
        "large_vocabulary_speedup": round(every["seconds"] / needed["seconds"], 3),
        "large_vocabulary_memory_ratio": round(every["peak_bytes"] / needed["peak_bytes"], 3),
        "large_vocabulary_loss_off": abs(every["losses"][0] / needed["losses"][0] - 1),
        "large_vocabulary": figures,
    }


def work(variant: str, size: str, steps: int) -> dict[str, Any]:
    """Be one variant: seconds of the steps after the first, peak resident memory, losses."""
    import torch

    from oneshot.distributed.resources import give_back_freed_memory, parameters_of, peak_bytes, reset_peak
    from oneshot.distributed.runtime import start
    from oneshot.patch.linears import select_linears
    from oneshot.patch.method import finished
    from oneshot.patch.methods import rollback
    from oneshot.patch.path import Attempt
    from oneshot.patch.recipe import recipe_for
    from oneshot.patch.trace import Tracer
    from oneshot.settings import RepairSettings

    torch.set_num_threads(1)
    runtime = start()
    heads = SIZES[size]["hidden_size"] // 64
    model = random_llama(SIZES[size], heads=heads, kv_heads=heads // 7 or 1, dtype="float32", tie_word_embeddings=True)
    model.requires_grad_(False)
    linears = select_linears(model).targets
    torch.manual_seed(0)
    directions = random_directions(linears, RANK)
    give_back_freed_memory(runtime, parameters_of(model))  # as an engine does
    before = reset_peak()
    batch = batch_of(runtime, model, shared=variant == "needed", whole=variant == "all")
    if variant == "all":
        vars(rollback)["repair_loss"] = all_logits
    clock: list[float] = []
    losses: list[float] = []

    def tick(record: dict[str, Any]) -> None:
        clock.append(time.process_time())
        losses.append(record["loss"] + record["guard_kl"])

    options = RepairSettings(method="rollback", epochs=steps, learning_rate=0.1, noise=0.0, undo=0.0)
    attempt, recipe = Attempt(Tracer(tick), 1.0), recipe_for(options, has_update=True)
    finished(rollback.learn(runtime, model, directions, batch, attempt, recipe))
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    peak = peak_bytes()
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": peak,
        "above_bytes": peak - before,
        "losses": losses,
        "places": len(batch.real),
    }


def batch_of(runtime: Any, model: Any, *, shared: bool, whole: bool) -> Any:
    """The example and the guard, with the model's own logits as reference; off by a little, so that the KL is not 0."""
    import torch

    from oneshot.data.encoding import IGNORE, Encoded
    from oneshot.patch.dealing import passes_of
    from oneshot.patch.guard import laid
    from oneshot.patch.rows import sharing_of
    from oneshot.training.objective import logits_at

    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        found: list[int] = torch.randint(7, model.config.vocab_size, (count,), generator=draw).tolist()
        return found

    head = tokens(HEAD)
    rows = [head + tokens(10 + i % 11 + HELD) for i in range(GUARD + 1)]
    prompt = len(rows[0]) - HELD
    example = Encoded(rows[0], [IGNORE] * prompt + rows[0][prompt:])
    guard = [(Encoded(ids, [IGNORE] * len(ids)), len(ids) - HELD) for ids in rows[1:]]
    sharing = sharing_of(runtime, model, [[ids] for ids in rows[1:]], 0) if shared else None
    assert bool(sharing) == shared, "this model takes shared rows"
    batch = laid(example, guard, sharing, 0, runtime.device)
    with torch.no_grad():
        reference = logits_at(model, batch.inputs, batch.kept[len(batch.targets) :])
    reference[:, ::2] *= 1.1
    batch = dataclasses.replace(batch, reference=reference, held_total=HELD * GUARD)
    count = 1 if whole else passes_of(runtime, model, len(batch.real), GUARD)
    return dataclasses.replace(batch, count=count)


def all_logits(model: Any, batch: Any, weight: float, world_size: int, _temperature: float = 1.0) -> Any:
    """``repair_loss`` as it is written down: every logit, and the losses of torch on those that count."""
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)
    refusal, held = batch.kept[: len(batch.targets)], batch.kept[len(batch.targets) :]
    example = cross_entropy(logits[refusal].float(), batch.targets)
    ours, theirs = log_softmax(logits[held].float(), dim=-1), log_softmax(batch.reference.float(), dim=-1)
    kl = kl_div(ours, theirs, reduction="sum", log_target=True) / batch.held_total
    return example / world_size + weight * kl, example.detach(), kl.detach()


if __name__ == "__main__":
    main()
