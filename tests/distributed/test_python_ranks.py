"""The Python face in processes that torchrun started, and that have met in an Accelerator of their own before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.distributed
SCRIPT = """
import json, sys
from pathlib import Path
from accelerate import Accelerator

own = Accelerator(cpu=True)
import oneshot

out = Path(sys.argv[1])
options = {
    "pool": "toy:pool", "guard": "toy:guard-plain", "watch_prompts": "toy:held-plain", "select": "hardest",
    "score": {"probes": "toy:probes", "max_new_tokens": 2}, "reference": "toy:aligned", "model": out / "model",
    "repair": {"method": "lowrank", "epochs": 2, "guard_prompts": 3, "guard_tokens": 2, "watch": False},
}
first = oneshot.repair(out=str(out / "first"), **options)
second = oneshot.repair(out=str(out / "second"), **options)
wrong = ""
try:
    oneshot.repair(out=str(out / "first"), **options)
except oneshot.UserError as error:
    wrong = str(error)
found = {
    "ranks": own.num_processes, "report": first.report, "same": first.trace == second.trace, "wrong": wrong,
    "asr": first.scores["repaired"].rates["asr"].value,
}
(out / f"{own.process_index}.json").write_text(json.dumps(found))
own.wait_for_everyone()
"""


def test_calls_in_every_rank_of_a_run_are_one_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    shutil.copytree(ALIGNED, tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(ALIGNED / "model.safetensors")
    for tensor in tensors.values():  # so that it refuses little
        tensor += 1.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "mine.py", str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert one["ranks"] == one["report"]["world_size"] == 2
    assert one["same"]
    assert "already holds a run" in one["wrong"]
    assert (tmp_path / "first" / "patch" / "adapter_model.safetensors").is_file()
