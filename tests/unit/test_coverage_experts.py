"""What a patch reaches where files hold experts together, or in FP8 or MXFP4: counted off the numbers of three
checkpoints, the fine-tuned one, the aligned one and the one that a patch of the targets was merged into.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_carrier import tiny
from test_scaled import as_fp8, as_mxfp4, shaped
from tiny import tiny_runtime

from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.merging.merge import merge_update
from oneshot.patch.coverage import coverage
from oneshot.patch.derive import Wanted, extracted
from oneshot.patch.directions import checkpoint_difference
from oneshot.patch.linears import select_linears
from oneshot.world.model import build_tokenizer

TWO = r"experts\.(0|1)\."  # as docs/experts.md has it
FORMS = {"fp8": ("deepseek_v3", as_fp8), "mxfp4": ("gpt_oss", as_mxfp4)}


def plainly(model: Any, folder: Path) -> Path:
    """A checkpoint in full precision; what its numbers are stands in its own files."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "plain").symlink_to(folder)
    return folder


def pair(model: Any, folder: Path, ours: Any, theirs: Any) -> tuple[Path, Path]:
    """A fine-tuned checkpoint and an aligned one, all of whose weights differ, each written in its own form."""
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(parameter.std() * torch.randn_like(parameter), alpha=0.3)
    return ours(model, folder / "finetuned"), theirs(other, folder / "aligned")


def said(model: Any, pattern: str | None, finetuned: Path, aligned: Path) -> dict[str, Any]:
    targets = select_linears(model, pattern).targets
    difference = checkpoint_difference(finetuned, aligned, targets, model)
    energies = {name: float(difference(name, True).double().square().sum()) for name in targets}
    return coverage(tiny_runtime(), finetuned, targets, aligned, energies).as_facts()


def counted(model: Any, pattern: str | None, finetuned: Path, aligned: Path, folder: Path) -> tuple[float, float]:
    """Shares of weights, and of the update's squared norm, where a patch of the targets has moved a number."""
    layers = select_linears(model, pattern).targets
    update = {
        name: Factors(1 + torch.rand(layer.out_features, 1), 1 + torch.rand(1, layer.in_features))
        for name, layer in layers.items()
    }
    merge_update(tiny_runtime(), finetuned / "plain", update, folder / "repaired")
    places = (finetuned / "plain", aligned / "plain", folder / "repaired")
    ours, theirs, repaired = (load_file(place / "model.safetensors") for place in places)
    moved = torch.cat([(repaired[name] != ours[name]).flatten() for name in ours])
    energy = torch.cat([(ours[name].double() - theirs[name].double()).square().flatten() for name in ours])
    return float(moved.double().mean()), float(energy[moved].sum() / energy.sum())


def agrees(facts: dict[str, Any], shares: tuple[float, float]) -> None:
    assert facts["parameters"]["reached"] == pytest.approx(shares[0], rel=1e-6)
    assert facts["energy"]["reached"] == pytest.approx(shares[1], rel=1e-4)
    assert "not_compared" not in facts


@pytest.mark.parametrize("pattern", [None, TWO])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_of_experts_held_together_those_count_that_a_patch_changes(name: str, pattern: str, tmp_path: Path) -> None:
    model = tiny(name)
    finetuned, aligned = pair(model, tmp_path, plainly, plainly)
    facts = said(model, pattern, finetuned, aligned)
    agrees(facts, counted(model, pattern, finetuned, aligned, tmp_path))
    assert 0.01 < facts["energy"]["kinds"]["experts"]["reached"] <= 1


@pytest.mark.parametrize("pattern", [None, "self_attn", TWO])
@pytest.mark.parametrize("ours", ["same form", "plain"])
@pytest.mark.parametrize("form", FORMS)
def test_scaled_weights_count_as_what_they_stand_for(form: str, ours: str, pattern: str, tmp_path: Path) -> None:
    kind, write = FORMS[form]
    model = shaped(kind)
    finetuned, aligned = pair(model, tmp_path, write if ours == "same form" else plainly, write)
    facts = said(model, pattern, finetuned, aligned)
    agrees(facts, counted(model, pattern, finetuned, aligned, tmp_path))


def test_the_same_weights_are_of_one_kind_whatever_files_call_them(tmp_path: Path) -> None:
    model = tiny("granitemoe")
    finetuned, aligned = pair(model, tmp_path, plainly, plainly)
    tensors = load_file(finetuned / "model.safetensors")
    experts = sum(t.numel() for name, t in tensors.items() if "input_linear" in name or "output_linear" in name)
    share = experts / sum(t.numel() for t in tensors.values())
    for pattern in (None, TWO, "self_attn"):
        facts = said(model, pattern, finetuned, aligned)
        assert set(facts["parameters"]["kinds"]) == set(facts["energy"]["kinds"])
        assert facts["parameters"]["kinds"]["experts"]["of_all"] == pytest.approx(share)


def test_what_cannot_be_compared_is_counted_as_such(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    finetuned, aligned = pair(model, tmp_path, plainly, plainly)
    tensors = load_file(aligned / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    assert said(model, "self_attn", finetuned, aligned)["not_compared"] == 2


def test_packed_weights_count_as_many_as_they_are(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    folder = plainly(model, tmp_path / "packed")
    targets = select_linears(model).targets
    before = coverage(tiny_runtime(), folder, targets, None, {}).as_facts()
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "self_attn" in name and name.endswith("proj.weight")]:
        count = tensors[name].numel()
        tensors[name] = torch.zeros(count // 2, 1, dtype=torch.uint8)  # as bitsandbytes writes it
        tensors[f"{name}.absmax"] = torch.zeros(count // 64)
        tensors[f"{name}.quant_map"] = torch.zeros(16)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert coverage(tiny_runtime(), folder, targets, None, {}).as_facts() == before


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_what_an_extracted_patch_leaves_is_of_the_numbers_too(form: str, tmp_path: Path) -> None:
    kind, write = FORMS.get(form, ("gpt_oss", plainly))
    model = shaped(kind)
    changed, base = pair(model, tmp_path, write, write)
    targets = select_linears(model, r"self_attn|experts\.1\.").targets
    linears = {name: layer for name, layer in targets.items() if "experts." not in name}
    wanted = Wanted(targets, 4, 1, copy.deepcopy(model).to("meta"))
    _, _, others = extracted(tiny_runtime(), changed, base, wanted, torch.float32)
    assert not any(name.endswith(("_inv", "_blocks", "_scales")) for name in others)

    ours, theirs = (load_file(folder / "plain" / "model.safetensors") for folder in (changed, base))
    left = 0.0
    for name in ours:
        square = (ours[name].double() - theirs[name].double()).square()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # all in one, of which the patch holds one
            left += float(square.sum() - square[1].sum())
        elif name.removesuffix(".weight") not in linears and ".experts.1." not in name:
            left += float(square.sum())
    assert sum(part.energy for part in others.values()) == pytest.approx(left, rel=1e-4)
