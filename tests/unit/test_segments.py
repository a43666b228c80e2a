"""A model's tensors as ranges of what a checkpoint stores, whatever names and parts it stores them in."""

import math

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from tiny import targets_of
from tiny_configs import SPARSE, TINY

from oneshot.checkpoint.adapters.experts import ExpertMatrix, expert_matrices
from oneshot.checkpoint.layout import owners
from oneshot.checkpoint.loading.partitioned import own_tensors
from oneshot.checkpoint.loading.reference import check_reference
from oneshot.checkpoint.loading.segments import open_stored, parts_of, range_reads, read_matrix
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.checkpoint.reads.traced import Segment, Traced, trace_loading, trace_saving
from oneshot.errors import UserError
from oneshot.patch.directions import checkpoint_difference

MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "granitemoe", "jamba", "nemotron_h")


def build(kind, device="cpu"):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(TINY.get(kind) or SPARSE[kind][0])))
    for parameter in model.parameters() if device == "cpu" else ():
        parameter.data.normal_()
    return model


@pytest.fixture(scope="module", params=MIXTURES)
def saved(request, tmp_path_factory):
    """A tiny mixture, its checkpoint, and the files' tensors as those of the model on the meta device."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    model.save_pretrained(folder)
    return model, folder, open_stored(folder, build(request.param, "meta"))


def test_every_tensor_is_read_by_ranks_from_its_ranges(saved):
    model, _, stored = saved
    for name, tensor in own_tensors(model).items():
        parts = []
        for own in owners(tuple(tensor.shape), 3):
            part = torch.full((own.size,), 7, dtype=tensor.dtype)
            read_all(range_reads(stored, parts_of(stored, name), own, part))
            assert not part[own.numel :].any(), "padding becomes zero"
            parts.append(part[: own.numel])
        assert torch.equal(torch.cat(parts).view(tensor.shape), tensor), name


def test_one_experts_matrix_is_read_as_it_multiplies(saved):
    model, _, stored = saved
    matrices = expert_matrices(model)
    assert matrices
    for matrix in matrices.values():
        held = model.get_parameter(matrix.parameter)[matrix.index].float()
        assert torch.equal(read_matrix(stored, matrix.name, matrix), held.T if matrix.transposed else held), matrix.name


def test_what_is_stored_is_made_of_ranges_of_the_models_tensors(saved):
    model, folder, _ = saved
    own = {name: tensor.detach().reshape(-1) for name, tensor in own_tensors(model).items()}
    files = load_file(folder / "model.safetensors")
    found = trace_saving(model, {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()})
    assert found.keys() == files.keys()
    for name, tensor in files.items():
        values = torch.cat([own[part.name][part.start : part.stop] for part in found[name].segments])
        assert torch.equal(values.view(found[name].shape), tensor), name


def test_a_damaged_expert_is_found_by_its_checksum(tmp_path):
    from oneshot.checkpoint.reads.manifest import read_pieces, write_manifest

    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    stored = open_stored(tmp_path, model)
    assert read_pieces(tmp_path, stored.tensors) == {}
    tensors = load_file(tmp_path / "model.safetensors")
    pieces = {n: [(0, math.prod(t.shape), xxhash.xxh3_64_hexdigest(t.numpy().tobytes()))] for n, t in tensors.items()}
    write_manifest(tmp_path, [pieces], {})
    matrix = next(iter(expert_matrices(model).values()))
    assert read_matrix(open_stored(tmp_path, model), matrix.name, matrix).isfinite().all()
    entry = stored.tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\x01\x02\x03\x04")
    with pytest.raises(UserError, match=r"experts\.0\.up_proj\.weight does not have the checksum"):
        read_matrix(open_stored(tmp_path, model), matrix.name, matrix)


def test_what_no_ranges_make_has_a_reason(tmp_path):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    model = build("qwen3_moe")
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = open_stored(tmp_path, model)
    assert not before.loading.reasons, "merged experts are ranges as they are"
    turned = WeightConverter("mlp.gate.weight", "mlp.gate.weight", [Transpose(0, 1), Transpose(0, 1)])
    conversion_mapping.register_checkpoint_conversion_mapping("Qwen3MoeForCausalLM", [turned], overwrite=True)
    try:
        after = open_stored(tmp_path, model)
    finally:
        del conversion_mapping._checkpoint_conversion_mapping_cache["Qwen3MoeForCausalLM"]
    name = "model.layers.1.mlp.gate.weight"
    assert "Transpose" in after.loading.reasons[name]
    with pytest.raises(UserError, match="Transpose"):
        parts_of(after, name)
    with pytest.raises(UserError, match="same architecture"):
        parts_of(before, "model.layers.2.mlp.gate.weight")


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama"])
def test_what_changed_is_read_whatever_form_either_checkpoint_has(kind, tmp_path):
    aligned, tuned = build(kind), build(kind)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    aligned.save_pretrained(tmp_path / "aligned")
    (tmp_path / "tuned").mkdir()  # experts merged, as the model holds them
    tensors = {name: tensor.detach().clone() for name, tensor in tuned.state_dict().items()}
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    tuned.config.save_pretrained(tmp_path / "tuned")
    check_reference(tmp_path / "tuned", tmp_path / "aligned")
    check_reference(tmp_path / "aligned", tmp_path / "tuned")
    targets = {**targets_of(tuned), **expert_matrices(tuned)}
    difference = checkpoint_difference(tmp_path / "tuned", tmp_path / "aligned", targets, tuned)
    for name, target in targets.items():
        if not isinstance(target, ExpertMatrix):
            ours, theirs = (model.get_parameter(f"{name}.weight") for model in (tuned, aligned))
        else:
            ours, theirs = (model.get_parameter(target.parameter)[target.index] for model in (tuned, aligned))
            ours, theirs = (ours.T, theirs.T) if target.transposed else (ours, theirs)
        assert torch.equal(difference(name, True), ours - theirs), name
        assert difference(name, False) is None


def test_a_reference_without_an_expert_is_refused_by_name(tmp_path):
    model = build("qwen3_moe")
    for name in ("model", "reference"):
        model.save_pretrained(tmp_path / name)
    tensors = load_file(tmp_path / "reference" / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if ".experts.7." not in name}
    save_file(left, tmp_path / "reference" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"reference lacks model\.layers\.1\.mlp\.experts"):
        check_reference(tmp_path / "model", tmp_path / "reference")
    targets = expert_matrices(model)
    with pytest.raises(UserError, match=r"experts\.gate_up_proj of shape \[7, 48, 64\]"):
        checkpoint_difference(tmp_path / "model", tmp_path / "reference", targets, model)


def test_ranges_of_concatenated_and_split_tensors():
    whole = Traced((2, 3, 4), (Segment("w", 0, 24),))
    first, second = whole.chunk(2, dim=1)
    assert first.segments == (Segment("w", 0, 8), Segment("w", 12, 20))
    assert torch.cat([first, second], dim=1) == whole
    assert torch.stack([whole, whole]).shape == (2, 2, 3, 4)
    assert list(first.take(6, 10)) == [Segment("w", 6, 8), Segment("w", 12, 14)]
    with pytest.raises(NotImplementedError, match="transpose"):
        torch.transpose(whole, 0, 1)


def test_a_plain_model_is_its_own_tensors():
    model = build("llama", "meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    loading = trace_loading(model, shapes)
    assert not loading.conversions
    assert loading.made == trace_saving(model, shapes)
