"""A stage that fails in the way named by the environment's FAILURE, on the rank named by FAILING_RANK, or ends well."""

import os
import sys
from pathlib import Path

from oneshot.commandline import run_stage
from oneshot.distributed.engine import start_training
from oneshot.distributed.runtime import all_reduce_sum, start
from oneshot.errors import UserError
from oneshot.settings import Settings


def run(settings: Settings) -> None:
    import torch

    how, culprit = os.environ["FAILURE"], int(os.environ.get("FAILING_RANK", "0"))
    runtime = start(timeout_minutes=5)
    print(f"rank {runtime.rank} of {runtime.world_size} is here")
    mine = runtime.rank == culprit
    model = torch.nn.Linear(8, 8)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    if how == "user-all":
        raise UserError("The file is missing: give another.")
    if how == "user-one" and mine:
        raise UserError("The file is broken here: mend it.")
    if how == "exception-one" and mine:
        raise RuntimeError("the disk\nis full")
    if how == "killed" and mine:
        os._exit(77)
    for _ in range(3):
        loss = engine.forward(torch.ones(2, 8)).sum()
        engine.backward(loss, last=True)
        if how == "in-step" and mine:
            raise RuntimeError("out of luck")
        engine.step()
    total = all_reduce_sum(runtime, torch.ones(1))
    Path(os.environ["DONE"] + str(runtime.rank)).write_text(str(total.item()))


if __name__ == "__main__":
    run_stage(sys.argv[1:], "repair", run)
