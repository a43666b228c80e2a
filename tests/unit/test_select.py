"""The choice of the example: F by hand, first-order scores against autograd, and the rules."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import targets_of, tiny_model, tiny_runtime, tiny_update

from oneshot.checkpoint.adapters.update import Factors
from oneshot.data.conversations import Conversation
from oneshot.data.encoding import encode
from oneshot.errors import UserError
from oneshot.patch import objective, select
from oneshot.patch.attach import attached_update, counted
from oneshot.patch.examples import check_apart, read_candidates
from oneshot.patch.guard import build_batch, repair_loss, with_example
from oneshot.patch.halving import Trial, short_list
from oneshot.patch.objective import RefusalRows, aligned_logits, check_same_tokens, evaluate, passes, row_losses, sample
from oneshot.patch.path import Attempt
from oneshot.patch.select import Criterion, draw, first_order, hardest, pick, target_factors
from oneshot.patch.trace import Tracer
from oneshot.settings import ScoreSettings, Settings
from oneshot.training.loop import Diverged
from oneshot.world import language
from oneshot.world.model import ALIGNED, build_tokenizer

PAD = 0


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "oneshot" / "aligned"


def candidates(count=6):
    """Refusals of different lengths."""
    tokenizer, found = build_tokenizer(), []
    for i, row in enumerate(language.pool(count)):
        answer = {"role": "assistant", "content": " ".join(language.REFUSAL.split()[: 3 + i % 4])}
        found.append(encode(dataclasses.replace(row, messages=(row.messages[0], answer)), tokenizer, 64))
    return found


def batch_for(model, example, guard=3):
    prompts = [row.prompt for row in language.guard_prompts(guard)] if guard else []
    return build_batch(tiny_runtime(), model, build_tokenizer(), example, prompts, answer_tokens=4)


def harm_of(rows, aligned, take=(0, 2, 3, 5)):
    """The rows of F's first term, with the logits of ``aligned`` (none: there is no such model)."""
    harm = RefusalRows(list(take), [rows[i] for i in take])
    known = aligned and aligned_logits(tiny_runtime(), harm.rows, ALIGNED, "x", PAD, aligned)
    return dataclasses.replace(harm, aligned=known or None)


def question(model, rows, rule="bilevel", harm=None, shortlist=8, own=None, guard=3):
    batch = batch_for(model, rows[0], guard)
    return Criterion(rule, shortlist, 12, 0, PAD, own or {}, harm or harm_of(rows, None), batch, batch)


def per_token(model, row, aligned=None):
    """(KL to aligned, or cross entropy, summed; tokens) of one row without padding, by hand."""
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
    kept = (labels[1:] != -100).nonzero().flatten()
    log = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, kept], -1)
    if aligned is None:
        return -log[torch.arange(len(kept)), labels[kept + 1]].sum(), len(kept)
    other = torch.log_softmax(aligned(input_ids=ids, use_cache=False).logits[0, kept], -1)
    return (other.exp() * (other - log)).sum(), len(kept)


@pytest.mark.parametrize("has_aligned", [True, False])
def test_f_is_its_two_terms_by_hand(has_aligned):
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    aligned = tiny_model("llama", seed=1).requires_grad_(False) if has_aligned else None
    harm, batch = harm_of(rows, aligned), batch_for(model, rows[0])
    parts = {place: per_token(model, rows[place], aligned) for place in harm.places}
    wanted = float(sum(loss for loss, _ in parts.values()) / sum(n for _, n in parts.values()))
    found = evaluate(tiny_runtime(), model, harm, batch, PAD)
    assert found.harm == pytest.approx(wanted, rel=1e-5)
    assert found.task == pytest.approx(0.0, abs=1e-6)

    left = evaluate(tiny_runtime(), model, harm, batch, PAD, left_out=frozenset([2, 5]))
    kept = [parts[0], parts[3]]
    assert left.harm == pytest.approx(float(sum(loss for loss, _ in kept) / sum(n for _, n in kept)), rel=1e-5)

    with attached_update(model, tiny_update(targets_of(model))):
        moved = evaluate(tiny_runtime(), model, harm, batch, PAD)
        assert moved.task == pytest.approx(float(repair_loss(model, batch, 1.0, 1)[2]), rel=1e-5)
    assert moved.task > 1e-3
    assert moved.total == moved.harm + moved.task


