"""The output head runs on the places that count only, and losses stay what they are with all logits."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model, tiny_runtime

from oneshot.data.encoding import IGNORE
from oneshot.measure.generate import generate_answers
from oneshot.patch.guard import build_batch, laid, repair_loss
from oneshot.patch.objective import RefusalRows, aligned_logits, evaluate, passes, row_losses
from oneshot.patch.probes import Watched, build_probes, read_probes
from oneshot.patch.select import hardest
from oneshot.training import objective
from oneshot.training.objective import kl_sum, log_likelihoods, logits_at
from oneshot.world import language
from oneshot.world.model import ALIGNED, build_tokenizer

EVERY = (*FAMILIES, "gemma2")
INPUTS = {"input_ids": torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kept", [torch.tensor([2, 3, 11, 26]), torch.tensor([[0, 8], [9, 9], [20, 26]])])
def test_logits_at_places_are_those_of_the_whole_pass(family, kept):
    model = tiny_model(family)
    with torch.no_grad():
        wanted = model(**INPUTS).logits.flatten(0, 1)[kept]
        found = logits_at(model, INPUTS, kept)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert found.shape == (*kept.shape, wanted.shape[-1])
    assert not model.get_output_embeddings()._forward_pre_hooks, "nothing stays behind"


def test_a_soft_cap_is_applied_to_them():
    """Gemma-2 caps its logits after the head; the tiny one's cap bites."""
    model, kept = tiny_model("gemma2"), torch.tensor([1, 5])
    with torch.no_grad():
        capped, uncapped = logits_at(model, INPUTS, kept), None
        model.config.final_logit_softcapping = None
        uncapped = logits_at(model, INPUTS, kept)
    assert float(capped.abs().max()) <= 2.0
    assert float(uncapped.abs().max()) > 2.5


