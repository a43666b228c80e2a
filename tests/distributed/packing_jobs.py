"""What ranks do in the packing tests: whole fine-tunes, several in one start."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import transformers

from oneshot.commandline import parse
from oneshot.distributed.runtime import Runtime, barrier
from oneshot.training.finetune import prepare

# the stages' modules: the package's own names are functions
finetune = importlib.import_module("oneshot.finetune")

for _family in ("Llama", "Qwen2", "Gemma3"):  # imported when they are first asked for, here before the fork
    getattr(transformers, f"{_family}ForCausalLM")


def finetunes(runtime: Runtime, runs: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Run each fine-tune (folder -> command line) and return the events of its steps; rank 0 alone writes them."""
    events = {}
    for folder, argv in runs.items():
        settings = parse(argv, "finetune")
        prepared = prepare(settings, runtime)
        Path(folder).mkdir(parents=True, exist_ok=True)
        barrier(runtime)
        finetune.train_model(runtime, prepared, Path(folder), None)
        barrier(runtime)
        lines = Path(folder, "events.jsonl").read_text(encoding="utf-8").splitlines()
        events[folder] = [json.loads(line) for line in lines]
    return events
