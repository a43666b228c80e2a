"""Weights out of 4 bits by the definition, also where rows fill no whole blocks: some kernels take other scales."""

import pytest
import torch
from tiny import in_full

from oneshot.checkpoint.quantized.linear4bit import forward
from oneshot.checkpoint.quantized.unpack import dequantized, fills_blocks

bnb = pytest.importorskip("bitsandbytes.functional")
SHAPES = {(64, 64): True, (48, 96): False, (100, 224): False, (24, 40): False, (5, 48, 32): False, (128, 32): False}


def packed(shape, dtype, double):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    return weight, *bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_comes_back_by_its_own_scales(shape, dtype, double):
    weight, data, state = packed(shape, dtype, double)
    found = dequantized(data, state)
    assert (found.shape, found.dtype) == (shape, dtype)
    torch.testing.assert_close(found, in_full(data, state), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert float((found - weight).float().norm() / weight.float().norm()) < 0.15, "4 bits lose no more than that"
    assert fills_blocks(state) == SHAPES[shape]


@pytest.mark.parametrize("width", [64, 96, 32])
def test_a_layer_multiplies_with_that_weight(width):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(width, 48, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(48, width), "bias": torch.randn(48)})
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize(torch.device("cpu"))
    weight = in_full(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(7, width, requires_grad=True)
    y = forward(layer, x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, layer.bias.float()), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(7, 48) @ weight, rtol=1e-4, atol=1e-4)
