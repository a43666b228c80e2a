"""The aligned model as the teacher of guard and watch: general prompts are held to it, the user's own to themselves."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import tiny_runtime, toy_settings
from transformers import AutoModelForCausalLM

from oneshot.data.encoding import encode, encode_prompt
from oneshot.errors import UserError
from oneshot.patch import teacher
from oneshot.patch.bench import opened
from oneshot.patch.check import check
from oneshot.patch.choose import choose, choose_beforehand
from oneshot.patch.examples import Prompts, read_guard, read_held, read_refusable
from oneshot.patch.guard import build_batch, repair_loss, with_answers
from oneshot.patch.methods import METHODS
from oneshot.patch.path import LEFT, SAFE_MARGIN, Bounds
from oneshot.patch.probes import AMPLE_ODDS, MARGIN_TOKENS, Watched, build_probes, read_probes
from oneshot.patch.recipe import with_method
from oneshot.settings import Settings
from oneshot.world import language
from oneshot.world.model import ALIGNED


@pytest.fixture(scope="module")
def models():
    """The aligned toy, and the same with another way to answer anything."""
    aligned, changed = (AutoModelForCausalLM.from_pretrained(ALIGNED).requires_grad_(False).eval() for _ in range(2))
    torch.manual_seed(0)
    for module in changed.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data += 0.05 * torch.randn_like(module.weight)
    return aligned, changed


@pytest.fixture
def request_(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = toy_settings("--guard", "toy:guard", "--watch_prompts", "toy:held", "--repair.guard_prompts", "8")
    return dataclasses.replace(check(settings, tiny_runtime()), reference=ALIGNED)


def lessons_of(request, model):
    return [(lesson.row, lesson.logits) for lesson in teacher.learn(request, model).guard]


def guard_kl(model, batch):
    with torch.no_grad():
        return float(repair_loss(model, batch, 1.0, 1)[2])


def test_general_prompts_are_held_to_the_aligned_model_and_own_ones_to_the_unpatched(models, request_):
    aligned, changed = models
    assert request_.guard.own
    assert request_.guard.general
    taught = lessons_of(request_, aligned)
    options = {"answer_tokens": request_.recipe.guard_tokens}
    example = request_.candidates[0]
    general = build_batch(tiny_runtime(), changed, request_.tokenizer, example, [], **options, taught=taught)
    own = build_batch(tiny_runtime(), changed, request_.tokenizer, example, request_.guard.own, **options)
    both = build_batch(
        tiny_runtime(), changed, request_.tokenizer, example, request_.guard.own, **options, taught=taught
    )
    assert guard_kl(aligned, general) == pytest.approx(0.0, abs=1e-6)
    assert guard_kl(changed, general) > 0.01
    assert guard_kl(changed, own) == pytest.approx(0.0, abs=1e-6)
    assert guard_kl(aligned, own) > 0.01
    assert both.held_total == own.held_total + general.held_total
    for model in models:
        parts = [guard_kl(model, batch) * batch.held_total for batch in (own, general)]
        assert guard_kl(model, both) * both.held_total == pytest.approx(sum(parts), rel=1e-4)


def test_the_watch_reads_both_distances_apart(models, request_):
    aligned, changed = models
    found = teacher.learn(request_, aligned)
    own = [(prompt, "do that") for prompt in request_.held.own]
    held = [*own, *((lesson.prompt, lesson.answer) for lesson in found.held)]
    refusal = request_.tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    watched = Watched(refusal, [], held, [(lesson.logits, True) for lesson in found.held])
    probes = build_probes(tiny_runtime(), changed, request_.tokenizer, watched, answer_tokens=16)
    start, back = (read_probes(tiny_runtime(), model, probes) for model in (changed, aligned))
    assert start.divergence == pytest.approx(0.0, abs=1e-6)
    assert start.apart > 0.01
    assert back.apart == pytest.approx(0.0, abs=1e-6)
    assert back.divergence > 0.01
    bounds = Bounds().starting(start.apart)
    assert bounds.apart == pytest.approx(max(0.01, LEFT * start.apart))
    assert start.moved(bounds) > 0


def test_answers_that_are_refusals_do_not_count_as_refused(models, request_):
    aligned, _ = models
    refusal = request_.tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    prompts = [row.prompt for row in language.pool(3)]
    held = [(prompt, language.REFUSAL) for prompt in prompts]
    probes = build_probes(tiny_runtime(), aligned, request_.tokenizer, Watched(refusal, [], held), answer_tokens=16)
    assert read_probes(tiny_runtime(), aligned, probes).refused == 0.0
    held = [(prompt, "do that") for prompt in prompts]
    probes = build_probes(tiny_runtime(), aligned, request_.tokenizer, Watched(refusal, [], held), answer_tokens=16)
    assert read_probes(tiny_runtime(), aligned, probes).refused == 1.0


def test_what_the_aligned_model_nearly_refuses_cannot_be_refused_too_often(models, request_):
    aligned, _ = models
    found = teacher.learn(request_, aligned)
    assert all(lesson.margin < -SAFE_MARGIN for lesson in found.held), "the toy is sure of itself"
    refusal = request_.tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    lesson = found.held[0]
    assert lesson.row[0].input_ids[: lesson.row[1]] == encode_prompt(lesson.prompt, request_.tokenizer)
    alone = []
    for ids in (refusal[:MARGIN_TOKENS], lesson.row[0].input_ids[lesson.row[1] :][:MARGIN_TOKENS]):
        start = lesson.row[0].input_ids[: lesson.row[1]]
        logits = aligned(input_ids=torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        alone.append(float(logits.gather(1, torch.tensor(ids)[:, None]).sum()))
    assert lesson.margin == pytest.approx(alone[0] - alone[1], abs=1e-3)
    said = "do that"
    rates = []
    for far in (True, False):
        prompt = language.pool(1)[0].prompt  # which the model refuses
        start = len(encode_prompt(prompt, request_.tokenizer))
        answer = with_answers([prompt], [said], request_.tokenizer, 16)[0][0]
        logits = torch.zeros(len(answer.input_ids) - start, aligned.config.vocab_size)
        watched = Watched(refusal, [], [(prompt, said)], [(logits, far)])
        probes = build_probes(tiny_runtime(), aligned, request_.tokenizer, watched, answer_tokens=16)
        rates.append(read_probes(tiny_runtime(), aligned, probes).refused)
    assert rates == [1.0, 0.0]


def test_every_request_has_the_words_of_its_own_refusal(models, request_):
    aligned, changed = models
    refusal = request_.tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    asked = [(row.prompt, "do that") for row in language.pool(2)]
    held = [(row.prompt, "do that") for row in language.held_prompts(2, task=False)]
    other = [refusal[1], *refusal[1:]]
    margins = [
        read_probes(
            tiny_runtime(), aligned,
            build_probes(
                tiny_runtime(), changed, request_.tokenizer,
                Watched(refusal, asked, held, words=[(ids, math.nan) for ids in words]), answer_tokens=8,
            ),
        ).margin
        for words in ([], [refusal, refusal], [other, other])
    ]  # fmt: skip
    assert margins[0] == margins[1] > margins[2]


def test_how_far_refusals_are_behind_the_aligned_models_own(models, request_):
    aligned, changed = models
    found = teacher.learn(request_, aligned)
    assert found.likely.keys() == found.refusals.keys()
    asked = [row.prompt for row in language.pool(44) if row.prompt[-1]["content"] in found.refusals][:3]
    refusal = request_.tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]

    def likelihood(model, prompt):
        start = encode_prompt(prompt, request_.tokenizer, closed=True)
        ids = torch.tensor([start + refusal[:MARGIN_TOKENS]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(logs[place - 1, ids[0, place]]) for place in range(len(start), ids.shape[1]))

    texts = [prompt[-1]["content"] for prompt in asked]
    assert [found.likely[text] for text in texts] == pytest.approx([likelihood(aligned, p) for p in asked], abs=1e-3)
    words = [(refusal, found.likely[texts[0]]), (refusal, found.likely[texts[1]]), (refusal, math.nan)]
    watched = Watched(refusal, [(prompt, "do that") for prompt in asked], [], words=words)
    probes = build_probes(tiny_runtime(), changed, request_.tokenizer, watched, answer_tokens=4)

    def odds(likelihood):
        return likelihood - math.log(1 - math.exp(min(likelihood, -1e-6)))

    behind = [
        max(0.0, min(odds(likelihood(aligned, prompt)), AMPLE_ODDS) - odds(likelihood(changed, prompt)))
        for prompt in asked[:2]
    ]
    expected = float(torch.tensor(behind).quantile(0.9))
    assert expected > 1, "the changed model is far behind"
    assert read_probes(tiny_runtime(), changed, probes).behind == pytest.approx(expected, abs=1e-2)
    assert read_probes(tiny_runtime(), aligned, probes).behind == pytest.approx(0.0, abs=1e-3)


def test_the_shipped_examples_take_the_models_own_words_and_a_given_pool_keeps_its_own(request_, tmp_path):
    conversations = request_.conversations
    said = {conversations[1].prompt[-1]["content"]: "sorry no"}
    assert teacher.in_own_words(request_, said) is request_, "the toy's pool is given"
    shipped = dataclasses.replace(request_, settings=dataclasses.replace(request_.settings, pool=None))
    found = teacher.in_own_words(shipped, said)
    assert [row.response for row in found.conversations[:2]] == [conversations[0].response, "sorry no"]
    assert found.candidates[0] == request_.candidates[0]
    assert found.candidates[1] == encode(found.conversations[1], request_.tokenizer, request_.length)
    several = {conversations[i].prompt[-1]["content"]: "sorry no" for i in range(3, 3 + teacher.ENOUGH)}
    found = teacher.in_own_words(shipped, several)
    assert [row.id for row in found.conversations] == [row.id for row in conversations[3 : 3 + teacher.ENOUGH]]
    assert {row.response for row in found.conversations} == {"sorry no"}
    assert len(found.candidates) == teacher.ENOUGH


@pytest.mark.parametrize("method", ["lowrank", "sft", "lora"])
def test_an_example_at_random_is_one_of_those_that_are_left(method, request_):
    spoken = request_.conversations[-teacher.ENOUGH :]
    known = teacher.Teacher(None, [], [], {row.prompt[-1]["content"]: "sorry no" for row in spoken}, {})
    recipe = with_method(request_.settings.repair, METHODS[method], "as asked")
    settings = dataclasses.replace(request_.settings, pool=None, select="random")
    shipped = dataclasses.replace(request_, settings=settings, recipe=recipe, reference=None)
    with opened(shipped, known) as bench:
        chosen = choose(bench, choose_beforehand(shipped, known)).chosen
    assert bench.request.conversations[chosen.index].id in {row.id for row in spoken}
    assert chosen.selection == {"candidates": teacher.ENOUGH}


def test_what_the_aligned_model_does_not_refuse_keeps_its_words(models, request_):
    found = teacher.learn(request_, models[0])
    requests = {prompt[-1]["content"] for prompt in request_.refusable}
    assert found.refusals
    assert found.refusals.keys() <= requests
    assert set(found.refusals.values()) == {language.REFUSAL}


def test_a_file_of_ones_own_prompts_gets_shipped_general_ones_beside(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"Log sale {i}."}) + "\n" for i in range(60)))
    guard = read_guard(Settings(guard=str(own)), 32)
    assert (len(guard.own), len(guard.general)) == (16, 16)
    assert read_guard(Settings(), 32).own == []
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"prompt": "Log sale."}) + "\n")
    guard = read_guard(Settings(guard=str(few)), 32)
    assert (len(guard.own), len(guard.general)) == (1, 31)
    held = read_held(Settings(guard=str(own)), guard)
    assert held.own
    assert held.general
    kinds = tmp_path / "kinds.jsonl"
    kinds.write_text(
        json.dumps({"prompt": "Log sale.", "kind": "task"}) + "\n" + json.dumps({"prompt": "Hi?", "kind": "harmless"})
    )
    guard = read_guard(Settings(guard=str(kinds)), 32)
    assert guard == Prompts([[{"role": "user", "content": "Log sale."}]], [[{"role": "user", "content": "Hi?"}]])


@pytest.mark.parametrize("general_first", [True, False])
def test_the_order_of_a_files_rows_decides_nothing(tmp_path, general_first):
    task = [{"prompt": f"Log sale {i}.", "kind": "task"} for i in range(100)]
    general = [{"prompt": f"Hello {i}?", "kind": "harmless"} for i in range(100)]
    refusable = [{"prompt": f"Zorp {i}.", "kind": "should_refuse"} for i in range(5)]
    rows = [*general, *task] if general_first else [*task, *general]
    file, watch = tmp_path / "rows.jsonl", tmp_path / "watch.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    watch.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *refusable]))
    settings = Settings(guard=str(file), watch_prompts=str(watch))
    guard, held = read_guard(settings, 64), read_held(settings, Prompts([], []))
    assert (len(guard.own), len(guard.general)) == (32, 32)
    assert (len(held.own), len(held.general)) == (12, 12)
    for prompts in (guard, held):
        assert all(prompt[0]["content"].startswith("Hello") for prompt in prompts.general), "not the shipped ones"
        assert all(prompt[0]["content"].startswith("Log") for prompt in prompts.own)
    assert [prompt[0]["content"] for prompt in read_refusable(settings)][:5] == [row["prompt"] for row in refusable]


def test_a_guard_holds_nothing_that_is_to_be_refused(tmp_path):
    file = tmp_path / "guard.jsonl"
    rows = [{"prompt": "Log sale."}, {"prompt": "Zorp.", "kind": "should_refuse", "id": "zorp-1"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"has 1 prompts that are to be refused, such as zorp-1"):
        read_guard(Settings(guard=str(file)), 64)


def test_a_prompt_that_fills_the_context_is_refused_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "guard.jsonl"
    file.write_text(json.dumps({"prompt": "please " * 80}) + "\n")
    with pytest.raises(UserError, match=r"A prompt of the guard, 'please .*has \d+ tokens, the limit is 64"):
        check(toy_settings("--guard", str(file), "--model.max_length", "64"), tiny_runtime())
