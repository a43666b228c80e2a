"""Packed rows: who shares one, that no conversation sees its neighbours, and that loss and gradients stay the same."""

import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import tiny_model, tiny_runtime

from oneshot.data.encoding import IGNORE, Encoded
from oneshot.distributed.engine import TrainingEngine
from oneshot.errors import UserError
from oneshot.training.objective import answer_loss
from oneshot.training.packing import Packing, choose_packing, deal, pack, rows_of, why_not_packable
from oneshot.training.stream import micro_batches
from oneshot.world.model import build_tokenizer

PACKABLE = ("llama", "mistral", "qwen2", "gemma3", "gpt_neox", "phi", "mixtral", "gpt2")
CPU = torch.device("cpu")
TOKENS = list(range(7, 40))


def talks(sizes, seed=0):
    """Conversations of random tokens; the first third of each is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in sizes:
        ids = torch.randint(7, len(build_tokenizer()), (size,), generator=generator).tolist()
        rows.append(Encoded(ids, [IGNORE] * (size // 3) + ids[size // 3 :]))
    return rows


def batch_of(rows, packing, accumulation=1):
    indices = list(range(len(rows)))
    return micro_batches(rows, indices, tiny_runtime(), pad_id=0, accumulation=accumulation, packing=packing)


def falcon():
    """An architecture whose attention takes positions, but does not keep the conversations of a row apart."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.FalconForCausalLM(transformers.FalconConfig(vocab_size=164, **sizes)).eval()


def state_space():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=164, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def engine_of(model):
    return TrainingEngine(tiny_runtime(), model, model, optimizer=None, max_grad_norm=1.0)


def test_deal_balances_and_gives_everything_out_once():
    sizes = [9, 7, 6, 5, 5, 4, 3, 3]
    hands = deal(sizes, 3)
    assert sorted(i for hand in hands for i in hand) == list(range(8))
    assert [sum(sizes[i] for i in hand) for hand in hands] == [13, 15, 14]
    assert deal(sizes, 3) == hands
    assert deal([5], 3) == [[0], [], []]


def test_rows_hold_everything_once_within_twice_the_longest():
    sizes = [60, 11, 30, 7, 25, 44, 9, 9, 16, 33]
    rows = rows_of(sizes, Packing())
    assert sorted(i for row in rows for i in row) == list(range(10))
    widths = [sum(sizes[i] for i in row) for row in rows]
    assert max(widths) <= 120
    assert len(rows) > 1
    assert sum(sizes) / (len(rows) * max(widths)) > 0.95


def test_rows_heed_the_length_and_the_context():
    sizes = [20, 20, 20, 10, 10]
    assert max(sum(sizes[i] for i in row) for row in rows_of(sizes, Packing(length=30))) <= 30
    assert max(sum(sizes[i] for i in row) for row in rows_of(sizes, Packing(length=99, context=25))) <= 25
    # longer than the limit: a row of its own, as nothing is ever truncated
    assert [0] in rows_of([50, 10, 10], Packing(length=20))
    assert rows_of(sizes, Packing(flat=True)) == [[0, 1, 2, 3, 4]]


def test_no_row_is_longer_than_the_limit_or_its_only_conversation():
    draw = random.Random(0)
    for _ in range(300):
        sizes = [draw.randint(1, 60) for _ in range(draw.randint(1, 14))]
        limit = draw.randint(10, 90)
        rows = rows_of(sizes, Packing(length=limit))
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        assert max(sum(sizes[i] for i in row) for row in rows) <= max(limit, *sizes, 0)


