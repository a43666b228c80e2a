"""Fused experts as layers of their own: their gradients, their updates and their names, in every mixture there is."""

import warnings

import pytest
import torch
from tiny import logits_of, tiny_model, tiny_runtime, tiny_update
from tiny_configs import SPARSE, V

from oneshot.checkpoint.adapters.added import merge_into
from oneshot.checkpoint.adapters.experts import ExpertMatrix, fused_experts, mixtures
from oneshot.errors import UserError
from oneshot.patch.attach import Gradients, attached, attached_update
from oneshot.patch.expert_hook import hooked
from oneshot.patch.linears import grouped, select_linears, shape_of

MIXTURES = sorted(SPARSE)


def mixture(kind, seed=0, **fields):
    """A random model of the family, fp32, whose outputs depend on its inputs; fields are its config's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(kind, **{**SPARSE[kind][0], **fields})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=MIXTURES)
def model(request):
    return mixture(request.param)


@pytest.fixture
def tokens():
    return torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(5))


def experts_of(targets):
    return {name: layer for name, layer in targets.items() if isinstance(layer, ExpertMatrix)}


def loss_of(model, tokens):
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def weight_gradient(layer):
    if not isinstance(layer, ExpertMatrix):
        return layer.weight.grad
    found = getattr(layer.module, layer.projection).grad[layer.index]
    return found.T if layer.transposed else found


def test_factors_are_the_gradients_of_autograd(model, tokens):
    targets = select_linears(model).targets
    assert experts_of(targets)
    gradients = Gradients(targets)
    with gradients.capturing(model):
        loss_of(model, tokens).backward()
    model.requires_grad_(True)
    model.zero_grad()
    loss_of(model, tokens).backward()
    model.requires_grad_(False)
    reached = 0
    for name, layer in targets.items():
        wanted = weight_gradient(layer)
        x, delta = gradients.pair(name)
        assert (delta.shape[1], x.shape[1]) == shape_of(layer)
        wanted = torch.zeros(shape_of(layer)) if wanted is None else wanted
        torch.testing.assert_close(delta.T @ x, wanted, rtol=1e-4, atol=1e-6 + 1e-4 * float(wanted.abs().max()))
        reached += isinstance(layer, ExpertMatrix) and len(x) > 0
    assert reached
    model.zero_grad()


def test_attached_is_what_merging_makes(model, tokens):
    targets = select_linears(model).targets
    update = tiny_update(targets, scale=0.02)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    own = model.get_experts_implementation()
    before = logits_of(model, tokens)
    with attached(targets, {}):
        torch.testing.assert_close(logits_of(model, tokens), before, rtol=1e-5, atol=1e-5)
    with attached_update(model, update) as changed:
        assert changed == targets
        added = logits_of(model, tokens)
    assert model.get_experts_implementation() == own
    assert torch.equal(logits_of(model, tokens), before)
    merge_into(tiny_runtime(), model, update)
    merged = logits_of(model, tokens)
    for name, parameter in model.named_parameters():
        parameter.copy_(kept[name])
    assert float((added - before).norm() / before.norm()) > 0.05
    assert float((added - merged).norm() / merged.norm()) < 1e-4


def test_names_and_what_is_left_out(model):
    linears = select_linears(model)
    experts = experts_of(linears.targets)
    assert not [name for name in linears.left_out if name in {matrix.path for matrix in experts.values()}]
    assert not [name for name in linears.targets if "router" in name]
    for name, matrix in experts.items():
        assert name == f"{matrix.path}.{matrix.index}.{matrix.projection}"
        assert model.get_submodule(matrix.path) is matrix.module
    groups = [group for _, group in grouped(linears.targets) if len(group) > 1]
    assert [name for group in groups for name in group] == list(experts), "those of one parameter side by side"
    assert {len(group) for group in groups} == {next(iter(experts.values())).module.num_experts}


def test_a_pattern_matches_experts_names():
    model = tiny_model("mixtral")
    only = select_linears(model, r"experts\.2\.down_proj$").targets
    assert list(only) == [f"model.layers.{i}.mlp.experts.2.down_proj" for i in (0, 1)]
    assert not experts_of(select_linears(model, "self_attn").targets)


def test_experts_that_are_behind_no_interface_are_named():
    model = mixture("llama4_text")
    experts = model.model.layers[0].feed_forward.experts
    type(experts).__name__ = "OtherExperts"
    try:
        linears = select_linears(model)
    finally:
        type(experts).__name__ = "Llama4TextExperts"
    assert "model.layers.0.feed_forward.experts" in linears.left_out
    assert not experts_of(linears.targets)


def test_llama_4s_own_function_is_back_after_hooks_in_hooks(tokens):
    """And a token counts as reached by the experts that it is sent to alone, though all are given it."""
    model = mixture("llama4_text")
    experts, rows = model.model.layers[0].feed_forward.experts, []
    targets = select_linears(model, r"layers\.0\.feed_forward\.experts\..*down_proj$").targets

    def seen(name, x, y, at):
        rows.extend(at.tolist())

    with hooked(targets, seen), hooked(targets, lambda *_: None):
        assert "forward" in vars(experts)
        logits_of(model, tokens)
    assert "forward" not in vars(experts)
    assert sorted(rows) == list(range(tokens.numel())), "each of them is sent to one"


def test_an_update_of_another_shape_is_refused():
    model = tiny_model("mixtral")
    name = "model.layers.0.mlp.experts.1.down_proj"
    update = {name: tiny_update(select_linears(model).targets)[name.replace("down", "gate_up")]}
    with pytest.raises(UserError, match=r"experts\.1\.down_proj is 96 x 32, the layer is 32 x 48"):
        merge_into(tiny_runtime(), model, update)


@pytest.mark.parametrize("training", [False, True])
def test_only_tokens_that_are_kept_are_among_an_experts_rows(training):
    """With gradient checkpointing, too, where the forward pass is run again."""
    model = mixture("mixtral")
    if training:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(5))
    targets = select_linears(model).targets
    gradients = Gradients(targets)
    with gradients.capturing(model):
        logits = model(input_ids=tokens, use_cache=False).logits[1]
        logits.square().sum().backward()
    every = {name: gradients.pair(name) for name in experts_of(targets)}
    gradients.keep = torch.zeros(2, 9, dtype=torch.bool)
    gradients.keep[1] = True  # the loss is of the second row alone
    for name, (x, delta) in every.items():
        kept_x, kept_delta = gradients.pair(name)
        torch.testing.assert_close(kept_delta.T @ kept_x, delta.T @ x, rtol=1e-4, atol=1e-4)
    per_layer = sum(len(gradients.pair(name)[0]) for name in every if ".0.mlp" in name and "down" in name)
    assert per_layer == 9 * 2, "each token is sent to two"
    sent = sum(len(every[name][0]) for name in every if ".0.mlp" in name and "down" in name)
    assert sent == 2 * 9 * 2


def test_hooks_are_called_in_their_order_and_taken_off_when_the_block_fails(tokens):
    model = mixture("mixtral")
    targets, own = select_linears(model, r"experts\.0\.down_proj").targets, model.get_experts_implementation()
    called = []

    def first(name, x, y, rows):
        called.append(("first", name))
        return y + 1

    def second(name, x, y, rows):
        called.append(("second", name))
        assert x.shape[1] == targets[name].in_features
        assert y.shape == (len(rows), targets[name].out_features)

    def fails():
        with hooked(targets, first), hooked(targets, second):
            logits_of(model, tokens)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert model.get_experts_implementation() == own
    assert [which for which, _ in called] == ["first", "second"] * (len(called) // 2)
    assert called
    assert {name for _, name in called} <= set(targets)
    called.clear()
    with hooked(targets, second):
        logits_of(model, tokens)
    assert {which for which, _ in called} == {"second"}


def test_a_mixture_is_what_holds_experts_fused_or_not(model):
    held = {id(module) for module in mixtures(model)}
    assert held
    for path in fused_experts(model):
        assert id(model.get_submodule(path.rpartition(".")[0])) in held
    each = torch.nn.Module()
    each.gate, each.experts = torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert mixtures(torch.nn.ModuleDict({"layer": each})) == [each], "as models that bring their own code have them"
