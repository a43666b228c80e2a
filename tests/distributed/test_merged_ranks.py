"""A DoRA adapter with saved modules, repaired by two ranks: DDP, ZeRO-3, and with the merged weights in NF4."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import repair_jobs
import torch
from ranks import start_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.distributed
WORDS = [
    "--pool", "toy:pool", "--guard", "toy:guard-plain", "--watch_prompts", "toy:held-plain", "--select", "hardest",
    "--score.probes", "toy:probes", "--score.max_new_tokens", "2", "--repair.method", "rollback", "--repair.rank", "8",
    "--repair.epochs", "2", "--repair.guard_prompts", "2", "--repair.guard_tokens", "2", "--repair.watch", "false",
    "--score.reference", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given") / "dora"
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, use_dora=True, modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"]
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(ALIGNED), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder))
    return folder


def patched(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "patch" / "adapter_model.safetensors")
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {n: tensors[f"{n}.lora_B.weight"].float() @ tensors[f"{n}.lora_A.weight"].float() for n in names}


@pytest.fixture(scope="module")
def alone(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    words = ["--model.path", str(adapter), "--out", str(folder / "run"), *WORDS]
    arguments = {"argv": words, "attack": 0.0, "writing": str(folder / "writing")}
    start_ranks(repair_jobs.repair, 1, "ddp", folder / "ranks", arguments).results()
    return folder / "run"


@pytest.mark.parametrize(("sharding", "more"), [("ddp", []), ("zero3", []), ("zero3", ["--model.quantize", "nf4"])])
def test_two_ranks_merge_and_repair_what_one_process_does(
    sharding: str, more: list[str], adapter: Path, alone: Path, tmp_path: Path
) -> None:
    words = ["--model.path", str(adapter), "--out", str(tmp_path / "run"), *WORDS, *more]
    arguments = {"argv": words, "attack": 0.0, "writing": str(tmp_path / "writing")}
    start_ranks(repair_jobs.repair, 2, sharding, tmp_path / "ranks", arguments).results()
    ours, theirs = (load_file(run / "merged" / "model.safetensors") for run in (tmp_path / "run", alone))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["world_size"], report["repair"]["method"]) == (2, "rollback")
    found, wanted = patched(tmp_path / "run"), patched(alone)
    assert found.keys() == wanted.keys()
    if not more:
        for name, want in wanted.items():
            assert (found[name] - want).norm() <= 1e-3 * want.norm(), name