def test_positions_start_anew_and_no_first_token_is_predicted():
    one, two, three = Encoded([5, 6, 7], [5, 6, 7]), Encoded([8, 9], [8, 9]), Encoded([4], [4])
    packed = pack([[one, two], [three]], pad_id=1)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 1, 1, 1, 1]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert packed["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9], [IGNORE] * 5]
    assert {packed[name].dtype for name in ("input_ids", "position_ids", "labels")} == {torch.int64}


def test_flat_rows_have_no_padding_and_name_their_lengths():
    one, two, three = Encoded([5, 6, 7], [5, 6, 7]), Encoded([8, 9], [8, 9]), Encoded([4], [4])
    packed = pack([[one, two], [three]], pad_id=1, flat=True)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    for side in "qk":
        assert packed[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5, 6]
        assert packed[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert packed[f"max_length_{side}"] == 3


@pytest.mark.parametrize("family", PACKABLE)
def test_no_conversation_sees_its_neighbours(family):
    model = tiny_model(family)
    first, middle, last, other = talks([9, 14, 11, 14])

    def logits(rows):
        inputs = pack([rows], 0)
        del inputs["labels"]
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[0]

    before, after = logits([first, middle, last]), logits([first, other, last])
    assert not torch.allclose(before[9:23], after[9:23], atol=0.1), "the change itself is seen"
    for places in (slice(0, 9), slice(23, 34)):
        torch.testing.assert_close(after[places], before[places], rtol=0, atol=1e-6)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([last.input_ids]), use_cache=False).logits[0]
    torch.testing.assert_close(before[23:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_loss_and_gradients_are_the_unpacked_ones(family):
    rows = talks([9, 30, 5, 14, 11, 22, 3])
    found = {}
    for packing in (None, Packing(), Packing(flat=True)):
        model = tiny_model(family)
        losses = [answer_loss(model, batch) for batch in batch_of(rows, packing, accumulation=2)]
        sum(losses).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[packing] = float(sum(losses).detach()), gradients
    loss, gradients = found.pop(None)
    assert gradients
    for packed_loss, packed_gradients in found.values():
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert packed_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            off = (packed_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert float(off) < 1e-3, name


def test_packing_computes_less():
    rows = talks([60, 5, 9, 12, 7, 30, 4, 16])
    (padded,), (packed,) = batch_of(rows, None), batch_of(rows, Packing())
    assert padded.tokens == packed.tokens == 143
    assert padded.inputs["input_ids"].numel() == 480
    assert packed.inputs["input_ids"].numel() <= 150
    assert "attention_mask" not in packed.inputs


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_passes_what_is_packable(family, dtype):
    model = tiny_model(family).to(dtype)
    assert why_not_packable(model, model, TOKENS, 0, CPU, flat=False) is None


def test_the_trial_stops_models_that_mix_conversations():
    model = falcon()
    assert why_not_packable(model, model, TOKENS, 0, CPU, flat=False) == "conversations in one row would see each other"
    model = state_space()
    assert why_not_packable(model, model, TOKENS, 0, CPU, flat=False) == "the model takes no position_ids"


def test_the_trial_stops_models_that_count_positions_through():
    model = tiny_model("gpt2")

    def forward(position_ids, **inputs):
        through = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        apart = position_ids.eq(0).cumsum(1)
        seen = (apart[:, None, :] == apart[:, :, None]).tril()[:, None]
        return model(**inputs, position_ids=through, attention_mask=seen)

    reason = why_not_packable(forward, model, TOKENS, 0, CPU, flat=False)
    assert reason == "the model does not heed positions that start anew"


def test_the_trial_survives_models_that_refuse_the_rows():
    def forward(**inputs):
        raise ValueError("Rows of one conversation only.\nMore.")

    reason = why_not_packable(forward, tiny_model("llama"), TOKENS, 0, CPU, flat=False)
    assert reason == "the model does not take packed rows (Rows of one conversation only)"
    assert "too short" in why_not_packable(forward, tiny_model("llama"), [7], 0, CPU, flat=False)


def test_packing_is_chosen_where_it_can_be_shown_to_be_right():
    said = []
    wanted = Packing(length=40, context=64)
    assert choose_packing(engine_of(tiny_model("llama")), TOKENS, 0, wanted, "auto", said.append) == wanted
    assert choose_packing(engine_of(tiny_model("llama")), TOKENS, 0, wanted, "always", said.append) == wanted
    assert choose_packing(engine_of(tiny_model("llama")), TOKENS, 0, wanted, "never", said.append) is None
    assert said == []
    assert choose_packing(engine_of(falcon()), TOKENS, 0, wanted, "auto", said.append) is None
    assert said == ["Conversations are not packed: conversations in one row would see each other."]
    assert choose_packing(engine_of(falcon()), TOKENS, 0, wanted, "auto", None) is None
    # fp32 masters computed with in bf16: rounding is no leak, and a leak still shows
    assert choose_packing(engine_of(tiny_model("llama")), TOKENS, 0, wanted, "always", None, torch.bfloat16) == wanted
    assert choose_packing(engine_of(falcon()), TOKENS, 0, wanted, "auto", None, torch.bfloat16) is None
    with pytest.raises(UserError, match=r"finetune.packing is always, but conversations in one row would see"):
        choose_packing(engine_of(falcon()), TOKENS, 0, wanted, "always", said.append)


def test_flash_attention_gets_flat_rows_and_their_lengths():
    class Flash(torch.nn.Module):
        config = SimpleNamespace(_attn_implementation="flash_attention_2")
        ends = None

        def __init__(self):
            super().__init__()
            self.inner = tiny_model("llama")

        def forward(self, input_ids, position_ids, use_cache, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k):
            assert cu_seq_lens_q.equal(cu_seq_lens_k)
            assert max_length_q == max_length_k == 12
            self.ends = cu_seq_lens_q.tolist()
            return self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    model = Flash()
    assert choose_packing(engine_of(model), TOKENS, 0, Packing(context=64), "auto", None) == Packing(
        None, 64, flat=True
    )
    assert model.ends == [0, 8, 20, 28, 40, 52, 60]
