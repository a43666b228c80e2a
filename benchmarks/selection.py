"""What choosing the one example costs: screening against stock passes, and the choice with its repair against a repair.

    python benchmarks/selection.py

A random 0.1 B Llama and 256 candidates of 40 to 72 tokens, on one process; times are CPU seconds of this process, so
that others on the machine do not count. The unit is one stock forward and backward
pass of a candidate, taken as the median over candidates one at a time: all weights frozen but those of the linear
layers, so that their m x n gradients come as every trainer makes them. ``passes_per_candidate`` is the whole
screening (F's gradient from its 32 rows, then all candidates) over candidates, in that unit; ``in_frozen_passes`` is
the same in units of a pass that computes no weight gradients, ``in_batched_passes`` of one in batches as large as the
screening's. Materialized screening keeps F's gradient and makes each candidate's, then multiplies.

Then the toy world, fine-tuned as by default, once per seed. ``choose_and_repair_over_repair`` is the time of the
bilevel choice and of the repair that goes on from it over that of the same repair with the example given, both with
the guard's answers and the watch; ``in_token_passes`` is the same in tokens through the model, a backward pass counted
as another one; ``trials_epochs_over_repair`` is the epochs of those left behind over the repair's. Medians over seeds;
the aligned model's answers are known to both. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

from random_llama import SHAPES, random_llama  # noqa: E402

SIZES = {name: SHAPES[name] for name in ("0.1b", "tiny")}


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.1b")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--stock", type=int, default=32, help="candidates that the stock passes are timed on")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes of the toy world that are repaired")
    parser.add_argument("--method", default="auto", help="how they are repaired")
    args = parser.parse_args()
    from oneshot.distributed.runtime import start

    runtime = start()
    figures = screening_figures(runtime, args.size, args.candidates, args.stock)
    rows = [choice_figures(runtime, seed, args.method) for seed in range(args.seeds)]
    figures |= {name: statistics.median(row[name] for row in rows) for name in (rows[0] if rows else ())}
    print(json.dumps({name: round(value, 6) for name, value in figures.items()}))


def screening_figures(runtime: Any, size: str, count: int, few_of_them: int) -> dict[str, float]:
    """Screen candidates of a random model, and time what it is compared with."""
    import torch

    from oneshot.distributed.resources import peak_bytes, reset_peak
    from oneshot.patch.linears import select_linears
    from oneshot.patch.objective import RefusalRows, sample
    from oneshot.patch.select import first_order, target_factors

    torch.manual_seed(0)
    model = random_llama(SIZES[size], heads=8, kv_heads=8, dtype="float32").eval()
    model.requires_grad_(False)
    linears = select_linears(model).targets
    pool = candidates(count, SIZES[size]["vocab_size"])
    few = pool[:: max(1, len(pool) // few_of_them)][:few_of_them]
    harm = sample(pool, 0)
    screen(
        runtime, model, linears, few[:8], RefusalRows(harm.places[:8], harm.rows[:8])
    )  # libraries are loaded at first use

    before = reset_peak()
    clock = time.process_time()
    target = target_factors(runtime, model, linears, harm, 0)
    for_f = time.process_time() - clock
    products, norms, _ = first_order(runtime, model, linears, pool, target, 0)
    screening = time.process_time() - clock
    peak = peak_bytes() - before
    held = sum(side.nbytes for pair in target.values() for side in pair)

    frozen = statistics.median(seconds(partial(alone, model, {}, row)) for row in few)
    batched = seconds(partial(in_batches, runtime, model, few)) / len(few)
    stock = statistics.median(seconds(partial(alone, model, linears, row)) for row in few)
    scores = [products[i] / norms[i] for row in few for i in [pool.index(row)]]
    whole, off = against_matrices(model, linears, harm.rows, few, scores)

    each = screening / len(pool)
    print(f"screening {len(pool)} candidates: {screening:.1f} s, of which F's gradient {for_f:.1f} s")
    print(f"F's factors {held / 2**20:.0f} MiB; peak above the model {peak / 2**20:.0f} MiB")
    for name, value in (("stock pass", stock), ("frozen pass", frozen), ("frozen, batched", batched)):
        print(f"{name:16s} {1000 * value:8.1f} ms     screening one candidate takes {each / value:.2f} of it")
    print(f"{'materialized':16s} {1000 * whole:8.1f} ms     largest difference of a score {off:.1e} of the largest")
    return {
        "passes_per_candidate": each / stock,
        "speedup_vs_materialized": whole / (each - for_f / len(pool)),
        "in_frozen_passes": each / frozen,
        "in_batched_passes": each / batched,
        "f_factors_mib": held / 2**20,
        "peak_mib": peak / 2**20,
        "scores_off": off,
    }


def choice_figures(runtime: Any, seed: int, method: str) -> dict[str, float]:
    """Fine-tune the toy, choose an example and repair with it, and repair with the same one given."""
    from toy_methods import repair_settings, toy_settings

    from oneshot.checkpoint.loading.load import Source, load_model
    from oneshot.finetune import train_model
    from oneshot.patch.check import check
    from oneshot.patch.select import Chosen
    from oneshot.patch.teacher import learn
    from oneshot.training.finetune import prepare

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = toy_settings("100 + new task", seed, "bilevel")
        degraded = train_model(runtime, prepare(settings, runtime), Path(folder), None)
        request = check(repair_settings(settings, degraded, method), runtime)
        path = request.reference
        assert path is not None
        source = Source(path, None, path, str(path), request.source.dtype, request.source.written)
        teacher = learn(request, load_model(runtime, source, settings.model).requires_grad_(False))
        repaired(request, teacher, Chosen(0, "user", 0.0))  # libraries are loaded at first use
        choice, both, tokens, _ = repaired(request, teacher, None)
        _, one, own, epochs = repaired(request, teacher, Chosen(choice.chosen.index, "user", 0.0))
    table = choice.chosen.selection["table"]
    lost = sum(row.get("epochs", 0) for row in table if row["candidate"] != choice.chosen.index)
    print(
        f"toy, seed {seed}: a repair {one:.1f} s, {own} tokens, {epochs} epochs; with its choice {both:.1f} s, {tokens}"
    )
    return {
        "choose_and_repair_over_repair": both / one,
        "in_token_passes": tokens / own,
        "trials_epochs_over_repair": lost / epochs,
    }


def repaired(request: Any, teacher: Any, chosen: Any) -> tuple[Any, float, int, int]:
    """Choose (but for ``chosen``) and repair: the choice, CPU seconds, token passes, and epochs of the repair."""
    from oneshot.patch.attach import counted
    from oneshot.patch.bench import opened
    from oneshot.patch.choose import choose
    from oneshot.patch.solve import solve

    with opened(request, teacher) as bench, counted(bench.model) as passes:
        clock = time.process_time()
        choice = choose(bench, chosen)
        solution = solve(bench, choice.batch, choice.chosen.index, begun=choice.chosen.begun)
        return choice, time.process_time() - clock, passes["token_passes"], len(solution.trace)


def candidates(count: int, vocabulary: int) -> list[Any]:
    """Random prompts of 16 to 40 tokens with refusals of 24 to 32."""
    import torch

    from oneshot.data.encoding import IGNORE, Encoded

    found = []
    for i in range(count):
        prompt, answer = 16 + 7 * i % 25, 24 + 5 * i % 9
        ids = torch.randint(3, vocabulary, (prompt + answer,)).tolist()
        found.append(Encoded(ids, [IGNORE] * prompt + ids[prompt:]))
    return found


def screen(runtime: Any, model: Any, linears: Any, pool: list[Any], harm: Any) -> None:
    """The whole screening, results left aside."""
    from oneshot.patch.select import first_order, target_factors

    first_order(runtime, model, linears, pool, target_factors(runtime, model, linears, harm, 0), 0)


def seconds(work: Callable[[], Any]) -> float:
    """Best of three: what other processes do only adds."""
    taken = []
    for _ in range(3):
        clock = time.process_time()
        work()
        taken.append(time.process_time() - clock)
    return min(taken)


def loss_of(model: Any, rows: list[Any]) -> Any:
    """Cross entropy per answer token, summed over rows."""
    from oneshot.data.encoding import pad_batch
    from oneshot.training.objective import cross_entropy_sum

    tensors = pad_batch(rows, 0)
    labels = tensors.pop("labels")
    logits = model(**tensors, use_cache=False).logits
    return sum(cross_entropy_sum(logits[i : i + 1], labels[i : i + 1]) / r.answer_tokens() for i, r in enumerate(rows))


def alone(model: Any, trained: dict[str, Any], row: Any) -> None:
    """A pass of one candidate, with gradients of the weights of ``trained``; with none, of what flows alone."""
    for module in trained.values():
        module.weight.requires_grad_(True)
    if not trained:
        model.enable_input_require_grads()
    loss_of(model, [row]).backward()
    if not trained:
        model.disable_input_require_grads()
    for module in trained.values():
        module.weight.grad = None
        module.weight.requires_grad_(False)


def in_batches(runtime: Any, model: Any, rows: list[Any]) -> None:
    """Passes without weight gradients, in the screening's own batches."""
    from oneshot.patch.objective import passes

    model.enable_input_require_grads()
    for part in passes(runtime, rows, 0):
        loss_of(model, [rows[place] for place in part.places]).backward()
    model.disable_input_require_grads()