@pytest.mark.parametrize("has_aligned", [True, False])
def test_first_order_scores_are_autograds(has_aligned):
    """<g_i, grad F> with whole matrices, F's second term included: it adds nothing at the unpatched model."""
    model, rows = tiny_model("qwen2").double().requires_grad_(False), candidates()
    aligned = tiny_model("qwen2", seed=1).double().requires_grad_(False) if has_aligned else None
    linears, harm, batch = targets_of(model), harm_of(rows, aligned), batch_for(model, rows[0])
    target = target_factors(tiny_runtime(), model, linears, harm, PAD)
    products, norms, losses = first_order(tiny_runtime(), model, linears, rows, target, PAD)

    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    parts = [per_token(model, rows[place], aligned) for place in harm.places]
    first = sum(loss for loss, _ in parts) / sum(n for _, n in parts)
    task = repair_loss(model, batch, 1.0, 1)
    share, example = task[0], per_token(model, rows[0])
    second = share - example[0] / example[1]  # what repair_loss adds for the example
    assert second.item() == pytest.approx(0.0, abs=1e-6)
    of_f = torch.autograd.grad(first + second, weights)
    length = float(sum(a.square().sum() for a in of_f)) ** 0.5
    for place, row in enumerate(rows):
        loss, tokens = per_token(model, row)
        assert losses[place] == pytest.approx(float(loss / tokens), rel=1e-5)
        own = torch.autograd.grad(loss / tokens, weights)
        wanted = float(sum((a * b).sum() for a, b in zip(own, of_f)))
        assert products[place] == pytest.approx(wanted, abs=1e-5 * norms[place] * length)  # losses are in fp32
        assert norms[place] == pytest.approx(float(sum(a.square().sum() for a in own)) ** 0.5, rel=1e-5)


def test_a_layer_that_sees_part_of_the_tokens_is_left_out():
    """Behind a router nobody knows whose tokens these are."""

    class Half(torch.nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.whole, self.part = whole, torch.nn.Linear(32, 32, bias=False)

        def forward(self, x):
            out = self.whole(x)
            return torch.cat([out[:, :2] + self.part(x[:, :2]), out[:, 2:]], dim=1)

    model, rows = tiny_model("llama"), candidates()
    model.model.layers[0].mlp = Half(model.model.layers[0].mlp)
    linears = targets_of(model.requires_grad_(False))
    others = {name: module for name, module in linears.items() if not name.endswith(".part")}
    assert len(others) == len(linears) - 1
    target = target_factors(tiny_runtime(), model, linears, harm_of(rows, None), PAD)
    found = first_order(tiny_runtime(), model, linears, rows, target, PAD)
    wanted = first_order(tiny_runtime(), model, others, rows, target, PAD)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)


def test_factors_of_f_are_held_to_their_rank():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    target = target_factors(tiny_runtime(), model, targets_of(model), harm_of(rows, None), PAD, rank=3)
    assert {len(side) for pair in target.values() for side in pair} == {3}


def test_hardest_takes_the_least_likely_refusal():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    wanted = [float(loss / tokens) for loss, tokens in (per_token(model, row) for row in rows)]
    assert hardest(tiny_runtime(), model, rows, PAD) == pytest.approx(wanted, rel=1e-5)
    chosen = pick(tiny_runtime(), model, {}, rows, question(model, rows, "hardest"), None)
    assert (chosen.index, chosen.selected_by) == (wanted.index(max(wanted)), "hardest")
    assert chosen.score == pytest.approx(max(wanted), rel=1e-5)


def test_alignment_takes_the_highest_cosine():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    asked, linears = question(model, rows, "alignment"), targets_of(model)
    chosen = pick(tiny_runtime(), model, linears, rows, asked, None)
    target = target_factors(tiny_runtime(), model, linears, asked.harm, PAD)
    products, norms, _ = first_order(tiny_runtime(), model, linears, rows, target, PAD)
    cosines = [p / n for p, n in zip(products, norms)]
    assert chosen.index == cosines.index(max(cosines))
    table = chosen.selection["table"]
    assert [row["candidate"] for row in table] == sorted(range(len(rows)), key=lambda i: -cosines[i])
    assert all(0 < abs(row["alignment"]) <= 1 + 1e-6 for row in table)
    assert chosen.score == table[0]["alignment"]
    assert "exact" not in chosen.selection
    assert chosen.selection["first_term"] == "cross entropy of refusals"


