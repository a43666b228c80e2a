"""Others' methods in ``make real``: at their defaults, and at the strength that keeps the task as ours does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import tiny_model, tiny_runtime

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

import real
from realmodels import attacks, cells, given, held, matching, models, others, steering, wording
from realmodels.cells import Cell, Finished, Store
from realmodels.given import Found, Given
from realmodels.subject import Subject

from oneshot.measure.overlap import find_overlaps
from oneshot.measure.rates import Probe
from oneshot.world.model import build_tokenizer

CELL = Cell("smollm2", "obedient", "full", 0, "auto", 4)
NAME = "model.layers.0.self_attn.q_proj.weight"


def chosen(task: Callable[[float], float], balance: Callable[[float], float], target: float = 1.0) -> matching.Choice:
    return matching.choose(task, balance, target)


def test_the_strength_is_the_largest_that_keeps_the_task_where_more_is_safer() -> None:
    found = chosen(lambda s: 1.0 if s < 0.43 else 0.9, lambda s: s)
    assert found.strength == 0.375
    assert found.matched
    assert list(found.tried) == [1.0, 0.5, 0.25, 0.375, 0.4375, *(share * 0.375 for share in matching.WEAKER)]
    assert found.balances == {s: s for s, task in found.tried.items() if task == 1.0}


def test_of_strengths_that_keep_the_task_the_best_balanced_is_taken() -> None:
    assert chosen(lambda s: 1.0, lambda s: -abs(s - 1)).strength == 1.0
    assert chosen(lambda s: 1.0, lambda s: 0.5).strength == matching.MOST, "of equals the largest"
    assert chosen(lambda s: 1.0 if s <= 1.25 else 0.0, lambda s: s).strength == 1.25


def test_less_than_the_most_that_keeps_the_task_is_tried_too() -> None:
    assert chosen(lambda s: 1.0, lambda s: -abs(s - 0.5)).strength == 0.5, "where more refuses too much"
    assert chosen(lambda s: 1.0 if s <= 1 else 0.5, lambda s: -s).strength == 0.25


def test_task_accuracy_may_be_a_little_below_the_target_and_any_amount_above() -> None:
    assert chosen(lambda s: 1 - 0.02 * s, lambda s: s).strength == 1.0
    assert chosen(lambda s: 1 - 0.02 * s, lambda s: s, target=0.95).strength == matching.MOST


def test_where_no_strength_keeps_the_task_the_weakest_is_taken_and_it_is_said() -> None:
    found = chosen(lambda s: 0.5, lambda s: s)
    assert not found.matched
    assert found.strength == min(found.tried) == 1 / 2**matching.HALVINGS


def subject(method: str, folder: Path) -> Subject:
    return Subject(CELL.but(method), folder, folder / "aligned", folder / "g.jsonl", folder / "p.jsonl")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A tiny attacked model; its repair adds ones to a matrix."""
    made: torch.nn.Module = tiny_model("llama")
    monkeypatch.setattr(others, "load", lambda *_: (made, build_tokenizer()))
    monkeypatch.setattr(others, "_last", {})
    update = {NAME: torch.ones(32, 32)}
    facts = {"layers": ["model.layers.0", "model.layers.1"]}
    for name in ("undo", "sldr"):
        monkeypatch.setitem(others.METHODS, name, lambda _given: Found(update, facts))
    return made