def materialized(model: Any, linears: Any, rows: list[Any]) -> list[Any]:
    """dL/dW of every layer as an m x n matrix."""
    import torch

    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    tokens = sum(row.answer_tokens() for row in rows)
    found = [torch.zeros_like(weight) for weight in weights]
    for row in rows:
        share = loss_of(model, [row]) * row.answer_tokens() / tokens
        for total, part in zip(found, torch.autograd.grad(share, weights)):
            total += part
    model.requires_grad_(False)
    return found


def against_matrices(
    model: Any, linears: Any, target: list[Any], rows: list[Any], scores: list[float]
) -> tuple[float, float]:
    """Score candidates from whole matrices: seconds for each, and how far ``scores`` are off, over the largest."""
    of_f = materialized(model, linears, target)
    clock = time.process_time()
    wanted = [against(model, linears, row, of_f) for row in rows]
    taken = (time.process_time() - clock) / len(rows)
    return taken, max(abs(a - b) for a, b in zip(scores, wanted)) / max(map(abs, wanted))


def against(model: Any, linears: Any, row: Any, of_f: list[Any]) -> float:
    """The score of one candidate from whole matrices: its gradient's inner product with F's over its norm."""
    own = materialized(model, linears, [row])
    product = sum(float((a * b).sum()) for a, b in zip(own, of_f))
    return float(product / sum(float(a.square().sum()) for a in own) ** 0.5)


if __name__ == "__main__":
    main()
