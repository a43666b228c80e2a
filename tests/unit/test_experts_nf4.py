"""Fused experts in 4 bits: bytes of the whole parameter's quantization, one expert dequantized at a time."""

import bitsandbytes.functional as bnb
import pytest
import torch
from test_segments import build
from tiny import in_full, tiny_runtime

from oneshot.checkpoint.adapters.experts import expert_matrices, fused_experts
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.quantized.experts_nf4 import expert_weight, held_matrix, packed_experts
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

TOKENS = torch.arange(5, 29).view(2, 12)
MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "nemotron_h", "granitemoe", "llama4_text")


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    model = build(request.param).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    model.save_pretrained(where)
    build_tokenizer().save_pretrained(where)
    return where


def load(folder, **more):
    settings = ModelSettings(path=str(folder), attention="eager", **more)
    return load_model(tiny_runtime(), find_source(settings, tiny_runtime()), settings)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_are_those_of_the_whole_parameter(folder, double):
    plain, packed = load(folder), load(folder, quantize="nf4", double_quant=double)
    matrices = expert_matrices(plain)
    assert matrices.keys() == expert_matrices(packed).keys()
    for matrix in matrices.values():
        whole = getattr(plain.get_submodule(matrix.path), matrix.projection).detach()
        module = packed.get_submodule(matrix.path)
        parameter = getattr(module, matrix.projection)
        data, state = bnb.quantize_4bit(
            whole.reshape(-1), blocksize=64, quant_type="nf4", compress_statistics=double, quant_storage=whole.dtype
        )
        assert torch.equal(parameter.data.view(torch.uint8).view(-1), data.view(torch.uint8).view(-1))
        assert torch.equal(parameter.quant_state.absmax, state.absmax)
        wanted = in_full(data, state).view(whole.shape)[matrix.index]
        assert torch.equal(held_matrix(parameter, matrix.index), wanted)
        wanted = wanted.T if matrix.transposed else wanted
        assert torch.equal(expert_weight(parameter, matrix.index, transposed=matrix.transposed), wanted)
        assert wanted.shape == (matrix.out_features, matrix.in_features)


def test_the_model_computes_with_the_unpacked_weights(folder):
    packed, wanted = load(folder, quantize="nf4"), load(folder)
    with torch.no_grad():
        for name, module in wanted.named_modules():
            if hasattr(packed.get_submodule(name), "quant_state"):
                layer = packed.get_submodule(name)
                module.weight.copy_(in_full(layer.weight.data, layer.weight.quant_state))
        for path, module in fused_experts(wanted).items():
            for projection in ("gate_up_proj", "up_proj", "down_proj"):
                if (parameter := module._parameters.get(projection)) is not None:
                    held = getattr(packed.get_submodule(path), projection)
                    parameter.copy_(torch.stack([held_matrix(held, i) for i in range(len(parameter))]))
    embedded = wanted.get_input_embeddings()(TOKENS).detach()
    outputs, gradients = [], []
    for model in (packed, wanted):
        x = embedded.clone().requires_grad_()
        y = model(inputs_embeds=x, use_cache=False).logits
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(x.grad)
    for one, two in (outputs, gradients):
        assert float((one - two).norm() / two.norm()) < 2e-6


def test_autograd_keeps_nothing_unpacked(folder):
    model = load(folder, quantize="nf4")
    shapes = {(m.out_features, m.in_features) for m in expert_matrices(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        x = model.get_input_embeddings()(TOKENS[:1, :5]).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False)
    assert not shapes & set(kept)


def test_experts_that_fill_no_blocks_stay_and_are_told(tmp_path, capsys):
    from tiny_configs import SPARSE
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SPARSE["qwen3_moe"][0], "moe_intermediate_size": 25, "hidden_size": 60}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **fields))
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    found = load(tmp_path, quantize="nf4")
    assert "2 tensors of fused experts stay in float32, model.layers.1.mlp.experts.gate_up_proj for one" in (
        capsys.readouterr().out
    )
    assert found.model.layers[1].mlp.experts.down_proj.shape == (8, 60, 25)
    load(tmp_path)
    assert "stay" not in capsys.readouterr().out


def test_a_packed_parameter_knows_what_it_holds():
    parameter = packed_experts((3, 4, 32), torch.bfloat16, "cpu")
    assert parameter.shape == (3 * 4 * 32 // 4, 1)
    assert parameter.unpacked_shape == (3, 4, 32)