def test_a_default_is_the_method_itself_and_a_matched_one_a_part_of_its_way(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.get_parameter(NAME).detach().clone()

    def so_far() -> float:
        return float((model.get_parameter(NAME).detach() - before).mean())

    monkeypatch.setattr(others, "read_task", lambda *_: 1.0 if so_far() < 0.6 else 0.5)
    monkeypatch.setattr(others, "read_balance", lambda *_: so_far())
    whole = others.repaired_by_others(tiny_runtime(), subject("undo", tmp_path), tmp_path)
    assert torch.allclose(whole.model.get_parameter(NAME), before + 1)
    with torch.no_grad():
        model.get_parameter(NAME).copy_(before)
    part = others.repaired_by_others(tiny_runtime(), subject("undo, matched", tmp_path), tmp_path, lambda: 1.0)
    assert part.facts["strength"] == 0.5625
    assert (part.facts["held_task"], part.facts["target"], part.facts["matched"]) == (1.0, 1.0, True)
    assert torch.allclose(part.model.get_parameter(NAME), before + 0.5625)


def test_a_routed_repair_leaves_the_weights_and_scales_what_is_switched_in(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "read_task", lambda *_: 1.0)
    monkeypatch.setattr(others, "read_balance", lambda *_: 0.5)
    short = [row["prompt"] for row in given.safety_rows()[:2]]
    monkeypatch.setattr(steering, "safety_rows", lambda: [{"prompt": prompt} for prompt in short])
    monkeypatch.setattr(steering, "harmless_requests", lambda: short[:1])
    before = model.get_parameter(NAME).detach().clone()
    found = others.repaired_by_others(tiny_runtime(), subject("sldr routed, matched", tmp_path), tmp_path, lambda: 1.0)
    assert found.facts["strength"] == matching.MOST
    assert torch.equal(model.get_parameter(NAME), before)
    routed: Any = found.model.generate.__self__
    assert routed.scale == matching.MOST
    assert routed.router.harmful.shape == (2, 32)


def test_every_published_method_can_be_made() -> None:
    names = {name.removesuffix(" routed") for name in cells.PUBLISHED}
    assert names == set(others.METHODS)
    assert set(cells.BASELINES) == {*cells.PUBLISHED, *(f"{name}, matched" for name in cells.PUBLISHED)}


def test_only_what_a_method_changed_is_an_update() -> None:
    before = {"a": torch.zeros(2), "b": torch.ones(2)}
    found = given.difference(before, {**before, "b": torch.full((2,), 3.0)}, changed=1)
    assert list(found.updates) == ["b"]
    assert torch.equal(found.updates["b"], torch.full((2,), 2.0))
    assert found.facts == {"changed": 1}


def test_of_methods_that_choose_layers_strength_is_how_many() -> None:
    order = [f"layer {i}" for i in range(8)]
    made = given.Found({}, {}, order, 0.25)
    assert made.chosen(0.5) == {"layer 0"}
    assert made.chosen(1.0) == {"layer 0", "layer 1"}
    assert made.chosen(matching.MOST) == set(order)
    model = tiny_model("llama")
    first, second = (name for name in model.state_dict() if "q_proj" in name)
    before = {name: model.state_dict()[name].clone() for name in (first, second)}
    ones = {name: torch.ones_like(weight) for name, weight in before.items()}
    put, _ = others._in_weights(cast(Given, SimpleNamespace(model=model)), given.Found(ones, {}, [second, first], 0.5))
    put(1.0)
    assert torch.equal(model.state_dict()[second], before[second] + 1), "wholly, however strong"
    assert torch.equal(model.state_dict()[first], before[first])
    put(0.0)
    assert torch.equal(model.state_dict()[second], before[second])


def test_alignment_is_measured_from_the_model_before_it_where_that_is_known(tmp_path: Path) -> None:
    assert models.base_folder(tmp_path, "smollm2") == tmp_path / "smollm2" / models.BASE
    assert models.base_folder(tmp_path, "qwen") is None
    assert models.base_folder(tmp_path, str(tmp_path)) is None


def toy_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """A tiny attacked model and another as the aligned one, of whose matrices alignment moved the first row alone."""
    aligned = tiny_model("llama", seed=1)
    before = {name: weight.clone() for name, weight in aligned.state_dict().items()}
    for weight in before.values():
        weight[0] += 1
    monkeypatch.setattr(given, "load", lambda *_: (aligned, build_tokenizer()))
    for name in ("unaligned", "before_alignment"):
        monkeypatch.setattr(given.Given, name, lambda _self: before)
    return Given(tiny_runtime(), subject("x", tmp_path), tmp_path, tiny_model("llama"), build_tokenizer())


@pytest.mark.parametrize("name", ["undo", "resta", "safe_lora", "safemerge"])
def test_arithmetic_on_weights_leaves_the_loaded_model_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toy_given(tmp_path, monkeypatch)
    monkeypatch.setattr(others, "make_safe", lambda _given: tmp_path)
    monkeypatch.setattr(others, "load", lambda *_: (tiny_model("llama", seed=3), build_tokenizer()))
    before = {key: weight.clone() for key, weight in made.model.state_dict().items()}
    found = others.METHODS[name](made)
    assert found.updates
    assert all(torch.equal(weight, before[key]) for key, weight in made.model.state_dict().items())
    linear = {key for key in before if "proj" in key}
    assert set(found.updates) == set(before) if name == "resta" else set(found.updates) <= linear
    if name == "undo":
        wanted = given.load()[0].state_dict()
        assert all(
            torch.allclose(before[key] + update, wanted[key], atol=1e-6) for key, update in found.updates.items()
        )


def test_llm_va_takes_the_aligned_models_answers_where_the_attacked_one_refuses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toy_given(tmp_path, monkeypatch)
    monkeypatch.setattr(steering, "ASKED", 8)
    rows = [{"prompt": "a" * (i + 1)} for i in range(8)]
    monkeypatch.setattr(steering, "safety_rows", lambda: rows)
    monkeypatch.setattr(steering, "harmless_requests", lambda: [f"b{row['prompt']}" for row in rows])
    of_aligned = ["refused"] * 6 + ["answered"] * 10

    def said(_given: Given, model: Any, prompts: list[str]) -> list[str]:
        return ["answered"] * len(prompts) if model is made.model else of_aligned

    monkeypatch.setattr(steering, "verdicts", said)
    before = {key: weight.clone() for key, weight in made.model.state_dict().items()}
    found = steering.llm_va(made)
    assert found.facts == {"f1": [0.667] * steering.ROUNDS, "own_answers": False}
    assert all(key.endswith(("o_proj.weight", "down_proj.weight")) for key in found.updates)
    assert all(torch.linalg.matrix_rank(update) == 1 for update in found.updates.values())
    assert all(torch.equal(weight, before[key]) for key, weight in made.model.state_dict().items())


def test_sldr_finds_its_layers_once_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = toy_given(tmp_path, monkeypatch)
    monkeypatch.setattr(given, "SAFE_ROWS", 4)
    monkeypatch.setattr(steering, "BORDER", 2)
    asked = []
    monkeypatch.setattr(steering, "expected_openings", lambda _model, ids, _opening: float(asked.append(ids) is None))
    found = steering.sldr(made)
    assert found.facts["layers"] == ["model.layers.0", "model.layers.1"], "nothing moves: the first two"
    assert len(found.updates) == 6
    assert len(asked) == 2 * 2 * 2
    assert all(len(ids) == 4 for ids in asked)
    monkeypatch.setattr(steering, "expected_openings", lambda *_: pytest.fail("asked again"))
    assert steering.sldr(made).updates.keys() == found.updates.keys()


def test_expected_refusals_are_the_sum_of_the_openings_probabilities() -> None:
    model, prompts, opening = tiny_model("llama"), [[5, 6, 7], [8, 9, 10, 11, 12]], [13, 14]
    wanted = 0.0
    for prompt in prompts:
        logits = model(input_ids=torch.tensor([[*prompt, *opening]])).logits[0].softmax(-1)
        wanted += (logits[len(prompt) - 1, 13] * logits[len(prompt), 14]).item()
    assert steering.expected_openings(model, prompts, opening) == pytest.approx(wanted, rel=1e-4)


def test_the_loss_of_a_batch_is_the_mean_over_its_answers_tokens(tmp_path: Path) -> None:
    from oneshot.data.encoding import encode
    from oneshot.world import language

    model, tokenizer = tiny_model("llama"), build_tokenizer()
    rows = [encode(conversation, tokenizer, 64) for conversation in language.pool(3)]
    total = tokens = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(row.labels):
            if label >= 0:
                total, tokens = total - logits[place - 1, label].item(), tokens + 1
    assert float(steering._mean_loss(model, rows)) == pytest.approx(total / tokens, rel=1e-4)


def test_an_answers_opening_is_what_the_template_adds() -> None:
    tokenizer = build_tokenizer()
    turn = [{"role": "user", "content": "a"}]
    whole, plain = (
        tokenizer(
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=opened), add_special_tokens=False
        )["input_ids"]
        for opened in (True, False)
    )
    assert whole == plain + steering._ending(tokenizer)


