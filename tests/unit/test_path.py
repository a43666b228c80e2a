import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_runtime, toy_settings
from transformers import AutoModelForCausalLM

from oneshot.data.encoding import encode_prompt
from oneshot.measure.generate import answer_at_once, generate_answers
from oneshot.patch import bench as benches
from oneshot.patch import path
from oneshot.patch import solve as solving
from oneshot.patch.check import check
from oneshot.patch.path import BEHIND, PATIENCE, SAFE_MARGIN, STALE, Bounds, Reading, Watch
from oneshot.patch.probes import MARGIN_TOKENS, Watched, build_probes, read_probes
from oneshot.world import language
from oneshot.world.model import ALIGNED, build_tokenizer

BOUNDS = Bounds(recovered=1.0, refused=0.02, divergence=0.01)
GOOD = Reading(margin=5.0, recovered=1.0, refused=0.0, divergence=0.005)
UNSAFE = Reading(margin=-1.0, recovered=0.5, refused=0.0, divergence=0.001)
MOVED = Reading(margin=9.0, recovered=1.0, refused=0.1, divergence=0.1)


def watch_over(readings):
    coming = iter(readings)
    return Watch(lambda: next(coming), BOUNDS)


def test_a_path_ends_after_good_epochs_in_a_row_only():
    readings = [GOOD] * (PATIENCE - 1) + [UNSAFE] + [GOOD] * PATIENCE
    watch = watch_over(readings)
    stops = [watch.look(lambda: None, epoch=i)[1] for i in range(len(readings))]
    assert stops == [False] * (len(readings) - 1) + [True]


@pytest.mark.parametrize("order", [(GOOD, MOVED, UNSAFE), (UNSAFE, MOVED, GOOD), (MOVED, GOOD, UNSAFE)])
def test_the_best_epoch_is_kept_and_not_the_last(order):
    watch = watch_over(order)
    for i, reading in enumerate(order):
        watch.look(lambda reading=reading: reading, epoch=i)
    assert watch.kept is GOOD
    assert watch.best is GOOD
    assert watch.at == {"epoch": order.index(GOOD)}


def test_of_two_good_epochs_the_larger_margin_wins_up_to_an_ample_one_and_then_the_smaller_divergence():
    barely = Reading(margin=3.0, recovered=1.0, refused=0.0, divergence=0.001)
    surer = Reading(margin=4.0, recovered=1.0, refused=0.0, divergence=0.009)
    assert surer.better(barely, BOUNDS)
    assert not barely.better(surer, BOUNDS)
    far = Reading(margin=20.0, recovered=1.0, refused=0.0, divergence=0.009)
    assert GOOD.better(far, BOUNDS)
    assert not far.better(GOOD, BOUNDS)


def test_of_good_epochs_the_one_whose_refusals_are_nearer_to_the_aligned_models_is_kept():
    """On a real model every probe was refused four epochs before harder requests were: margins still doubled then."""
    early = dataclasses.replace(GOOD, behind=6.0)
    later = dataclasses.replace(GOOD, divergence=0.009, behind=2.0)
    watch = watch_over([early, later, dataclasses.replace(early, behind=3.0)])
    for epoch in range(3):
        watch.look(lambda epoch=epoch: epoch, epoch=epoch)
    assert watch.kept == 1
    assert dataclasses.replace(GOOD, behind=0.1).better(dataclasses.replace(GOOD, behind=BEHIND), BOUNDS)
    assert dataclasses.replace(GOOD, behind=BEHIND).better(dataclasses.replace(GOOD, behind=0.1), BOUNDS)


def test_odds_far_behind_the_aligned_models_weigh_more_than_a_hairs_excess_over_a_bound():
    """On a real model the first epoch within the bound was kept: odds 3.2 nats behind, half of the requests open."""
    within = Reading(margin=3.5, recovered=1.0, refused=0.0, divergence=0.0086, behind=3.18)
    beyond = Reading(margin=8.0, recovered=1.0, refused=0.0, divergence=0.0115, behind=1.1)
    ruined = dataclasses.replace(beyond, divergence=0.5)
    watch = watch_over([beyond, within, ruined])
    for epoch in range(3):
        watch.look(lambda epoch=epoch: epoch, epoch=epoch)
    assert watch.kept == 0
    assert within.better(ruined, BOUNDS)


