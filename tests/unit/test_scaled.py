"""FP8 with block scales and MXFP4: the numbers that transformers makes of them, whole, by rank and as a Delta."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_segments import build
from tiny import tiny_runtime

from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.layout import owners
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.loading.partitioned import own_tensors
from oneshot.checkpoint.loading.segments import open_stored, parts_of, range_reads, read_matrix
from oneshot.checkpoint.quantized import scaled
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.patch.check import check
from oneshot.patch.directions import checkpoint_difference
from oneshot.patch.linears import select_linears
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

BLOCK = 16
LUT = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp8(weight):
    """A matrix in FP8, its scales, and what they stand for; blocks at the edges are cut."""
    m, n = weight.shape
    padded = torch.zeros(-(-m // BLOCK) * BLOCK, -(-n // BLOCK) * BLOCK)
    padded[:m, :n] = weight
    blocks = padded.view(-(-m // BLOCK), BLOCK, -(-n // BLOCK), BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = (packed.float() * scales[:, None, :, None]).reshape(padded.shape)[:m, :n]
    return packed.reshape(padded.shape)[:m, :n].contiguous(), scales, whole


def as_fp8(model, folder):
    """Write a model whose matrices of blocks are in FP8, make it what they stand for, and return it."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in list(tensors.items()):
        if "layers" in name and tensor.dim() == 2:
            tensors[name], tensors[f"{name}_scale_inv"], plain[name] = fp8(tensor.float())
        else:
            plain[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    (folder / "plain").mkdir()
    model.config.save_pretrained(folder / "plain")
    save_file({n: t.contiguous() for n, t in plain.items()}, folder / "plain/model.safetensors", {"format": "pt"})
    return folder


def as_mxfp4(model, folder):
    """The same of gpt-oss, whose experts are in MXFP4."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name, tensor in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values = torch.stack([LUT[(blocks & 15).long()], LUT[(blocks >> 4).long()]], -1).flatten(-2)
            whole = values * 2.0 ** (scales[..., None].float() - 127)
            plain[name] = whole.flatten(-2).transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said(folder, {"quant_method": "mxfp4"})
    (folder / "plain").mkdir()
    model.config.save_pretrained(folder / "plain")
    save_file(plain, folder / "plain/model.safetensors", metadata={"format": "pt"})
    return folder


def said(folder, fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))


KINDS = {"deepseek_v3": as_fp8, "llama": as_fp8, "gpt_oss": as_mxfp4}


def shaped(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind != "gpt_oss":
        return build(kind)
    fields = build(kind, "meta").config.to_dict() | {"intermediate_size": 96}
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "model_type"})
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A model, its checkpoint with scales, and beside that the same numbers in fp32."""
    model = shaped(request.param)
    return model, KINDS[request.param](model, tmp_path_factory.mktemp(request.param))


def load(folder, **more):
    settings = ModelSettings(path=str(folder), attention="eager", dtype="float32", **more)
    return load_model(tiny_runtime(), find_source(settings, tiny_runtime()), settings)


def test_every_ranks_range_is_what_the_numbers_stand_for(made, monkeypatch):
    monkeypatch.setattr(scaled, "_AT_ONCE", 100)  # many parts, none of them at a row's end
    model, folder = made
    ours, plain = open_stored(folder, model), open_stored(folder / "plain", model)
    assert ours.scaled
    assert not plain.scaled
    for name, tensor in own_tensors(model).items():
        found = []
        for stored in (ours, plain):
            for own in owners(tuple(tensor.shape), 3):
                part = torch.full((own.size,), 7.0)
                read_all(range_reads(stored, parts_of(stored, name), own, part))
                assert not part[own.numel :].any()
                found.append(part)
        assert all(torch.equal(one, two) for one, two in zip(found[:3], found[3:])), name


def test_a_model_is_loaded_as_the_numbers_and_no_longer_says_quantized(made):
    _, folder = made
    ours, plain = load(folder), load(folder / "plain")
    for (name, one), two in zip(own_tensors(ours).items(), own_tensors(plain).values()):
        assert torch.equal(one, two), name
    assert getattr(ours.config, "quantization_config", None) is None


def test_the_delta_of_two_scaled_checkpoints_and_of_one(made, tmp_path):
    model, folder = made
    targets = select_linears(model).targets | expert_matrices(model)
    plain = open_stored(folder / "plain", model)
    other = tmp_path / "tuned"
    other.mkdir()
    tensors = load_file(folder / "plain" / "model.safetensors")
    save_file({n: t * 1.5 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    difference = checkpoint_difference(other, folder, targets, model)
    same = checkpoint_difference(folder, folder, targets, model)
    for name, target in targets.items():
        wanted = read_matrix(plain, name, target)
        torch.testing.assert_close(difference(name, True), wanted / 2, rtol=1e-6, atol=1e-6)
        assert not same(name, True).any()


def test_transformers_own_dequantization_is_the_same(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, scales, whole = fp8(torch.randn(48, 64))
    assert torch.equal(Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32), whole)
    folder = as_mxfp4(shaped("gpt_oss"), tmp_path)
    tensors, plain = (load_file(where / "model.safetensors") for where in (folder, folder / "plain"))
    name = "model.layers.0.mlp.experts.down_proj"
    theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(theirs, plain[name])
    assert math.prod(theirs.shape)


def test_scales_of_other_blocks_are_refused_by_name(tmp_path):
    folder = as_fp8(build("llama"), tmp_path)
    said(folder, {"quant_method": "fp8", "weight_block_size": [24, 24]})
    with pytest.raises(UserError, match=r"_proj\.weight of shape .* in FP8 with scales of shape"):
        open_stored(folder, build("llama", "meta"))


def test_what_cannot_be_merged_into_is_said_before_anything_is_loaded(tmp_path):
    from tiny import tiny_model

    folder = as_fp8(tiny_model("llama"), tmp_path)
    asked = ["--model.path", str(folder), "--repair.method", "lowrank"]
    with pytest.raises(UserError, match=r"quantized checkpoint \(fp8\).*take the patch alone"):
        check(parse([*asked, "--repair.merge", "true"], "repair"), tiny_runtime())
    assert check(parse(asked, "repair"), tiny_runtime()).source.checkpoint == folder
