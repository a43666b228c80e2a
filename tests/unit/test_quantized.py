"""4-bit weights: which blocks a range touches and owns, and what their layers keep between the passes."""

import json
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import in_full, logits_of, tiny_model, tiny_runtime, tiny_tokens

from oneshot.checkpoint.layout import owners
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.quantized.experts_nf4 import BLOCK
from oneshot.checkpoint.quantized.linear4bit import forward
from oneshot.checkpoint.quantized.nf4 import blocks
from oneshot.errors import UserError
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer


@given(st.integers(1, 5000), st.integers(1, 9), st.sampled_from([4, 8]))
def test_every_block_has_one_owner_and_every_range_the_blocks_that_it_touches(items, world_size, per_item):
    numel = items * per_item
    owned = []
    for own in owners((items,), world_size):
        touched, mine = blocks(numel, own, per_item)
        owned += range(mine.start, mine.stop)
        weights = range(own.start * per_item, own.stop * per_item)
        assert {w // BLOCK for w in weights} == set(range(touched.start, touched.stop))
        assert set(range(mine.start, mine.stop)) <= set(range(touched.start, touched.stop))
    assert owned == list(range(math.ceil(numel / BLOCK)))


def saved(model, folder):
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **settings):
    chosen = ModelSettings(path=str(folder), **settings)
    return load_model(tiny_runtime(), find_source(chosen, tiny_runtime()), chosen)


def as_bytes(layer):
    """The packed nibbles; as numbers of the storage dtype some are NaN."""
    return layer.weight.data.view(torch.uint8).clone()


def test_the_backward_pass_takes_the_weight_that_is_there_then(tmp_path):
    """ZeRO-3 frees a gathered weight after the forward pass and gathers it again: nothing may hold the old one."""
    layer = load(saved(tiny_model("llama"), tmp_path), quantize="nf4").model.layers[0].mlp.down_proj
    x = torch.randn(3, 5, layer.in_features).bfloat16().requires_grad_()
    y = forward(layer, x)
    assert torch.equal(y, layer(x))
    other = torch.randn(layer.out_features, layer.in_features).bfloat16()
    layer.weight.data = bnb.quantize_4bit(other, quant_type="nf4", quant_storage=torch.bfloat16)[0]
    y.backward(torch.ones_like(y))
    wanted = torch.ones_like(y) @ in_full(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(x.grad, wanted)


def test_a_pass_in_eval_mode_leaves_the_packed_weights_as_they_are(tmp_path):
    """On a CPU with AVX512-bf16 bitsandbytes would repack them, and no partition or checkpoint would fit them."""
    model = load(saved(tiny_model("llama"), tmp_path), quantize="nf4")
    layers = [m for m in model.modules() if hasattr(m, "quant_state")]
    before = [as_bytes(m) for m in layers]
    with torch.no_grad():
        model.eval()(input_ids=tiny_tokens(), use_cache=False)
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    assert all(torch.equal(as_bytes(m), old) for m, old in zip(layers, before))


def test_the_output_head_stays_in_full_precision(tmp_path):
    model = load(saved(tiny_model("llama"), tmp_path), quantize="nf4")
    assert type(model.lm_head) is torch.nn.Linear
    assert {type(m).__name__ for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)} == {"Linear4bit"}


def test_what_cannot_be_read_in_four_bits_says_why(tmp_path):
    with pytest.raises(UserError, match="no linear layer that can be quantized"):
        load(saved(tiny_model("gpt2"), tmp_path), quantize="nf4")


def test_a_flipped_bit_is_found_while_it_is_quantized(tmp_path):
    from oneshot.checkpoint.writing.save import save_checkpoint

    model = tiny_model("llama").to(torch.bfloat16)
    save_checkpoint(tiny_runtime(), model, build_tokenizer(), tmp_path / "m", torch.bfloat16)
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    name = "model.layers.1.mlp.down_proj.weight"
    length = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=name):
        load(tmp_path / "m", quantize="nf4")


def test_what_a_four_bit_model_saves_loads_again(tmp_path):
    model = load(saved(tiny_model("llama"), tmp_path / "m"), quantize="nf4")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    say_quantized(tmp_path / "m")
    again = load(tmp_path / "m")
    assert torch.equal(logits_of(again, tiny_tokens()), logits_of(model, tiny_tokens()))
    assert find_source(ModelSettings(path=str(tmp_path / "m")), tiny_runtime()).dtype == torch.bfloat16


def say_quantized(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config["quantization_config"] = {"quant_method": "bitsandbytes", **(fields or four)}
    (folder / "config.json").write_text(json.dumps(config))


def test_packed_weights_that_fill_no_whole_elements_are_refused(tmp_path):
    uneven = {"hidden_size": 34, "intermediate_size": 49, "num_attention_heads": 2, "head_dim": 8}
    folder = saved(tiny_model("llama", **uneven), tmp_path)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        state[name], quant = bnb.quantize_4bit(state[name], quant_type="nf4")
        state |= {f"{name}.{key}": value.clone() for key, value in quant.as_dict(packed=True).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    say_quantized(folder)
    with pytest.raises(UserError, match=r"mlp.*fill no whole number"):
        load(folder)


def test_eight_bits_are_refused_under_zero3():
    from oneshot.checkpoint.quantized.scheme import refuse_eight_bit

    refuse_eight_bit({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    with pytest.raises(UserError, match="8 bits"):
        refuse_eight_bit({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})


def test_stock_io_and_quantize_exclude_each_other():
    with pytest.raises(UserError, match=r"model\.stock_io"):
        ModelSettings(quantize="nf4", stock_io=True)


def test_attention_auto_is_what_can_run_here(tmp_path):
    assert load(saved(tiny_model("llama"), tmp_path), attention="auto").config._attn_implementation == "sdpa"