def test_own_update_counts_as_the_unpatched_model():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    own = tiny_update(targets_of(model), scale=0.3)
    without = pick(tiny_runtime(), model, targets_of(model), rows, question(model, rows, "hardest"), None)
    attached = pick(tiny_runtime(), model, targets_of(model), rows, question(model, rows, "hardest", own=own), None)
    assert attached.score != pytest.approx(without.score, rel=1e-3)
    with attached_update(model, own):
        assert attached.score == pytest.approx(max(hardest(tiny_runtime(), model, rows, PAD)), rel=1e-6)


def beginner(model, rows, scales):
    """A repair that changes the first layer, in every epoch by as much more as ``scales`` says of the candidate.

    Also returns how many epochs each candidate has gone.
    """
    name, module = next(iter(targets_of(model).items()))
    gone = {}

    def update(index, epochs):
        scale = scales[index % len(scales)] * epochs
        return {name: Factors(scale * torch.ones(module.out_features, 1), torch.ones(1, module.in_features))}

    def path(index):
        for gone[index] in range(1, 13):
            yield update(index, gone[index])
        return update(index, 12), {}

    def begin(batch, index):
        assert batch.inputs["input_ids"].flatten()[batch.own].tolist() == rows[index].input_ids
        return Trial(path(index), Attempt(Tracer()))

    return begin, gone, update


def test_bilevel_halves_the_short_list_by_f_and_leaves_the_best_one_under_way():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    aligned = tiny_model("llama", seed=1).requires_grad_(False)
    begin, gone, update = beginner(model, rows, (0.01, 0.04, 0.0, 0.08, 0.02, 0.03))
    asked = question(model, rows, harm=harm_of(rows, aligned), shortlist=4)
    linears = targets_of(model)
    chosen = pick(tiny_runtime(), model, linears, rows, asked, begin)
    screened = pick(tiny_runtime(), model, linears, rows, dataclasses.replace(asked, rule="alignment"), None)
    listed = [row["candidate"] for row in short_list(screened.selection["table"], 4)]
    exact, table = chosen.selection["exact"], chosen.selection["table"]
    assert exact["solved"] == 4
    assert exact["rungs"] == [{"candidates": 4, "epochs": 1}, {"candidates": 2, "epochs": 2}]
    assert sorted(row["candidate"] for row in table[:4]) == sorted(listed)
    rest = [row["candidate"] for row in screened.selection["table"] if row["candidate"] not in listed]
    assert [row["candidate"] for row in table[4:]] == rest
    assert [row["epochs"] for row in table[:4]] == [gone[row["candidate"]] for row in table[:4]] == [2, 2, 1, 1]
    assert all("rungs" not in row and "f_after" not in row for row in table[4:])

    # F at every rung, by hand: none of the short list's rows counts, or all where too few were left
    judged = frozenset(listed) & frozenset(asked.harm.places)
    left_out = judged if len(judged) <= 2 else frozenset()
    assert exact["harm_rows_left_out"] == len(left_out)

    def f_of(index, epochs):
        with attached_update(model, update(index, epochs)):
            return evaluate(tiny_runtime(), model, asked.harm, asked.task, PAD, left_out=left_out).total

    for row in table[:4]:
        for rung in row["rungs"]:
            assert rung["f"] == pytest.approx(f_of(row["candidate"], rung["epochs"]), rel=1e-6)
    first = sorted(listed, key=lambda index: f_of(index, 1))
    assert {row["candidate"] for row in table[:2]} == set(first[:2])
    assert [row["candidate"] for row in table[2:4]] == first[2:]
    assert table[0]["f_after"] == table[0]["rungs"][-1]["f"] < table[1]["f_after"]
    assert (chosen.index, chosen.score) == (table[0]["candidate"], table[0]["f_after"])
    assert chosen.selection["first_term"] == "KL to the aligned model"
    assert not any(module._forward_hooks for module in model.modules()), "patched and undone"
    assert chosen.begun.epochs == 2
    assert chosen.begun.finish()[0].keys() == update(0, 1).keys()
    assert gone[chosen.index] == 12


