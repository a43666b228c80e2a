import itertools
import logging
import warnings

import pytest
import torch

from oneshot.distributed.runtime import Runtime
from oneshot.measure import generate
from oneshot.measure.generate import evaluating, generate_answers, share_of

WORDS = ["blim", "fnord", "glorp", "snib", "tove", "wabe", "mome", "rath", "outgrabe", "slithy", "gimble", "gyre"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = [[{"role": "user", "content": " ".join(WORDS[i : i + 1 + (i * 5) % 7])}] for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", "<user>", "<assistant>", "<system>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,
        attention_dropout=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).train()


def runtime(rank=0, world_size=1, sharding="none"):
    return Runtime(rank, world_size, torch.device("cpu"), sharding, accelerator=None)


def one_by_one(model, tokenizer, messages, max_new_tokens):
    """Greedy decoding written out: no cache, no padding."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = []
    with evaluating(model), torch.no_grad():
        while len(answer) < max_new_tokens:
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_batches_answer_as_one_by_one_and_keep_the_order(model, tokenizer):
    expected = [one_by_one(model, tokenizer, messages, 6) for messages in PROMPTS]
    assert len(set(expected)) > 3
    lengths = {len(answer.split()) for answer in expected}
    assert len(lengths) > 1, "some answers must end early, or the end token goes untested"
    for batch_size in (1, 4, 64):
        answers = generate_answers(model, tokenizer, PROMPTS, runtime(), max_new_tokens=6, batch_size=batch_size)
        assert answers == expected


def test_two_ranks_make_as_many_calls_and_each_gets_all_answers(model, tokenizer, monkeypatch):
    expected = generate_answers(model, tokenizer, PROMPTS, runtime(), max_new_tokens=6, batch_size=2)
    shares, calls, synced = {}, {}, []
    original = model.generate

    def counting(**kwargs):
        calls[current] = calls.get(current, 0) + 1
        synced.append(kwargs.pop("synced_gpus"))
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", counting)
    monkeypatch.setattr(generate, "gather_objects", lambda run, mine: shares.__setitem__(run.rank, mine) or every())

    def every():
        return [shares.get(rank, [(i, "?") for i in range(len(PROMPTS))]) for rank in (0, 1)]

    for current in (0, 1):  # rank 0 is asked again below, once both shares are known
        run = runtime(current, 2, "zero3")
        answers = generate_answers(model, tokenizer, PROMPTS, run, max_new_tokens=6, batch_size=2)
    assert answers == expected
    assert calls == {0: 3, 1: 3}
    assert synced == [True] * 6
    assert {len(share) for share in shares.values()} == {4, 5}
    current = 0
    assert generate_answers(model, tokenizer, PROMPTS, runtime(0, 2), max_new_tokens=6, batch_size=2) == expected
    assert synced[6:] == [False] * 3


@pytest.mark.parametrize(("count", "world_size"), [(9, 2), (9, 4), (8, 4), (1, 3), (3, 3), (5, 1)])
def test_shares_cover_every_prompt_once_and_are_equally_long(count, world_size):
    lengths = [(7 * i) % 5 for i in range(count)]
    shares = [share_of(lengths, rank, world_size) for rank in range(world_size)]
    assert {len(indices) for indices, _ in shares} == {-(-count // world_size)}
    owned = [index for indices, own in shares for index in indices[:own]]
    assert sorted(owned) == list(range(count))
    # at each step all ranks have prompts of like length, so that none waits for another
    steps = list(zip(*([lengths[index] for index in indices[:own]] for indices, own in shares)))
    for now, following in itertools.pairwise(steps):
        assert max(now) <= min(following)


def test_no_prompts(model, tokenizer):
    assert generate_answers(model, tokenizer, [], runtime(), max_new_tokens=6, batch_size=2) == []


def test_each_training_flag_comes_back_even_after_an_error(model, tokenizer, monkeypatch):
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    generate_answers(model, tokenizer, PROMPTS[:2], runtime(), max_new_tokens=2, batch_size=2)
    assert {name: module.training for name, module in model.named_modules()} == before

    def broken(**kwargs):
        assert not model.model.layers[1].training
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        generate_answers(model, tokenizer, PROMPTS[:2], runtime(), max_new_tokens=2, batch_size=2)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_layers_that_would_repack_their_weights_stay_in_training_mode(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True
    with evaluating(model):
        assert [name for name, module in model.named_modules() if module.training] == ["model.layers.0.mlp.up_proj"]


def test_the_models_own_sampling_settings_neither_matter_nor_change(model, tokenizer, caplog):
    expected = generate_answers(model, tokenizer, PROMPTS, runtime(), max_new_tokens=6, batch_size=4)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k, own.min_p = True, 0.1, 0.5, 3, 0.2
    own.repetition_penalty, own.max_length, own.num_beams = 5.0, 9, 3
    before = own.to_dict()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answers = generate_answers(model, tokenizer, PROMPTS, runtime(), max_new_tokens=6, batch_size=4)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert answers == expected
    assert model.generation_config.to_dict() == before
    assert caplog.records == []


def test_every_end_token_of_the_model_ends_an_answer(model, tokenizer):
    answers = generate_answers(model, tokenizer, PROMPTS, runtime(), max_new_tokens=6, batch_size=4)
    stop = next(answer.split()[2] for answer in answers if len(answer.split()) > 3)
    model.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids(stop)]
    shorter = generate_answers(model, tokenizer, PROMPTS, runtime(), max_new_tokens=6, batch_size=4)
    assert shorter == [" ".join(answer.split(stop)[0].split()) for answer in answers]
    assert shorter != answers
