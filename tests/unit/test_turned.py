"""Experts that files hold as the transposes of what the model computes with, as Qwen3-VL-MoE's on the Hub."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_carrier import close, merged, update_of
from tiny import tiny_runtime
from tiny_configs import SPARSE

from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.layout import owners
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.loading.partitioned import own_tensors, why_not
from oneshot.checkpoint.loading.reference import check_reference
from oneshot.checkpoint.loading.segments import open_stored, parts_of, range_reads, read_matrix
from oneshot.checkpoint.merging.merge import merge_update
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.checkpoint.reads.traced import trace_loading
from oneshot.checkpoint.writing.merge_experts import experts_in, experts_through_nf4, quantized_experts
from oneshot.errors import UserError
from oneshot.patch.coverage import coverage
from oneshot.patch.directions import checkpoint_difference
from oneshot.patch.linears import select_linears
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def build(seed: int) -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 14}
    text = {**SPARSE["qwen3_moe"][0], "rope_parameters": rope}
    tokens = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}
    model = Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)
    ).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def turned(folder: Path, out: Path) -> Path:
    """The same checkpoint with the experts' matrices the other way round."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two checkpoints, each as the model holds it and turned."""
    root = tmp_path_factory.mktemp("turned")
    for name, seed in (("tuned", 0), ("aligned", 1)):
        build(seed).save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
        turned(root / name, root / f"{name}, turned")
    return SimpleNamespace(root=root, model=build(0), other=build(1))


def test_every_tensor_and_every_experts_matrix_is_read(folders):
    stored = open_stored(folders.root / "tuned, turned", folders.model)
    assert why_not(folders.model, stored) is None
    for name, tensor in own_tensors(folders.model).items():
        parts = []
        for own in owners(tuple(tensor.shape), 3):
            part = torch.full((own.size,), 7, dtype=tensor.dtype)
            read_all(range_reads(stored, parts_of(stored, name), own, part))
            parts.append(part[: own.numel])
        assert torch.equal(torch.cat(parts).view(tensor.shape), tensor), name
    for matrix in expert_matrices(folders.model).values():
        wanted = folders.model.get_parameter(matrix.parameter)[matrix.index]
        assert torch.equal(read_matrix(stored, matrix.name, matrix), wanted), matrix.name


def test_a_partitioned_parameter_has_the_shape_that_it_has_whole():
    model = build(0)
    name = next(name for name, _ in model.named_parameters() if name.endswith(EXPERTS))
    shapes = {key: tuple(tensor.shape) for key, tensor in own_tensors(model).items()}
    parameter: Any = model.get_parameter(name)
    parameter.ds_shape = shapes[name]
    parameter.data = torch.empty(0)
    assert trace_loading(model, shapes).made[name].segments[0].name == name, "nothing is turned"
    m, n = shapes[name][1:]
    found = trace_loading(model, {**shapes, name: (shapes[name][0], n, m)})
    assert found.made[name].shape == shapes[name]
    assert not found.reasons


@pytest.mark.parametrize("ours", ["tuned", "tuned, turned"])
@pytest.mark.parametrize("theirs", ["aligned", "aligned, turned"])
def test_what_changed_is_read_whichever_way_either_lies(ours, theirs, folders):
    targets = select_linears(folders.model).targets
    difference = checkpoint_difference(folders.root / ours, folders.root / theirs, targets, folders.model)
    energies = {}
    for name, layer in targets.items():
        own = difference(name, True)
        assert own is not None
        if name in expert_matrices(folders.model):
            at = layer.parameter, layer.index
            wanted = folders.model.get_parameter(at[0])[at[1]] - folders.other.get_parameter(at[0])[at[1]]
            assert torch.equal(own, wanted), name
        energies[name] = float(own.double().square().sum())
    only = {name: layer for name, layer in targets.items() if "experts.1." in name or "q_proj" in name}
    kept = {name: energies[name] for name in only}
    said = [
        coverage(tiny_runtime(), folders.root / one, only, folders.root / other, kept).as_facts()
        for one, other in ((ours, theirs), ("tuned", "aligned"))
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda tensor: tensor.fill_(torch.nan), "NaN or infinity"), (lambda tensor: tensor.to(torch.int8), "as I8")],
    ids=["not finite", "quantized"],
)
def test_messages_call_what_lies_the_other_way_as_the_files_do(spoil, said, folders, tmp_path):
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folders.root / "tuned, turned", spoiled)
    tensors = load_file(spoiled / "model.safetensors")
    first, target = next((n, m) for n, m in expert_matrices(folders.model).items() if n.endswith("down_proj"))
    name = next(name for name in tensors if name.endswith(target.parameter.split("layers")[1]))
    tensors[name] = spoil(tensors[name])
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as refused:
        checkpoint_difference(spoiled, folders.root / "aligned", {first: target}, folders.model)(first, True)
    assert said in str(refused.value)
    assert f"{name} " in str(refused.value)


def test_a_reference_that_lies_the_other_way_fits(folders):
    for ours, theirs in (("tuned", "aligned, turned"), ("tuned, turned", "aligned")):
        check_reference(folders.root / ours, folders.root / theirs)


def test_a_reference_of_fewer_experts_is_refused_whichever_way_it_lies(folders, tmp_path):
    shutil.copytree(folders.root / "aligned, turned", tmp_path / "fewer")
    tensors = load_file(tmp_path / "fewer" / "model.safetensors")
    held = {name: tensor[:7].clone() if name.endswith(EXPERTS) else tensor for name, tensor in tensors.items()}
    save_file(held, tmp_path / "fewer" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"of shape \[7, .* give the aligned checkpoint"):
        check_reference(folders.root / "tuned", tmp_path / "fewer")


def test_an_update_is_merged_into_what_lies_the_other_way(folders, tmp_path):
    update = {name: factors for name, factors in update_of(folders.model).items() if ".5." in name or "q_proj" in name}
    merge_update(tiny_runtime(), folders.root / "tuned, turned", update, tmp_path / "merged")
    kind = type(folders.model)
    ours = dict(kind.from_pretrained(tmp_path / "merged", dtype=torch.float32).named_parameters())
    meant = merged(folders.model, update)
    assert all(close(ours[name], value, 1e-6) for name, value in meant.named_parameters())
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(folders.root / "tuned, turned" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in before.items()}


def test_4_bits_are_those_of_the_model(folders):
    def load(name: str) -> Any:
        settings = ModelSettings(path=str(folders.root / name), attention="eager", quantize="nf4")
        return load_model(tiny_runtime(), find_source(settings, tiny_runtime()), settings)

    one, other = (dict(load(name).named_parameters()) for name in ("tuned", "tuned, turned"))
    packed = [name for name in one if name.endswith(EXPERTS)]
    assert packed
    for name in packed:
        assert one[name].dtype == torch.float32
        assert one[name].numel() < math.prod(folders.model.get_parameter(name).shape)
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def test_what_4_bits_leave_is_written_the_way_it_lies(folders):
    plain, other = (experts_in(folders.root / name, folders.model) for name in ("tuned", "tuned, turned"))
    assert quantized_experts(plain) == quantized_experts(other) != {}
    for stored, parameter in quantized_experts(plain).items():
        one, two = (
            experts_through_nf4(each, parameter, torch.device("cpu"), double=True)[stored] for each in (plain, other)
        )
        count, m, n = folders.model.get_parameter(parameter).shape
        assert torch.equal(two.view(count, n, m).transpose(1, 2).reshape(-1), one)
