"""Run a list of jobs in one launched process, since each launch costs seconds: ``jobs.py FILE``.

FILE is a JSON list of {"name", "kind", ...}: stages take "argv" and write into the folder named by --out; the other
kinds write into "out". Engines are made and ended once per job, as in no single stage.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from oneshot.checkpoint.loading.load import find_source, load_model, load_tokenizer
from oneshot.commandline import parse
from oneshot.data.conversations import read_conversations
from oneshot.data.encoding import encode, pad_batch
from oneshot.distributed.engine import frozen, start_training
from oneshot.distributed.runtime import start
from oneshot.distributed.stage import _leave_together
from oneshot.errors import UserError
from oneshot.measure.generate import generate_answers
from oneshot.patch import dealing, guard
from oneshot.patch.attach import Gradients
from oneshot.patch.linears import select_linears
from oneshot.settings import DataSettings, ModelSettings
from oneshot.training.objective import cross_entropy_sum

# the stages' modules: the package's own names are functions
finetune = importlib.import_module("oneshot.finetune")
repair = importlib.import_module("oneshot.repair")


def stage(job: dict[str, Any]) -> None:
    """A stage's own run(), with the errors that a user makes written down."""
    run = {"finetune": finetune.run, "repair": repair.run}[job["kind"]]
    settings = parse(job["argv"], job["kind"])
    try:
        room = mock.patch.dict(dealing.ROOM, {"cpu": 1} if job.get("passes") else {})
        with room, mock.patch.object(guard, "AT_ONCE", job.get("at_once", guard.AT_ONCE)):
            run(settings)
        assert not job.get("fails"), f"{job['name']} was to fail"
    except UserError as error:
        if not job.get("fails"):
            raise
        if start().is_main:
            Path(str(settings.out), "error.txt").write_text(str(error), encoding="utf-8")


def gradients(job: dict[str, Any]) -> None:
    """dL/dW of every layer from the factors that the hooks capture, as every rank has them."""
    runtime, settings = start(), ModelSettings(path=job["model"], gradient_checkpointing=job["checkpointing"])
    source = find_source(settings, runtime)
    tokenizer = load_tokenizer(source, settings)
    conversations = read_conversations(job["data"], DataSettings())
    batch = {
        k: v.to(runtime.device) for k, v in pad_batch([encode(c, tokenizer, 64) for c in conversations], 0).items()
    }
    labels = batch.pop("labels")
    loaded = load_model(runtime, source, settings)
    captured = Gradients(select_linears(loaded).targets)
    with frozen(runtime, loaded) as model, captured.capturing(model):
        if job["checkpointing"]:
            model.train()
        cross_entropy_sum(model(**batch, use_cache=False).logits, labels).backward()
        captured.keep = batch["attention_mask"].bool()
        found = {}
        for name in captured.layers:
            x, delta = captured.pair(name)
            found[name] = delta.T @ x
    save_file(found, Path(job["out"]).with_suffix(f".{runtime.rank}.safetensors"))


def answers(job: dict[str, Any]) -> None:
    """The model's answers, as every rank has them."""
    runtime, settings = start(), ModelSettings(path=job["model"])
    source = find_source(settings, runtime)
    tokenizer = load_tokenizer(source, settings)
    prompts = [list(c.prompt) for c in read_conversations(job["data"], DataSettings(), need_answer=False)]
    with frozen(runtime, load_model(runtime, source, settings)) as model:
        found = generate_answers(model, tokenizer, prompts, runtime, max_new_tokens=12, batch_size=4)
    Path(job["out"]).with_suffix(f".{runtime.rank}.json").write_text(json.dumps(found), encoding="utf-8")


class Towers(torch.nn.Module):
    """Like a multimodal checkpoint on text alone: one tower takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(sub_configs={"vision_config": None})
        self.text, self.vision = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x)


def unused(job: dict[str, Any]) -> None:
    """Three steps of a model part of which has no gradient."""
    runtime = start()
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(4, 6)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    engine.set_learning_rate(0.1)
    for _ in range(3):
        engine.backward(engine.forward(x).square().mean(), last=True)
        engine.step()
    found = {name: engine.full_weight(parameter).contiguous() for name, parameter in model.named_parameters()}
    engine.close()
    save_file(found, Path(job["out"]).with_suffix(f".{runtime.rank}.safetensors"))


def main() -> None:
    kinds = {"finetune": stage, "repair": stage, "gradients": gradients, "answers": answers, "unused": unused}
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            kinds[job["kind"]](job)
        except BaseException:
            print(f"job {job['name']}", file=sys.stderr)
            traceback.print_exc()
            raise
    if start().world_size > 1:
        _leave_together()  # as the stages do: in Python's own teardown gloo's threads now and then abort


if __name__ == "__main__":
    main()