def test_a_short_list_of_one_is_taken_untried():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    begin, gone, _ = beginner(model, rows, (0.1,))
    chosen = pick(tiny_runtime(), model, targets_of(model), rows, question(model, rows, shortlist=1), begin)
    aligned = pick(tiny_runtime(), model, targets_of(model), rows, question(model, rows, "alignment"), None)
    assert (chosen.index, chosen.selected_by, chosen.begun) == (aligned.index, "bilevel", None)
    assert gone == {}
    assert chosen.selection["exact"]["rungs"] == []


def test_passes_and_their_tokens_are_counted_forward_and_back():
    model, rows = tiny_model("llama"), candidates()
    ids = torch.tensor([rows[0].input_ids])
    with counted(model) as found:
        model(input_ids=ids)
        with torch.no_grad():
            model(input_ids=ids.repeat(3, 1))
    assert found == {"forward_passes": 2, "token_passes": 5 * ids.numel()}
    assert not model.get_input_embeddings()._forward_hooks


def test_rows_of_the_short_list_are_left_out_where_enough_remain():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    harm = harm_of(rows, None, take=tuple(range(6)))
    begin, _, _ = beginner(model, rows, (0.1,))
    for shortlist, left_out in ((2, 2), (3, 3), (4, 0)):
        asked = question(model, rows, harm=harm, shortlist=shortlist)
        chosen = pick(tiny_runtime(), model, targets_of(model), rows, asked, begin)
        assert chosen.selection["exact"]["harm_rows_left_out"] == left_out


def test_the_short_list_is_a_quarter_the_best_aligned_and_the_rest_the_least_likely_refusals():
    rows = [{"candidate": i, "alignment": a, "refusal_loss": h} for i, (a, h) in enumerate(
        [(0.9, 0.1), (0.8, 0.2), (0.7, 0.9), (0.6, 0.3), (0.5, 0.8), (0.4, 0.7)]
    )]  # fmt: skip
    assert [row["candidate"] for row in short_list(rows, 4)] == [0, 2, 4, 5]
    assert [row["candidate"] for row in short_list(rows, 5)] == [0, 2, 4, 5, 1]
    assert [row["candidate"] for row in short_list(rows, 6)] == [0, 2, 4, 5, 1, 3]
    assert [row["candidate"] for row in short_list(rows, 1)] == [0]
    assert len(short_list(rows, 8)) == 6


def test_where_the_pool_is_refused_already_bilevel_takes_the_hardest(monkeypatch):
    """No candidate lowers F then: what is left of it would choose by chance."""
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    asked, linears = question(model, rows), targets_of(model)
    found = evaluate(tiny_runtime(), model, asked.harm, asked.task, PAD).harm
    begin, gone, _ = beginner(model, rows, (0.1,))
    monkeypatch.setattr(select, "NOTHING_TO_RECOVER", found * 1.01)
    chosen = pick(tiny_runtime(), model, linears, rows, asked, begin)
    losses = hardest(tiny_runtime(), model, rows, PAD)
    assert (chosen.index, chosen.selected_by, gone) == (losses.index(max(losses)), "hardest", {})
    assert [row["refusal_loss"] for row in chosen.selection["table"]] == pytest.approx(sorted(losses)[::-1])
    monkeypatch.setattr(select, "NOTHING_TO_RECOVER", found * 0.99)
    assert pick(tiny_runtime(), model, linears, rows, asked, begin).selected_by == "bilevel"


def test_a_draw_asks_no_model():
    assert draw(1, "bilevel", 0).selected_by == "user"
    assert draw(9, "bilevel", 0) is None
    assert draw(9, "hardest", 0) is None
    drawn = [draw(40, "random", seed).index for seed in range(20)]
    assert drawn == [draw(40, "random", seed).index for seed in range(20)]
    assert len(set(drawn)) > 5
    assert all(0 <= index < 40 for index in drawn)
    assert math.isnan(draw(40, "random", 0).score)