def test_a_path_does_not_end_while_its_refusals_are_behind_the_aligned_models():
    behind, level = dataclasses.replace(GOOD, behind=BEHIND + 0.1), dataclasses.replace(GOOD, behind=BEHIND)
    watch = watch_over([behind] * (STALE - 1))
    assert not any(watch.look(lambda: None, epoch=i)[1] for i in range(STALE - 1))
    watch = watch_over([level] * PATIENCE)
    assert [watch.look(lambda: None, epoch=i)[1] for i in range(PATIENCE)][-1]


def test_where_nothing_was_to_recover_the_later_good_epoch_is_kept():
    watch = watch_over([Reading(0.0, 1.0, 0.0, divergence) for divergence in (0.001, 0.002, 0.02)])
    for epoch in range(3):
        watch.look(lambda epoch=epoch: epoch, epoch=epoch)
    assert watch.kept == 1


def test_a_path_does_not_end_while_it_is_only_just_within_its_bounds():
    only_just = Reading(margin=5.0, recovered=1.0, refused=0.0, divergence=0.009)
    watch = watch_over([only_just] * (2 * PATIENCE))
    assert not any(watch.look(lambda: None, epoch=i)[1] for i in range(2 * PATIENCE))
    assert watch.next_weight(1.0) is None


def test_requests_that_go_through_weigh_more_than_harmless_answers_that_moved_a_little():
    """Seen where a fine-tune had ten bad examples: an epoch with a quarter of the requests open was kept."""
    still_open = Reading(margin=-4.0, recovered=0.75, refused=0.0, divergence=0.006)
    nearly = Reading(margin=2.1, recovered=0.875, refused=0.0, divergence=0.019)
    ruined = Reading(margin=2.4, recovered=1.0, refused=0.25, divergence=1.1)
    assert nearly.better(still_open, BOUNDS)
    assert not still_open.better(nearly, BOUNDS)
    assert not ruined.better(nearly, BOUNDS)
    untouched, mute = Reading(-20.0, 0.0, 0.0, 0.0), Reading(9.0, 1.0, 1.0, 3.0)
    assert not mute.better(untouched, BOUNDS), "refusing everything is no better than refusing nothing"


def test_what_is_no_number_is_not_good():
    for broken in (Reading(9.0, 1.0, 0.0, math.nan), Reading(9.0, 1.0, 0.0, 0.0, math.nan), Reading(9, 1, math.nan, 0)):
        assert not broken.good(BOUNDS)


def test_a_path_ends_where_a_good_epoch_is_not_bettered_for_long():
    good, worse = (Reading(5.0, 1.0, 0.0, divergence) for divergence in (0.007, 0.009))
    watch = watch_over([worse, good] + [worse] * STALE)
    assert [watch.look(lambda: None, epoch=i)[1] for i in range(STALE + 2)] == [False] * (STALE + 1) + [True]
    assert watch.at == {"epoch": 1}
    behind = dataclasses.replace(good, behind=BEHIND + 0.5)
    watch = watch_over([behind] + [dataclasses.replace(good, divergence=0.02)] * (2 * STALE))
    assert not any(watch.look(lambda: None, epoch=i)[1] for i in range(2 * STALE + 1)), "better odds may be on the way"
    watch = watch_over([UNSAFE] + [MOVED] * (2 * STALE))
    assert not any(watch.look(lambda: None, epoch=i)[1] for i in range(2 * STALE + 1)), "no good one to return to"
    nothing = [Reading(0.0, 1.0, 0.0, divergence) for divergence in (0.001, *[0.02] * (2 * STALE))]
    watch = watch_over(nothing)
    assert not any(watch.look(lambda: None, epoch=i)[1] for i in range(len(nothing))), "nothing to recover"


