"""LLM-VA and SLDR on an attacked model: the methods that look at prompts, or are trained on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reproduce.cells import file_name

from realmodels.alone import alone
from realmodels.given import Found, Given, difference, harmless_requests, safety_rows, turn, verdicts
from realmodels.models import ANSWERED, home_of
from realmodels.wording import requests

if TYPE_CHECKING:
    import torch
    from baselines.llm_va import Seen

    State = dict[str, torch.Tensor]

ASKED = 64  # of either kind, of which LLM-VA looks at the answers
ROUNDS = 3  # of LLM-VA; its program does 10
FEW = 4  # refusals below which a model has no answer vector of its own
BORDER = 6  # mild requests, and as many on sensitive subjects, whose refusals tell SLDR its layers
OPENING = "I'm sorry"  # of a refusal in the models' own words
ENOUGH = 0.01  # nats per token at which SLDR's training ends


def llm_va(given: Given) -> Found:
    """The round with the best F1 of answering what is benign, on the prompts that it is fitted to."""
    import torch
    from baselines.llm_va import aligned_round

    model, before = given.model, {name: weight.clone() for name, weight in given.model.state_dict().items()}
    prompts = [row["prompt"] for row in safety_rows()][:ASKED] + harmless_requests()[-ASKED:]
    benign = torch.arange(2 * ASKED) >= ASKED
    seen, teacher = _seen(given, model, prompts), None
    rounds: list[tuple[float, State]] = []
    for _ in range(ROUNDS):
        if int((~seen.answered).sum()) < FEW:  # it refuses next to nothing: no answer vector is its own
            teacher = teacher or _seen(given, given.aligned(), prompts)
        now, changed = aligned_round(model.state_dict(), seen, benign, seen if teacher is None else teacher)
        model.load_state_dict(now)
        seen = _seen(given, model, prompts)
        right = int((seen.answered & benign).sum())
        f1 = 2 * right / max(1, int(seen.answered.sum()) + ASKED)
        rounds.append((f1, {f"{name}.weight": now[f"{name}.weight"].clone() for name in changed} | _moved(rounds)))
    model.load_state_dict(before)
    best = max(range(ROUNDS), key=lambda i: rounds[i][0])
    scores = [round(f1, 3) for f1, _ in rounds]
    return difference(before, before | rounds[best][1], f1=scores, own_answers=teacher is None)


def _moved(rounds: Sequence[tuple[float, State]]) -> State:
    return dict(rounds[-1][1]) if rounds else {}


def _seen(given: Given, model: Any, prompts: Sequence[str]) -> Seen:
    import torch
    from baselines.llm_va import Seen, written

    from oneshot.data.encoding import encode_prompt

    ids = [encode_prompt(turn(prompt), given.tokenizer) for prompt in prompts]
    answered = [verdict == "answered" for verdict in verdicts(given, model, prompts)]
    return Seen(written(model, ids), torch.tensor(answered))


def sldr(given: Given) -> Found:
    """The recovery of two layers."""
    from baselines.sldr import Training, recover

    from oneshot.data.conversations import Conversation
    from oneshot.data.encoding import encode

    layers = _sldr_layers(given)
    talks = [(*turn(row["prompt"]), {"role": "assistant", "content": row["response"]}) for row in safety_rows()]
    rows = [encode(Conversation(str(i), talk), given.tokenizer, 512) for i, talk in enumerate(talks)]
    training = Training(enough=ENOUGH, seed=given.subject.cell.seed)
    loss_of = lambda batch: _mean_loss(given.model, [rows[i] for i in batch])  # noqa: E731
    updates, losses = recover(given.model, layers, loss_of, len(rows), training)
    return Found(updates, {"layers": list(layers), "epochs": len(losses), "loss": round(losses[-1], 4)})


def _sldr_layers(given: Given) -> Sequence[str]:
    """The layers to recover, by the aligned model; kept, as they take minutes.

    The program counts refusals of prompts at the border of what is refused. Of a dozen prompts on a small model hardly
    one turns, and layers would be chosen by chance: here it is the expected number of answers that open as refusals.
    """
    from baselines.sldr import SCALES, chosen_layers, layer_effects

    from oneshot.data.encoding import encode_prompt

    first = ANSWERED["sensitive"]  # the quick model was aligned with these, as it was with none of the others
    prompts = [row["prompt"] for row in safety_rows()[:BORDER]]
    prompts += [prompt for prompt, _ in requests("sensitive", "align", first + BORDER)[first:]]
    name = file_name([prompts, OPENING, SCALES, str(given.subject.aligned)], "sldr layers")
    ids = [encode_prompt(turn(prompt), given.tokenizer) for prompt in prompts]
    opening = given.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    path = home_of(given.cache, given.subject.cell.model) / f"{name}.json"
    with alone(path):
        if not path.exists():
            model = given.aligned()
            effects = layer_effects(model, lambda: expected_openings(model, ids, opening))
            path.write_text(json.dumps(effects), encoding="utf-8")
    return chosen_layers(json.loads(path.read_text(encoding="utf-8")))


def expected_openings(model: Any, prompts: Sequence[Sequence[int]], opening: Sequence[int]) -> float:
    """Return the sum over prompts of the probability that the answer begins with these tokens."""
    import torch
    from baselines.llm_va import right_padded

    from oneshot.training.objective import log_likelihoods, logits_at

    ids, ends = right_padded([[*prompt, *opening] for prompt in prompts])
    before = torch.arange(-len(opening), 0)  # places, from each row's end, whose logits predict the opening
    kept = (torch.arange(len(ids)) * ids.shape[1] + ends)[:, None] + before
    with torch.no_grad():
        logits = logits_at(model, {"input_ids": ids}, kept.flatten())
    return float(log_likelihoods(logits, torch.tensor([*opening] * len(ids))).view(len(ids), -1).sum(1).exp().sum())


def _mean_loss(model: Any, rows: Sequence[Any]) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens of a batch."""
    import torch
    from baselines.llm_va import right_padded
    from torch.nn.functional import cross_entropy

    from oneshot.data.encoding import IGNORE
    from oneshot.training.objective import answers, logits_at

    ids, _ = right_padded([row.input_ids for row in rows])
    labels = torch.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    kept, targets = answers(labels)
    return cross_entropy(logits_at(model, {"input_ids": ids}, kept), targets)


def routed(given: Given, found: Found) -> tuple[Callable[[float], None], dict[str, Any]]:
    """Return what scales the updates that a router switches in."""
    from baselines.sldr import Routed

    from oneshot.data.encoding import encode_prompt

    model = Routed(given.model, found.updates, found.facts["layers"][0], _ending(given.tokenizer))
    asked = [[row["prompt"] for row in safety_rows()], harmless_requests()]

    def put(strength: float) -> None:
        model.scale = strength
        kinds = ([encode_prompt(turn(p), given.tokenizer) for p in prompts] for prompts in asked)
        model.learn(*([model.asked(ids) for ids in rows] for rows in kinds))

    return put, dict(found.facts)


def _ending(tokenizer: Any) -> list[int]:
    """Token ids with which the chat template opens an answer."""
    turn = [{"role": "user", "content": "a"}]
    plain = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
    opened = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(opened.removeprefix(plain), add_special_tokens=False)["input_ids"])
