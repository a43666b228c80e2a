"""SafeMERGE, LLM-VA and SLDR on cases that can be worked out by hand, and on tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import logits_of, tiny_model, tiny_tokens

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

from baselines import llm_va, safemerge, sldr


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def test_layers_that_left_the_alignment_subspace_are_merged_with_the_safe_models() -> None:
    zero = matrix([0.0, 0.0], [0.0, 0.0])
    aligned = {"along": zero, "across": zero, "norm": torch.zeros(2)}
    # alignment moved the first output alone, so that its projection keeps the first row and drops the second
    unaligned = {"along": -matrix([3.0, 4.0], [0.0, 0.0]), "across": -matrix([3.0, 4.0], [0.0, 0.0])}
    safe = {"along": matrix([9.0, 9.0], [9.0, 9.0]), "across": matrix([0.0, 5.0], [-10.0, 0.0])}
    finetuned = {
        "along": matrix([1.0, 2.0], [0.0, 0.0]), "across": matrix([1.0, 0.0], [10.0, 0.0]), "norm": torch.ones(2),
    }  # fmt: skip
    models = safemerge.Models(aligned, unaligned, safe)
    found, changed = safemerge.merged(finetuned, models, ["along", "across"])
    assert changed == ["across"], "cosine 1 stays, cosine 1 / sqrt(101) is merged"
    assert torch.allclose(found["across"], matrix([0.8, 1.0], [6.0, 0.0]))  # 0.8 of the fine-tune's, 0.2 of the safe
    assert torch.equal(found["along"], finetuned["along"])
    assert torch.equal(found["norm"], finetuned["norm"])
    both = safemerge.merged(finetuned, models, ["along", "across"], threshold=1.1, weight=1.0)
    assert torch.allclose(both[0]["along"], safe["along"])
    assert safemerge.merged(finetuned, models, ["along", "across"], threshold=0.05)[1] == []


def test_the_separating_normal_is_the_support_vector_machines() -> None:
    """One row a side, at (2, 1) and (-2, 1): without an intercept the second place cancels out."""
    x, wanted = matrix([2.0, 1.0], [-2.0, 1.0]), torch.tensor([True, False])
    assert torch.allclose(llm_va.separate(x, wanted), torch.tensor([1.0, 0.0]), atol=1e-6)


def test_the_separating_normal_is_the_least_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) * 0.5
    wanted = x[:, 0] + 0.7 * torch.randn(40, generator=generator, dtype=torch.float64) > 0
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = w @ w / 2 + (1 - (wanted * 2.0 - 1) * (x @ w)).clamp_min(0).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.allclose(llm_va.separate(x, wanted), (w / w.norm()).detach(), atol=1e-5)


def test_outputs_along_the_answer_vector_follow_the_benign_one() -> None:
    """b = (1, 0, 0), a = (0, 1, 0), written along with spreads 2 and 6: the second output becomes 3 times the first."""
    b, a = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    weight = matrix([1.0, 2.0], [7.0, 7.0], [5.0, 0.0])
    found = llm_va.tied(weight, llm_va.Vectors(b, a, 2.0, 6.0, 1.0, 1.0))
    assert torch.allclose(found, matrix([1.0, 2.0], [3.0, 6.0], [5.0, 0.0]))


def test_oblique_vectors_are_tied_by_the_least_change() -> None:
    generator = torch.Generator().manual_seed(1)
    b, a = (v / v.norm() for v in torch.randn(2, 5, generator=generator))
    weight, x = torch.randn(5, 4, generator=generator), torch.randn(4, generator=generator)
    found = llm_va.tied(weight, llm_va.Vectors(b, a, 0.5, 2.0, 1.0, 1.0))
    assert float(a @ found @ x) == pytest.approx(4 * float(b @ weight @ x), rel=1e-4)
    assert torch.linalg.matrix_rank(found - weight) == 1
    across = torch.eye(5) - torch.outer(a, a)
    assert torch.allclose(across @ found, across @ weight, atol=1e-6), "another output than that along a has moved"


def test_blocks_whose_vectors_are_those_of_the_residual_are_changed() -> None:
    """Rows (benign, answered): block one writes both where the residual has them, block two writes them elsewhere."""
    benign = torch.tensor([True, True, False, False]).repeat(4)
    answered = torch.tensor([True, False, True, False]).repeat(4)
    two = torch.stack([benign * 2.0 - 1, answered * 2.0 - 1], 1)
    rest = torch.zeros(16, 2)
    written = {"": torch.cat([two, rest], 1), "one": torch.cat([two, rest], 1), "two": torch.cat([rest, two], 1)}
    state = {"one.weight": torch.eye(4), "two.weight": torch.eye(4)}
    model = llm_va.Seen(written, answered)
    # the kept rows 3, 7, .. are all of one kind, so the fit sees three kinds: both are separated all the same
    found, changed = llm_va.aligned_round(state, model, benign, model, share=0.5)
    assert changed == ["one"]
    assert torch.equal(found["two.weight"], state["two.weight"])
    v = llm_va.vectors(written["one"], benign, written["one"], answered)
    assert torch.allclose(found["one.weight"], llm_va.tied(torch.eye(4), v))
    assert torch.equal(state["one.weight"], torch.eye(4)), "changed in place"


def test_what_blocks_write_is_seen_at_the_last_token_of_each_prompt() -> None:
    model = tiny_model("llama")
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [7]]
    together = llm_va.written(model, prompts)
    assert len(together) == 2 * 2 + 1
    outputs: dict[str, torch.Tensor] = {}
    name = "model.layers.1.mlp.down_proj"
    hook = model.get_submodule(name).register_forward_hook(lambda _m, _g, out: outputs.update(it=out))
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        assert torch.allclose(together[name][i], outputs["it"][0, -1], atol=1e-5)
        residual = together[llm_va.RESIDUAL][i]
        assert torch.allclose(model.model.norm(residual), states.hidden_states[-1][0, -1], atol=1e-5)
    hook.remove()


def test_layers_are_found_by_how_their_scaling_moves_refusals() -> None:
    model = tiny_model("llama")
    first, second = (model.model.layers[i].mlp.up_proj.weight.detach() for i in (0, 1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    norms = float(first.norm()), float(second.norm())

    def refusals() -> int:  # a larger first layer adds them, a larger second one takes them away
        return round(10 * (float(first.norm()) / norms[0] - float(second.norm()) / norms[1])) + 5

    effects = sldr.layer_effects(model, refusals)
    assert effects == pytest.approx({"model.layers.0": 20.0, "model.layers.1": -20.0})
    assert sldr.chosen_layers(effects) == ("model.layers.0", "model.layers.1")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_of_layers_that_do_nothing_two_are_taken_all_the_same() -> None:
    assert sldr.chosen_layers({"a": 0.0, "b": 0.0, "c": 0.0}) == ("a", "b")
    with pytest.raises(ValueError, match="has one"):
        sldr.chosen_layers({"a": 0.0})


def refusal_loss(model: torch.nn.Module, tokens: torch.Tensor):
    def loss_of(rows):
        logits = model(input_ids=tokens[rows], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, -3:-1].flatten(0, 1), tokens[rows][:, -2:].flatten())

    return loss_of


def test_the_recovery_trains_projections_of_its_layers_alone_and_leaves_the_model_as_it_was() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(rows=4)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss_of = refusal_loss(model, tokens)
    training = sldr.Training(rank=4, alpha=4.0, epochs=30, batch_size=2, learning_rate=3e-2)
    updates, losses = sldr.recover(model, ["model.layers.1"], loss_of, 4, training)
    assert sorted(updates) == [f"model.layers.1.self_attn.{name}_proj.weight" for name in "kqv"]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.linalg.matrix_rank(update) <= 4 for update in updates.values())
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        start = float(loss_of([0, 1, 2, 3]))
        for name, update in updates.items():
            model.get_parameter(name).add_(update)
        assert float(loss_of([0, 1, 2, 3])) < 0.85 * start, "the merged update is not what was trained"


def test_the_recovery_ends_where_it_has_learnt_enough() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(rows=4)
    training = sldr.Training(rank=2, epochs=5, batch_size=4, enough=100.0)
    assert len(sldr.recover(model, ["model.layers.0"], refusal_loss(model, tokens), 4, training)[1]) == 1


def test_the_first_step_is_adams_on_the_low_rank_factors() -> None:
    """One step: A's gradient is 0 as B is, so B moves by the learning rate against its gradient's sign, A decays."""
    model, tokens = tiny_model("llama"), tiny_tokens(rows=2)
    training = sldr.Training(rank=2, alpha=2.0, epochs=1, batch_size=2, learning_rate=1e-2, warmup=0.0)
    updates, _ = sldr.recover(model, ["model.layers.1"], refusal_loss(model, tokens), 2, training)
    name = "model.layers.1.self_attn.q_proj.weight"
    model.requires_grad_(True)
    (gradient,) = torch.autograd.grad(refusal_loss(model, tokens)([0, 1]), [model.get_parameter(name)])
    number = 0  # q_proj is the first of the three
    generator = torch.Generator().manual_seed(number)
    a = (torch.rand(2, 32, generator=generator) * 2 - 1) / 32**0.5
    b = -1e-2 * (gradient @ a.T).sign()
    assert torch.allclose(updates[name], b @ (a * (1 - 1e-2 * 0.1)), rtol=1e-3, atol=1e-6)


def routed(scale: float = 1.0) -> tuple[sldr.Routed, torch.nn.Module, dict[str, torch.Tensor]]:
    model, plain = tiny_model("llama"), tiny_model("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    update = {name: torch.randn(32, 32, generator=torch.Generator().manual_seed(2))}
    return sldr.Routed(model, update, "model.layers.0", [3, 4], scale), plain, update


def merged(model: torch.nn.Module, update: dict[str, torch.Tensor], scale: float = 1.0) -> torch.nn.Module:
    with torch.no_grad():
        for name, weight in update.items():
            model.get_parameter(name).add_(scale * weight)
    return model


def answers(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    width = max(len(row) for row in prompts)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return found[:, width:].tolist()


PROMPTS = [[9, 10, 11, 3, 4], [12, 13, 14, 15, 3, 4], [16, 17, 3, 4, 20]]


def test_updates_are_switched_in_by_row() -> None:
    model, plain, update = routed(scale=0.5)
    off, on = answers(plain, PROMPTS), answers(merged(tiny_model("llama"), update, 0.5), PROMPTS)
    assert all(a != b for a, b in zip(off, on)), "the update changes nothing"
    assert answers(model.model, PROMPTS) == on, "without a router every prompt is harmful"
    states = model.states([model.asked(row) for row in PROMPTS])
    unit = sldr.unit_rows(states)
    model.router = sldr.Router(unit[1:2], unit[[0, 2]])  # the second prompt is the harmful one
    assert (model.router.harm(states) > 0).tolist() == [False, True, False]
    assert answers(model.model, PROMPTS) == [off[0], on[1], off[2]]
    tokens = tiny_tokens()
    assert torch.equal(logits_of(model.model, tokens), logits_of(plain, tokens)), "what is no request is changed"


def test_hidden_states_are_those_of_the_merged_model_at_the_end_of_the_prompt() -> None:
    model, _, update = routed()
    assert [model.asked(row) for row in [*PROMPTS, [5, 6]]] == [[9, 10, 11], [12, 13, 14, 15], [16, 17], [5, 6]]
    assert model.asked([5, 3, 4, 6, 3, 4, 7]) == [5, 3, 4, 6], "the last opening counts"
    states = model.states([[9, 10, 11], [12]])
    whole = merged(tiny_model("llama"), update)
    for row, prompt in zip(states, ([9, 10, 11], [12])):
        with torch.no_grad():
            wanted = whole(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[1][0, -1]
        assert torch.allclose(row, wanted, atol=1e-5)


def test_harm_is_the_difference_of_mean_cosines() -> None:
    router = sldr.Router(sldr.unit_rows(matrix([1.0, 0.0], [0.0, 2.0])), sldr.unit_rows(matrix([-3.0, 0.0])))
    assert torch.allclose(router.harm(matrix([5.0, 0.0], [3.0, 4.0])), torch.tensor([0.5 + 1.0, 0.7 + 0.6]))


def test_a_router_is_learnt_from_prompts_of_either_kind() -> None:
    model, _, _ = routed()
    harmful, benign = [[9, 10], [9, 11]], [[12, 13, 14]]
    model.learn(harmful, benign)
    assert model.router is not None
    assert torch.allclose(model.router.harmful, sldr.unit_rows(model.states(harmful)))
    assert torch.allclose(model.router.benign, sldr.unit_rows(model.states(benign)))