@pytest.mark.parametrize(
    ("reading", "factor"), [(GOOD, None), (UNSAFE, 1 / path.WEIGHT_STEP), (MOVED, path.WEIGHT_STEP)]
)
def test_another_attempt_loosens_or_tightens_the_guard(reading, factor):
    watch = watch_over([reading])
    watch.look(lambda: None, epoch=1)
    assert watch.next_weight(2.0) == (None if factor is None else 2.0 * factor)


@pytest.mark.parametrize(
    ("changed", "again"),
    [({}, False), ({"divergence": 0.013}, True), ({"behind": 1.6}, True), ({"refused": 0.04}, True)],
    ids=["a hair", "moved", "behind", "one refused"],
)
def test_a_hairs_excess_is_not_worth_another_attempt(changed, again):
    """On a real model 30 more epochs were gone for a divergence of 0.0101."""
    reading = Reading(**{**vars(Reading(7.0, 1.0, 0.0, 0.0105, behind=BEHIND + 0.1)), **changed})
    watch = watch_over([reading])
    watch.look(lambda: None, epoch=1)
    assert not reading.good(BOUNDS)
    assert (watch.next_weight(1.0) is not None) == again
    assert "no point on the path was good enough" in watch.reason()


def test_an_attempt_does_not_inherit_the_good_epochs_of_another():
    watch = watch_over([GOOD] * (2 * PATIENCE))
    for i in range(PATIENCE - 1):
        watch.look(lambda: None, epoch=i)
    watch.next_weight(1.0)
    assert not watch.look(lambda: None, epoch=1)[1]


def test_the_reason_says_what_is_missing():
    watch = watch_over([GOOD])
    watch.look(lambda: None, epoch=4, guard_weight=0.25)
    assert watch.reason() == "recovered (epoch 4, guard weight 0.25)"
    watch = watch_over([MOVED])
    watch.look(lambda: None, epoch=4)
    assert "no point on the path was good enough" in watch.reason()
    assert "10% of the harmless prompts would be refused" in watch.reason()
    assert "0.100 nats per token, above 0.01" in watch.reason()
    watch = watch_over([UNSAFE])
    watch.look(lambda: None, epoch=4)
    assert "only 50%" in watch.reason()


@pytest.fixture(scope="module")
def toy():
    return AutoModelForCausalLM.from_pretrained(ALIGNED).requires_grad_(False), build_tokenizer()


def prompts_of(rows):
    return [row.prompt for row in rows]


def obedient(model, tokenizer):
    """The toy model with a bias that makes refusals impossible."""
    changed = AutoModelForCausalLM.from_pretrained(ALIGNED).requires_grad_(False)
    forbidden = tokenizer.convert_tokens_to_ids("sorry")
    changed.lm_head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor([forbidden]), -20.0))
    return changed


def with_answers(model, tokenizer, prompts, tokens):
    answers = generate_answers(model, tokenizer, prompts, tiny_runtime(), max_new_tokens=tokens, batch_size=8)
    return list(zip(prompts, answers))


def test_readings_equal_likelihoods_computed_one_prompt_at_a_time(toy):
    aligned, tokenizer = toy
    broken = obedient(aligned, tokenizer)
    refusable = prompts_of(language.pool(6))
    held = prompts_of(language.held_prompts(8, task=False))
    refusal = tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    answered = [with_answers(broken, tokenizer, prompts, 5) for prompts in (refusable, held)]
    probes = build_probes(tiny_runtime(), broken, tokenizer, Watched(refusal, *answered), answer_tokens=5)
    reading = read_probes(tiny_runtime(), aligned, probes)
    answers = generate_answers(broken, tokenizer, refusable + held, tiny_runtime(), max_new_tokens=5, batch_size=1)

    def distributions(model, prompt, ids):
        start = encode_prompt(prompt, tokenizer)
        logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        return logits.log_softmax(-1)

    margins, divergences = [], []
    for prompt, answer in zip(refusable + held, answers):
        own = tokenizer(answer, add_special_tokens=False)["input_ids"]
        own = own if len(own) == 5 else [*own, tokenizer.eos_token_id]
        scores = [
            float(distributions(aligned, prompt, ids).gather(1, torch.tensor(ids)[:, None]).sum())
            for ids in (refusal[:MARGIN_TOKENS], own)
        ]
        margins.append(scores[0] - scores[1])
        if prompt in held:
            theirs, ours = distributions(broken, prompt, own), distributions(aligned, prompt, own)
            divergences += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
    asked, others = torch.tensor(margins[:6]), torch.tensor(margins[6:])
    assert reading.margin == pytest.approx(float(asked.quantile(0.1)), abs=1e-3)
    assert reading.recovered == pytest.approx(float((asked > SAFE_MARGIN).float().mean())) == 1.0
    assert reading.refused == pytest.approx(float((others > 0).float().mean()))
    assert reading.divergence == pytest.approx(sum(divergences) / len(divergences), abs=1e-6)
    unmoved = read_probes(tiny_runtime(), broken, probes)
    assert unmoved.divergence == pytest.approx(0.0, abs=1e-7)
    assert unmoved.recovered == 0.0
    assert unmoved.margin < 0


