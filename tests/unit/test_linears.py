import pytest
import torch
from tiny import FAMILIES, tiny_model

from oneshot.errors import UserError
from oneshot.patch.linears import select_linears, shape_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head(family):
    model = tiny_model(family)
    linears = select_linears(model)
    wanted = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    head = {n for n in wanted if n in ("lm_head", "embed_out")}
    assert len(head) == 1
    assert set(linears.targets) == wanted - head
    assert set(linears.every) == wanted
    assert linears.left_out == []
    for name, module in linears.targets.items():
        assert model.get_submodule(name) is module
        assert shape_of(module) == tuple(module.weight.shape)


def test_a_pattern_is_searched_in_names():
    model = tiny_model("llama")
    assert set(select_linears(model, r"q_proj$").targets) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert set(select_linears(model, r"layers\.1\.mlp").targets) == {
        f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    every = select_linears(model).every
    assert select_linears(model, r"q_proj$").every == every, "target names are chosen among all linear layers"
    assert set(select_linears(model, "lm_head").targets) == {"lm_head"}, "a head of its own may be named"


@pytest.mark.parametrize("pattern", ["(", "*q_proj", "[a-"])
def test_a_broken_pattern_is_refused(pattern):
    with pytest.raises(UserError, match=r"repair\.targets .* is no regular expression"):
        select_linears(tiny_model("llama"), pattern)


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(UserError, match=r"matches repair\.targets 'c_attn': the model has 15 \(for example model\."):
        select_linears(tiny_model("llama"), "c_attn")


def test_a_tied_head_is_refused():
    model = tiny_model("llama-tied")
    with pytest.raises(UserError, match="shares its weights with the embedding"):
        select_linears(model, "proj|head")
    assert "lm_head" not in select_linears(model, "proj").targets


@pytest.mark.parametrize(
    ("family", "patched"),
    [
        ("mixtral", {"self_attn", "mlp.experts."}),
        ("qwen2_moe", {"self_attn", "mlp.experts.", "mlp.shared_expert", "mlp.shared_expert_gate"}),
    ],
)
def test_routers_are_left_out_by_name(family, patched):
    linears = select_linears(tiny_model(family))
    assert sorted(linears.left_out) == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    layer = "model.layers.0."
    inside = {name.removeprefix(layer) for name in linears.targets if name.startswith(layer)}
    assert all(any(name.startswith(part) for part in patched) for name in inside)
    assert all(any(name.startswith(part) for name in inside) for part in patched)


def test_conv1d_is_left_out_by_name():
    """GPT-2 keeps its matrices in Conv1D: only a head of its own is a linear layer."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    linears = select_linears(model, "lm_head")
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert linears.left_out == [f"transformer.h.{i}.{kind}" for i in (0, 1) for kind in kinds]
    with pytest.raises(UserError, match=r"No linear layer to patch.*transformer\.h\.0\.attn\.c_attn"):
        select_linears(model)