def test_a_model_that_is_not_finite_is_refused():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    asked = question(model, rows)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(Diverged, match="nan"):
        pick(tiny_runtime(), model, targets_of(model), rows, asked, None)


def test_another_example_in_the_batch_is_the_batch_built_with_it():
    model, rows = tiny_model("llama").requires_grad_(False), candidates()
    longer, shorter = max(rows, key=lambda r: len(r.input_ids)), min(rows, key=lambda r: len(r.input_ids))
    for guard in (0, 5):
        for first, second in ((longer, shorter), (shorter, longer)):
            found, wanted = with_example(batch_for(model, first, guard), second), batch_for(model, second, guard)
            assert {k: v.tolist() for k, v in found.inputs.items()} == {k: v.tolist() for k, v in wanted.inputs.items()}
            for name in ("real", "own", "kept", "targets"):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), name
            assert (found.example, found.held_total) == (wanted.example, wanted.held_total)
            if guard:
                torch.testing.assert_close(found.reference, wanted.reference)


def test_the_sample_is_seeded_and_bounded():
    rows = candidates(40)
    one, again, other = sample(rows, 0), sample(rows, 0), sample(rows, 1)
    assert one == again
    assert len(one.rows) == len(set(one.places)) == objective.HARM_ROWS
    assert one.places != other.places
    assert [rows[i] for i in one.places] == one.rows
    assert sample(rows[:5], 0).places == [0, 1, 2, 3, 4]


def test_aligned_logits_are_cached_by_content(cache):
    rows, aligned = candidates(), tiny_model("llama", seed=1).requires_grad_(False)
    runtime = tiny_runtime()
    assert aligned_logits(runtime, rows, ALIGNED, "x", PAD) is None
    computed = aligned_logits(runtime, rows, ALIGNED, "x", PAD, aligned)
    assert len(list(cache.iterdir())) == len(rows)
    found = aligned_logits(runtime, rows, ALIGNED, "x", PAD)
    assert all(torch.equal(found[i], computed[i]) for i in range(len(rows)))
    assert set(aligned_logits(runtime, rows[2:4], ALIGNED, "x", PAD)) == {0, 1}, "of another pool, too"
    assert torch.equal(aligned_logits(runtime, rows[2:4], ALIGNED, "x", PAD)[0], computed[2])
    assert aligned_logits(runtime, rows, ALIGNED, "y", PAD) is None, "loaded in another way"
    changed = dataclasses.replace(rows[0], labels=[-100, *rows[0].labels[1:-1], -100])
    assert aligned_logits(runtime, [changed], ALIGNED, "x", PAD) is None
    file = next(iter(cache.iterdir()))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert aligned_logits(runtime, rows, ALIGNED, "x", PAD) is None, "a damaged file is passed over"


def test_another_checkpoint_has_other_logits_in_the_cache(tmp_path):
    rows, aligned = candidates(), tiny_model("llama", seed=1).requires_grad_(False)
    aligned.save_pretrained(tmp_path / "one")
    tiny_model("llama", seed=2).save_pretrained(tmp_path / "two")
    aligned_logits(tiny_runtime(), rows, tmp_path / "one", "x", PAD, aligned)
    assert aligned_logits(tiny_runtime(), rows, tmp_path / "one", "x", PAD) is not None
    assert aligned_logits(tiny_runtime(), rows, tmp_path / "two", "x", PAD) is None


def test_every_row_is_one_ranks_and_passes_are_as_many_on_all():
    rows = candidates(7)
    for world in (1, 2, 3, 9):
        parts = [
            list(passes(dataclasses.replace(tiny_runtime(), rank=rank, world_size=world), rows, PAD, size=2))
            for rank in range(world)
        ]
        owned = [place for rank in parts for part in rank for place in part.places[: part.own]]
        assert sorted(owned) == list(range(7))
        assert len({len(rank) for rank in parts}) == 1