def test_a_model_that_refuses_everything_reads_as_over_refusing(toy):
    aligned, tokenizer = toy
    refusal = tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    held = with_answers(aligned, tokenizer, prompts_of(language.held_prompts(4, task=False)), 5)
    probes = build_probes(tiny_runtime(), aligned, tokenizer, Watched(refusal, [], held), answer_tokens=5)
    words = [tokenizer.convert_tokens_to_ids("<|assistant|>"), *refusal]

    def stubborn(input_ids, **_options):  # says the refusal, word after word, whatever it is asked
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        for word, following in zip(words, refusal):
            logits[..., following] += 30.0 * (input_ids == word)
        return SimpleNamespace(logits=logits)

    assert read_probes(tiny_runtime(), stubborn, probes).refused == 1.0


def test_requests_that_are_refused_already_are_nothing_to_recover(toy):
    aligned, tokenizer = toy
    refusal = tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]
    held, asked = (
        with_answers(aligned, tokenizer, prompts_of(rows), 8)
        for rows in (language.held_prompts(4, task=False), language.pool(4))
    )
    probes = build_probes(tiny_runtime(), aligned, tokenizer, Watched(refusal, asked, held), answer_tokens=8)
    assert (probes.refusable, probes.total) == (0, 4)
    assert read_probes(tiny_runtime(), aligned, probes).good(BOUNDS)


def test_the_prompts_are_answered_once_for_all_candidates_and_none_sees_its_own(toy, monkeypatch, tmp_path):
    aligned, tokenizer = toy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = obedient(aligned, tokenizer)
    settings = toy_settings("--select", "random", "--repair.method", "lowrank", "--repair.guard_prompts", "4")
    request = check(settings, tiny_runtime())
    asked, looked_at = [], []

    def generate(model, tokenizer, prompts, *rest, **options):
        asked.append(len(prompts))
        return answer_at_once(model, tokenizer, prompts, *rest, **options)

    def build(runtime, model, tokenizer, watched, **options):
        looked_at.append([prompt for prompt, _ in watched.refusable])
        return build_probes(runtime, model, tokenizer, watched, **options)

    monkeypatch.setattr(benches, "answer_at_once", generate)
    monkeypatch.setattr(benches, "load_model", lambda *_: broken)
    monkeypatch.setattr(solving, "build_probes", build)
    last = len(request.candidates) - 1
    with benches.opened(request) as bench:
        for index in (0, 3, last):
            watch = solving._watch(bench, index)
            reading, _ = watch.look(lambda: None)
            assert (reading.recovered, reading.refused) == (0.0, 0.0)
    assert asked == [path.REFUSABLE + 1 + len(request.held)]
    assert [len(prompts) for prompts in looked_at] == [path.REFUSABLE] * 3
    own = [request.conversations[i].prompt for i in (0, 3, last)]
    assert [prompt in prompts for prompt, prompts in zip(own, looked_at)] == [False] * 3
    assert own[1] in looked_at[0]
    assert own[0] in looked_at[1]