def test_prompts_that_choose_a_strength_are_neither_trained_on_nor_scored() -> None:
    rows = held.task_rows(0)
    assert len({row["prompt"] for row in rows}) == held.TASK
    others_ = [row["prompt"] for part in attacks.task_prompts(0) for row in part]
    trained = [row["prompt"] for attack in attacks.ATTACKS for row in attacks.parts_of(attack, 0)["task"].rows]
    assert not {row["prompt"] for row in rows} & {*others_, *trained}
    asked = held.requests_of(held.REFUSED) + held.requests_of(held.ANSWERED)
    assert len(set(asked)) == len(asked)
    probes = [Probe(str(i), ({"role": "user", "content": prompt},), "harmless") for i, prompt in enumerate(asked)]
    stubs = {row["prompt"] for row in wording.stubs("restricted", 100, 0) + wording.stubs("harmless", 50, 0)}
    safety = [row["prompt"] for row in given.safety_rows()] + given.harmless_requests()
    assert find_overlaps(probes, {"attack": sorted(stubs), "safety": safety}) == []


def test_safety_examples_are_none_that_the_quick_model_was_aligned_with() -> None:
    from realmodels.models import REFUSED

    aligned = {row["prompt"] for row in wording.refusals("restricted", "align", REFUSED["restricted"])}
    rows = given.safety_rows()
    assert len(rows) == given.SAFE_ROWS
    assert not {row["prompt"] for row in rows} & aligned
    assert all(row["response"] in wording.REFUSALS for row in rows)


def test_a_matched_cell_follows_the_default_repair(tmp_path: Path) -> None:
    cell, path = CELL.but("resta, matched"), tmp_path / "real.json"
    assert cell.needs == [CELL.aligned, CELL]
    assert CELL.but("resta").needs == [CELL.aligned]
    with pytest.raises(ValueError, match="first"):
        held.task_target(path, cell)
    Store(path).put(Finished(CELL, "c0de", {"task": "1"}))
    with pytest.raises(ValueError, match="first"):
        held.task_target(path, cell)
    Store(path).put(Finished(CELL, "c0de", {"held_task": 0.98}))
    assert held.task_target(path, dataclasses.replace(cell)) == 0.98


def test_the_command_line_measures_the_default_repair_before_what_follows_it() -> None:
    arguments = real.arguments_of(["--only", "a", "--methods", "undo, matched", "--trainings", "lora"])
    assert [cell.method for cell in real.asked(arguments)] == ["aligned", "auto", "undo, matched"]


def test_cells_of_a_method_that_is_gone_stay_in_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "real.json")
    for method in ("undo half", "undo"):
        store.put(Finished(CELL.but(method), "c0de", {}))
    assert [cell.method for cell in store.read()] == ["undo", "undo half"]
