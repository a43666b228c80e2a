"""vLLM reads the factors of experts that oneshot writes as what they are, each in the form that its class takes."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_vllm import build, random_update

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.adapters.carrier import in_form
from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.adapters.injected import write_loadable
from oneshot.checkpoint.adapters.update import Factors, Update
from oneshot.patch.linears import select_linears

HERE = Path(__file__).resolve().parent
MODELS = "vllm.model_executor.models"
# name -> the class in vLLM, what it calls an expert's matrices, the form that it takes
SERVED: dict[str, tuple[str, list[str], str]] = {
    "Qwen3Moe": (f"{MODELS}.qwen3_moe:Qwen3MoeForCausalLM", ["gate_proj", "down_proj", "up_proj"], "2d"),
    "Mixtral": (f"{MODELS}.mixtral:MixtralForCausalLM", ["w1", "w2", "w3"], "2d"),
    "GptOss": (f"{MODELS}.gpt_oss:GptOssForCausalLM", ["gate_proj", "down_proj", "up_proj"], "3d"),
}
EXPERTS, RANK, EXPERT_RANK = 4, 16, 2


def update_of(model: Any) -> Update:
    generator = torch.Generator().manual_seed(3)
    experts = {
        name: Factors(
            0.2 * torch.randn(one.out_features, EXPERT_RANK, generator=generator),
            0.2 * torch.randn(EXPERT_RANK, one.in_features, generator=generator),
        )
        for name, one in expert_matrices(model).items()
    }
    return {**random_update(model, RANK), **experts}


def read_by_vllm(vllm: str, patch: Path, name: str, out: Path) -> subprocess.CompletedProcess[str]:
    place, names, _ = SERVED[name]
    python = Path(vllm).resolve().parent / "python"
    command = [str(python), str(HERE / "vllm_reads.py"), str(patch), place, str(EXPERTS), str(out), *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", SERVED)
def test_vllm_reads_the_factors_of_every_expert(name: str, vllm: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "base")
    update = update_of(model)
    meta = copy.deepcopy(model).to("meta")
    write_loadable(tmp_path / "patch", update, select_linears(model).every, "base", torch.float32, meta)
    adapter = read_adapter(tmp_path / "patch")
    assert adapter.experts is not None
    assert adapter.experts.form == SERVED[name][2]
    done = read_by_vllm(vllm, tmp_path / "patch", name, tmp_path / "read.safetensors")
    assert done.returncode == 0, done.stdout + done.stderr
    read = load_file(tmp_path / "read.safetensors")
    meant = {name: factors.b @ factors.a for name, factors in update.items()}
    query = "model.layers.0.self_attn.q_proj"
    assert torch.allclose(read.pop(query), meant[query], atol=1e-6)
    for key in expert_matrices(model):
        own = key if key in read else key.replace(".mlp.", ".block_sparse_moe.")
        assert torch.allclose(read.pop(own), meant[key], atol=1e-6), key
    assert not read


def test_vllm_refuses_the_form_that_its_class_does_not_take(vllm: str, tmp_path: Path) -> None:
    """So that the default form matters: single experts are no names to a class that holds them together."""
    model = build("Qwen3Moe", tmp_path / "base")
    meta = copy.deepcopy(model).to("meta")
    held = in_form(update_of(model), meta, "2d")
    write_loadable(tmp_path / "patch", held, select_linears(model).every, "base", torch.float32, meta)
    done = read_by_vllm(vllm, tmp_path / "patch", "GptOss", tmp_path / "read.safetensors")
    assert done.returncode != 0
    assert "expected target modules" in done.stderr
