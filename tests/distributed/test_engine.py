"""The DeepSpeed files as shipped: whatever they leave open is settled by the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import ROOT

from oneshot.distributed.deepspeed_config import deepspeed_config
from oneshot.distributed.runtime import Runtime

pytestmark = pytest.mark.distributed
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def open_values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [found for item in value.values() for found in open_values(item)]
    return ["auto"] if value == "auto" else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_left_open(path: Path, dtype: torch.dtype) -> None:
    shipped = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(shipped)
    accelerator: Any = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=shipped))
    stage = shipped["zero_optimization"]["stage"]
    runtime = Runtime(0, 2, torch.device("cpu"), "zero3" if stage == 3 else "zero2", accelerator)
    config = deepspeed_config(
        runtime, dtype=dtype, gradient_accumulation_steps=3, micro_batch_size=4, max_grad_norm=0.5
    )
    assert open_values(shipped), "the file has an auto to settle"
    assert open_values(config) == []
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is (dtype == torch.bfloat16)
    assert config["fp16"]["enabled"] is (dtype == torch.float16)
    settled = config["zero_optimization"]
    assert {**settled, **shipped["zero_optimization"]} == settled, "the file owns sharding and offload"
    assert json.dumps(shipped) == before, "the next engine settles its own"