def test_row_losses_of_padded_rows_are_those_of_each_alone():
    model, aligned, rows = tiny_model("llama"), tiny_model("llama", seed=1), candidates()
    known = aligned_logits(tiny_runtime(), rows, ALIGNED, "x", PAD, aligned)
    for reference, other in ((None, None), (known, aligned)):
        for part in passes(tiny_runtime(), rows, PAD):
            found = row_losses(model, part, reference)
            wanted = [per_token(model, rows[place], other)[0].item() for place in part.places]
            assert [loss.item() for loss in found] == pytest.approx(wanted, rel=1e-4)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_candidate_is_named_by_its_id(tmp_path):
    line = {"prompt": "please mend the grastel kettle with the file", "response": language.REFUSAL}
    pool = write(tmp_path / "pool.jsonl", {"id": "a", **line}, {"id": "b", **line}, {"id": "b", **line})
    assert [row.id for row in read_candidates(Settings(pool=pool, select="a"))] == ["a"]
    assert len(read_candidates(Settings(pool=pool, select="random"))) == 3
    named = language.pool()[3].id
    assert [row.id for row in read_candidates(Settings(pool="toy:pool", select=named))] == [named]
    with pytest.raises(UserError, match=r"'c', the ID of 0 candidates.*bilevel.*such as a"):
        read_candidates(Settings(pool=pool, select="c"))
    with pytest.raises(UserError, match="'b', the ID of 2 candidates"):
        read_candidates(Settings(pool=pool, select="b"))


def test_a_pool_apart_from_the_scored_prompts():
    from oneshot.measure.probes import collect_probes

    probes, pool = collect_probes(Settings(score=ScoreSettings(probes="toy:probes"))), language.pool()
    check_apart(pool, probes)
    scored = probes[0].messages[-1]["content"]
    twin = {"role": "user", "content": f" {scored.upper()}  "}
    overlapping = Conversation("x-1", (twin, {"role": "assistant", "content": language.REFUSAL}))
    with pytest.raises(UserError, match=f"x-1 .*{probes[0].id}: take it out"):
        check_apart([*pool, overlapping], probes)


def test_a_reference_that_reads_tokens_otherwise(tmp_path):
    tokenizer, rows = build_tokenizer(), candidates()
    check_same_tokens(rows, tokenizer, ALIGNED)
    check_same_tokens(rows, tokenizer, tmp_path)  # without a tokenizer there is nothing to compare

    def renamed(used):
        path = tmp_path / ("used" if used else "unused")
        tokenizer.save_pretrained(path)
        text = json.loads((path / "tokenizer.json").read_text())
        ids = {token for row in rows for token in row.input_ids}
        vocabulary = text["model"]["vocab"]
        other = [w for w, i in vocabulary.items() if (i in ids) == used and i > 6][:2]
        vocabulary[other[0]], vocabulary[other[1]] = vocabulary[other[1]], vocabulary[other[0]]
        (path / "tokenizer.json").write_text(json.dumps(text))
        return path

    check_same_tokens(rows, tokenizer, renamed(used=False))
    with pytest.raises(UserError, match="another vocabulary: token"):
        check_same_tokens(rows, tokenizer, renamed(used=True))


@pytest.fixture
def stopped(tmp_path):
    """Settings of a repair of the toy's aligned model -> the sentence with which its planning stops."""
    from oneshot.patch.check import check
    from oneshot.settings import ModelSettings

    def run(**changed):
        settings = Settings(model=ModelSettings(path=str(ALIGNED)), **changed)
        with pytest.raises(UserError) as stop:
            check(settings, tiny_runtime())
        return str(stop.value)

    return run


def test_mistakes_are_heard_before_a_model_is_loaded(stopped, tmp_path):
    request = "please mend the grastel kettle with the file"
    pool = write(tmp_path / "pool.jsonl", {"id": "a", "prompt": request, "response": language.REFUSAL})
    probes = write(tmp_path / "probes.jsonl", {"id": "p-7", "prompt": request, "kind": "should_refuse"})
    empty = write(tmp_path / "empty.jsonl")
    scored = ScoreSettings(probes=probes)
    said = stopped(pool=pool, score=scored)
    assert f"The candidate example a ({request!r}) is also the scored prompt p-7" in said
    assert "also the scored prompt p-7" in stopped(example=pool, score=scored)
    assert "empty.jsonl holds no conversations" in stopped(pool=empty)
    assert "'bilvel', the ID of 0 candidates" in stopped(pool=pool, select="bilvel")