class ByKeyword(torch.nn.Module):
    """A model that calls its head by keyword."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = torch.nn.Linear(32, 40)
        self.head.forward = lambda states=None, given=self.head.weight: torch.nn.functional.linear(states, given)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_options):
        return SimpleNamespace(logits=self.head(states=self.model.model(input_ids).last_hidden_state))


def test_a_head_that_is_called_by_keyword_or_is_no_module_still_gives_them():
    model, kept = tiny_model("llama"), torch.tensor([1, 5])
    wanted = logits_at(model, INPUTS, kept)
    torch.testing.assert_close(logits_at(lambda **options: model(**options), INPUTS, kept), wanted)
    other = ByKeyword(model)
    torch.testing.assert_close(logits_at(other, INPUTS, kept), other(**INPUTS).logits.flatten(0, 1)[kept])


def seen_by_the_head(model, work):
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    work()
    hook.remove()
    return [shape[:-1].numel() for shape in seen]


def test_the_head_sees_only_what_is_needed_in_loss_watch_guard_and_selection():
    model, runtime, tokenizer = tiny_model("llama").requires_grad_(False), tiny_runtime(), build_tokenizer()
    batch = tiny_batch(model, guard=4)
    needed = len(batch.kept)
    assert needed < int(batch.real.sum()) / 2
    assert seen_by_the_head(model, lambda: repair_loss(model, batch, 1.0, 1)) == [needed]
    prompts = [row.prompt for row in language.held_prompts(4, task=False)]
    answers = generate_answers(model, tokenizer, prompts, runtime, max_new_tokens=4, batch_size=4)
    asked = [(prompt, "of course") for prompt in prompts[:2]]
    refusal = tokenizer(language.REFUSAL, add_special_tokens=False)["input_ids"]

    def probes():
        return build_probes(
            runtime, model, tokenizer, Watched(refusal, asked, list(zip(prompts, answers))), answer_tokens=4
        )

    kept = len(probes().kept)
    assert kept == len(set(probes().kept.tolist())), "each once"
    assert seen_by_the_head(model, probes)[-1] == kept
    assert seen_by_the_head(model, lambda: read_probes(runtime, model, probes()))[-1] == kept
    rows = [batch.example, batch.example]
    answer = 2 * batch.example.answer_tokens()
    assert seen_by_the_head(model, lambda: hardest(runtime, model, rows, 0)) == [answer]
    assert seen_by_the_head(model, lambda: aligned_logits(runtime, rows, ALIGNED, "x", 0, model)) == [answer]
    harm = RefusalRows([0, 1], rows)
    assert seen_by_the_head(model, lambda: evaluate(runtime, model, harm, batch, 0)) == [answer, needed]
    guard = build_batch(runtime, model, tokenizer, batch.example, prompts, answer_tokens=4)
    built = seen_by_the_head(
        model, lambda: build_batch(runtime, model, tokenizer, batch.example, prompts, answer_tokens=4)
    )
    assert built[-1] == len(guard.kept) - len(guard.targets), "the reference"


@pytest.mark.parametrize("family", EVERY)
def test_the_repairs_loss_is_that_of_all_logits(family):
    model, moved = tiny_model(family), tiny_model(family, seed=1)
    built = tiny_batch(model, guard=5)
    batch = laid(built.example, built.guard, None, 0, torch.device("cpu"))
    held = batch.kept[len(batch.targets) :]
    with torch.no_grad():
        reference = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[held]
        batch = dataclasses.replace(batch, reference=reference, held_total=len(held))
        share, example, kl = repair_loss(moved, batch, 0.5, 2, temperature=1.5)
        logits = moved(**batch.inputs, use_cache=False).logits
    labels = torch.full_like(batch.inputs["input_ids"], IGNORE)
    labels[0, : len(batch.example.labels)] = torch.tensor(batch.example.labels)
    wanted = objective.cross_entropy_sum(logits / 1.5, labels) / batch.example.answer_tokens()
    ours, theirs = logits.flatten(0, 1)[held].log_softmax(-1), reference.log_softmax(-1)
    distance = torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True) / len(held)
    found = torch.stack([example, kl, share])
    torch.testing.assert_close(found, torch.stack([wanted, distance, wanted / 2 + 0.5 * distance]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("elements", [1, 100, 1 << 22])
def test_the_divergence_and_its_gradient_are_torchs_however_it_is_cut(monkeypatch, elements):
    monkeypatch.setattr(objective, "ELEMENTS", elements)
    draw = torch.Generator().manual_seed(1)
    logits, reference = (3 * torch.randn(7, 33, generator=draw, dtype=torch.float64) for _ in range(2))
    one, other = (logits.clone().requires_grad_(True) for _ in range(2))
    found = kl_sum(one, reference)
    wanted = torch.nn.functional.kl_div(
        other.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True
    )
    (0.3 * found).backward()
    (0.3 * wanted).backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    targets = torch.randint(0, 33, (7,), generator=draw)
    by_hand = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(log_likelihoods(logits, targets), by_hand, rtol=1e-6, atol=0)
    assert float(kl_sum(logits[:0], reference[:0])) == 0.0


def test_rows_of_selection_with_answers_of_different_lengths():
    """Padded places count for nothing; answers need not be at the end."""
    model = tiny_model("llama")
    first = tiny_batch(model).example
    shorter = dataclasses.replace(first, labels=[*first.labels[:-3], IGNORE, first.labels[-2], IGNORE])
    for part in passes(tiny_runtime(), [first, shorter], 0):
        found = row_losses(model, part, None)
        whole = row_losses(model, part, None, whole=True)
        for place, loss, other in zip(part.places, found, whole):
            row = (first, shorter)[place]
            logits, labels = model(torch.tensor([row.input_ids])).logits, torch.tensor([row.labels])
            wanted = objective.cross_entropy_sum(logits, labels)
            torch.testing.assert_close(torch.stack([loss, other]), wanted.repeat(2), rtol=1e-5, atol=0)
