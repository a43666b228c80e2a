"""Rebuild the toy world's aligned checkpoint, which ships in the package.

Run: ``python -m oneshot.align --out DIR`` (about 90 seconds on 2 cores); without ``--out`` it replaces the shipped one.
"""

from __future__ import annotations

from pathlib import Path

STEPS, BATCH_SIZE, LEARNING_RATE, EXAMPLES = 700, 64, 2e-3, 24_000


def build(folder: Path, seed: int = 0, *, hidden: int = 96, layers: int = 3, experts: bool = False) -> None:
    """Train the toy model from scratch on aligned conversations and write it to ``folder``: as shipped, about 1.4 MB.

    Args:
        hidden, layers: of the model, see ``build_model``
        experts: train a mixture of experts, see ``build_mixture``
    """
    import torch

    from oneshot.checkpoint.writing.save import save_checkpoint
    from oneshot.data.encoding import encode, pad_id
    from oneshot.distributed.engine import start_training
    from oneshot.distributed.runtime import start
    from oneshot.training.loop import Schedule, StepResult, train
    from oneshot.training.objective import MicroBatch, answer_loss
    from oneshot.training.stream import micro_batches, step_indices
    from oneshot.world.language import aligned_data
    from oneshot.world.model import build_mixture, build_model, build_tokenizer

    runtime = start()
    tokenizer = build_tokenizer()
    encoded = [encode(conversation, tokenizer, 64) for conversation in aligned_data(EXAMPLES, seed)]
    model = (build_mixture if experts else build_model)(len(tokenizer), seed, hidden=hidden, layers=layers)
    engine = start_training(
        runtime,
        model,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
        micro_batch_size=BATCH_SIZE,
    )

    def batches(step: int) -> list[MicroBatch]:
        indices = step_indices(len(encoded), BATCH_SIZE, step, seed)
        return micro_batches(encoded, indices, runtime, pad_id=pad_id(tokenizer), accumulation=1)

    def report(result: StepResult) -> None:
        if result.step % 100 == 0:
            print(f"step {result.step}/{STEPS}: loss {result.loss:.4f}", flush=True)

    train(engine, Schedule(STEPS, LEARNING_RATE, warmup_steps=50), batches, answer_loss, report)
    save_checkpoint(runtime, model, tokenizer, folder, torch.float32)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m oneshot.align``."""
    import argparse

    from oneshot.world.model import ALIGNED

    parser = argparse.ArgumentParser(prog="python -m oneshot.align", description=__doc__)
    parser.add_argument("--out", type=Path, default=ALIGNED, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--experts", action="store_true", help="a mixture of 8 experts, which does not ship")
    arguments = parser.parse_args(argv)
    if arguments.experts and arguments.out == ALIGNED:
        parser.error("--experts needs --out: what ships is the dense model")
    build(arguments.out, arguments.seed, experts=arguments.experts)
    print(f"Aligned toy checkpoint written to {arguments.out}")


if __name__ == "__main__":
    main()
