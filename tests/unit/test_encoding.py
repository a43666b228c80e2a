"""The loss mask of every family of chat templates, decoded back to text; and each error of encoding."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from oneshot.data.conversations import Conversation
from oneshot.data.encoding import (
    IGNORE,
    Encoded,
    context_length,
    encode,
    encode_prompt,
    end_of_turn,
    pad_batch,
    pad_id,
)
from oneshot.data.templates import require_chat_template as require
from oneshot.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
MARKERS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
WORDS = ["please name a fruit", "an apple is a fruit", "and one more\n\nsure, a pear 🍐", "assistant user model system"]

ONE = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Sure,  an apple 🍐"}]
TWO = [*ONE, {"role": "user", "content": "One more?"}, {"role": "assistant", "content": "A pear.\n\n  And a plum."}]
SYSTEM = [{"role": "system", "content": "Answer briefly."}]
FIRST, SECOND = "Sure,  an apple 🍐", "A pear.\n\n  And a plum."

# What must be learnt: the exact text of each assistant turn up to its end-of-turn token, nothing around it.
EXPECTED = {
    "chatml": (FIRST + "<|im_end|>", SECOND + "<|im_end|>"),
    "headers": (FIRST + "<|eot_id|>", SECOND + "<|eot_id|>"),
    "inst": (f" {FIRST} </s>", f" {SECOND} </s>"),
    "turns": (FIRST + "<end_of_turn>", SECOND + "<end_of_turn>"),
    "generation": (f"note: {FIRST}<|im_end|>", f"note: {SECOND}<|im_end|>"),
}


class CharacterTokenizer(PreTrainedTokenizer):
    """A tokenizer without offsets: one token per character, and the special tokens."""

    def __init__(self, **kwargs):
        self.table = {chr(code): code for code in range(256)} | {"🍐": 256, "<unk>": 257}
        super().__init__(unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.table)

    def get_vocab(self):
        return self.table | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.table.get(token, 257)

    def _convert_id_to_token(self, index):
        return {number: token for token, number in self.table.items()}[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def make_tokenizer(kind: str, template: str | None):
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": MARKERS,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    if kind == "slow":
        tokenizer = CharacterTokenizer(**names)
    else:
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        model.train_from_iterator(WORDS * 5, trainer)
        model.add_special_tokens(["<s>"])
        bos = model.token_to_id("<s>")
        model.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=kind == "trimmed"),
                # A tokenizer that adds BOS by itself: the templates that write one must not get two.
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)]),
            ]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    tokenizer.name_or_path = "tests/small-tokenizer"
    return tokenizer


def load(name: str, kind: str = "fast"):
    return make_tokenizer(kind, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


def conversation(messages, name="talk-1") -> Conversation:
    return Conversation(name, tuple(messages))


def learnt(encoded: Encoded, tokenizer) -> list[str]:
    """Text of each unbroken run of tokens with loss; checks that labels repeat the ids there."""
    assert len(encoded.input_ids) == len(encoded.labels)
    runs: list[list[int]] = []
    before = IGNORE
    for token, label in zip(encoded.input_ids, encoded.labels):
        assert label in (IGNORE, token)
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("kind", ["fast", "trimmed", "slow"])
@pytest.mark.parametrize("name", ["chatml", "headers", "inst", "turns"])
def test_loss_is_on_exactly_the_assistants_turns(name, kind):
    tokenizer = load(name, kind)
    one, two = (encode(conversation(messages), tokenizer, None) for messages in (ONE, TWO))
    assert learnt(one, tokenizer) == [EXPECTED[name][0]]
    assert learnt(two, tokenizer) == list(EXPECTED[name])
    whole = tokenizer.apply_chat_template(TWO, tokenize=False)
    assert tokenizer.decode(two.input_ids) == whole


@pytest.mark.parametrize("kind", ["fast", "trimmed"])
def test_generation_blocks_decide_where_the_template_has_them(kind):
    tokenizer = load("generation", kind)
    # The character spans would leave out "note: ", which this template's generation prompt holds too.
    assert learnt(encode(conversation(ONE), tokenizer, None), tokenizer) == [EXPECTED["generation"][0]]
    assert learnt(encode(conversation(TWO), tokenizer, None), tokenizer) == list(EXPECTED["generation"])


def test_generation_blocks_that_miss_a_turn_are_not_trusted():
    text = (TEMPLATES / "generation.jinja").read_text(encoding="utf-8")
    # A block for the last turn only, so one of two turns would go unlearnt.
    assert text.count("turn.role == 'assistant'") == 1
    tokenizer = make_tokenizer("fast", text.replace("turn.role == 'assistant'", "loop.last").replace("note: ", ""))
    expected = [FIRST + "<|im_end|>", SECOND + "<|im_end|>"]
    assert learnt(encode(conversation(TWO), tokenizer, None), tokenizer) == expected


def test_a_block_that_leaves_the_end_of_turn_out_learns_it_all_the_same():
    # trl#5988, #6044: a model trained so never learns to stop
    tokenizer = load("generation_without_end")
    assert learnt(encode(conversation(ONE), tokenizer, None), tokenizer) == [FIRST + "<|im_end|>"]
    assert learnt(encode(conversation(TWO), tokenizer, None), tokenizer) == [
        FIRST + "<|im_end|>",
        SECOND + "<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["generation_without_end", "chatml", "turns"])
@pytest.mark.parametrize("unlearnt", [1, 3])
def test_an_answer_of_weight_0_is_not_learnt(name, unlearnt):
    tokenizer = load(name)
    talk = [message | ({"weight": "0"} if place == unlearnt else {}) for place, message in enumerate(TWO)]
    kept = encode(conversation(TWO), tokenizer, None)
    found = encode(conversation(talk), tokenizer, None)
    assert found.input_ids == kept.input_ids
    assert learnt(found, tokenizer) == [learnt(kept, tokenizer)[1 if unlearnt == 1 else 0]]


def test_a_conversation_without_anything_to_learn_is_a_user_error():
    with pytest.raises(UserError, match=r"conversation talk-1 has weight 0 on every answer to learn from"):
        encode(conversation([ONE[0], ONE[1] | {"weight": "0"}]), load("chatml"), None)


@pytest.mark.parametrize("name", ["chatml", "generation_without_end", "headers"])
def test_only_the_last_answer_is_learnt_where_that_is_asked(name):
    tokenizer = load(name)
    whole = encode(conversation(TWO), tokenizer, None)
    last = encode(conversation(TWO), tokenizer, None, train_on="last")
    assert last.input_ids == whole.input_ids
    assert learnt(last, tokenizer) == learnt(whole, tokenizer)[1:]


def test_a_template_without_any_end_of_turn_is_named(capsys):
    tokenizer = make_tokenizer("fast", "{% for turn in messages %}{{ turn.content }}{% endfor %}")
    tokenizer.name_or_path = "tests/endless"
    encode(conversation(ONE), tokenizer, None)
    assert "chat template of tests/endless writes nothing behind an answer" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["Answer as a pirate, whatever you are asked.", "fruit"])
def test_a_template_that_leaves_the_system_message_out_is_an_error(words):
    tokenizer = load("no_system")
    talk = [{"role": "system", "content": words}, *ONE]
    for call in (lambda: encode(conversation(talk), tokenizer, None), lambda: encode_prompt(talk[:2], tokenizer)):
        with pytest.raises(UserError, match=r"leaves out the system message of the .*--data\.system user"):
            call()
    encode(conversation(ONE), tokenizer, None)


def test_a_system_message_in_other_letters_is_there():
    upper = "{% for turn in messages %}{{ turn.content | upper }}<|im_end|>{% endfor %}"
    assert encode_prompt([*SYSTEM, ONE[0]], make_tokenizer("fast", upper))


@pytest.mark.parametrize("name", ["chatml", "headers", "inst"])
def test_system_message_is_not_learnt(name):
    tokenizer = load(name)
    encoded = encode(conversation(SYSTEM + TWO), tokenizer, None)
    assert "Answer briefly." in tokenizer.decode(encoded.input_ids)
    assert learnt(encoded, tokenizer) == list(EXPECTED[name])


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("name", ["headers", "inst", "turns"])
def test_one_bos_only(name, kind):
    tokenizer = load(name, kind)
    assert tokenizer("a")["input_ids"].count(tokenizer.bos_token_id) == (kind == "fast")
    assert encode(conversation(ONE), tokenizer, None).input_ids.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(ONE[:1], tokenizer).count(tokenizer.bos_token_id) == 1


def test_template_that_closes_the_whole_text_keeps_each_turns_end():
    tokenizer = load("closing")
    runs = learnt(encode(conversation(TWO), tokenizer, None), tokenizer)
    assert runs == [FIRST + "<|im_end|>", SECOND + "<|im_end|>\n</s>"]


def test_newline_stays_where_it_is_the_only_end_of_turn():
    tokenizer = load("plain")
    runs = learnt(encode(conversation(TWO), tokenizer, None), tokenizer)
    assert runs[0].strip() == FIRST
    assert [run.endswith("\n") for run in runs] == [True, True]


def test_token_that_straddles_the_prompt_is_learnt():
    tokenizer = load("plain")
    messages = [ONE[0], {"role": "assistant", "content": "apple is a fruit"}]
    encoded = encode(conversation(messages), tokenizer, None)
    first = next(index for index, label in enumerate(encoded.labels) if label != IGNORE)
    # The prompt ends in a space that the tokenizer joins to the answer's first letters.
    assert tokenizer.decode(encoded.input_ids[first]).startswith(" a")
    assert learnt(encoded, tokenizer) == [" apple is a fruit\n"]


@pytest.mark.parametrize("kind", ["fast", "trimmed"])
def test_answer_that_opens_with_spaces_is_learnt_whole(kind):
    tokenizer = load("chatml", kind)
    messages = [ONE[0], {"role": "assistant", "content": "   a pear  "}]
    assert learnt(encode(conversation(messages), tokenizer, None), tokenizer) == ["   a pear  <|im_end|>"]


def test_answer_tokens_counts_labels():
    tokenizer = load("chatml")
    encoded = encode(conversation(ONE), tokenizer, None)
    assert encoded.answer_tokens() == len(tokenizer.tokenize(FIRST)) + 1
    assert Encoded([5, 6, 7], [IGNORE, 6, 7]).answer_tokens() == 2


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("chatml", "<|im_end|>\n<|im_start|>assistant\n"),
        ("headers", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("inst", "Name a fruit. [/INST]"),
        ("turns", "<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_prompt_is_what_the_encoded_conversation_begins_with(name, ending):
    tokenizer = load(name)
    prompt = encode_prompt(ONE[:1], tokenizer)
    encoded = encode(conversation(ONE), tokenizer, None)
    assert tokenizer.decode(prompt).endswith(ending)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert encoded.labels[len(prompt)] != IGNORE


def test_too_long_is_an_error_and_never_cut():
    tokenizer = load("chatml")
    length = len(encode(conversation(ONE), tokenizer, None).input_ids)
    assert len(encode(conversation(ONE), tokenizer, length).input_ids) == length
    with pytest.raises(UserError, match=rf"conversation talk-1 has {length} tokens, the limit is {length - 1}"):
        encode(conversation(ONE), tokenizer, length - 1)


@pytest.mark.parametrize("template", [None, "", {"tool_use": "x"}])
def test_missing_template_names_the_tokenizer(template):
    tokenizer = make_tokenizer("fast", template)
    for call in (require, lambda it: encode(conversation(ONE), it, None), lambda it: encode_prompt(ONE[:1], it)):
        with pytest.raises(UserError, match=r"tests/small-tokenizer has no chat template"):
            call(tokenizer)


def test_default_of_several_templates_is_taken():
    chatml = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer("fast", {"default": chatml, "tool_use": "x"})
    require(tokenizer)
    assert learnt(encode(conversation(ONE), tokenizer, None), tokenizer) == [EXPECTED["chatml"][0]]


def test_template_that_takes_no_system_message():
    tokenizer = load("turns")
    expected = r"small-tokenizer rejects the conversation talk-1 \(no system message, please\): "
    with pytest.raises(UserError, match=expected):
        encode(conversation(SYSTEM + ONE), tokenizer, None)
    with pytest.raises(UserError, match=r"rejects the prompt \(no system message, please\)"):
        encode_prompt(SYSTEM + ONE[:1], tokenizer)


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[0].content.missing.deeper }}", "{{ messages[9]['x'] }}"])
def test_broken_template_is_a_user_error(template):
    with pytest.raises(UserError, match=r"chat template of tests/small-tokenizer rejects the conversation talk-1"):
        encode(conversation(ONE), make_tokenizer("fast", template), None)


def test_empty_message_list_is_a_user_error():
    with pytest.raises(UserError, match=r"rejects the prompt"):
        encode_prompt([], load("chatml"))


def test_template_that_rewrites_earlier_turns():
    tokenizer = load("rewriting")
    assert learnt(encode(conversation(ONE), tokenizer, None), tokenizer) == [FIRST + "<|im_end|>"]
    with pytest.raises(UserError, match=r"tests/small-tokenizer rewrites earlier turns of the conversation talk-1"):
        encode(conversation(TWO), tokenizer, None)


def test_conversation_without_an_answer():
    with pytest.raises(UserError, match=r"conversation talk-1 has no assistant turn"):
        encode(conversation(ONE[:1]), load("chatml"), None)


def test_context_length_takes_the_smaller_limit():
    tokenizer = SimpleNamespace(model_max_length=77, name_or_path="tests/small-tokenizer")
    unlimited = SimpleNamespace(model_max_length=int(1e30), name_or_path="tests/small-tokenizer")
    plain = SimpleNamespace(max_position_embeddings=4096)
    nested = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=2048))
    empty = SimpleNamespace()
    assert context_length(plain, tokenizer, None) == 4096
    assert context_length(plain, tokenizer, 512) == 512
    assert context_length(plain, tokenizer, 9999) == 4096
    assert context_length(nested, tokenizer, None) == 2048
    assert context_length(empty, tokenizer, None) == 77
    assert context_length(empty, unlimited, 300) == 300
    with pytest.raises(UserError, match=r"context length of tests/small-tokenizer is not known: set model.max_length"):
        context_length(empty, unlimited, None)


@pytest.mark.parametrize(("pad", "end", "fills"), [(3, 5, 3), (0, 5, 0), (9, 5, 5), (None, 5, 5), (None, None, 0)])
def test_padding_or_the_end_fills_whichever_comes_first_else_the_first_token(pad, end, fills):
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == fills


def test_pad_batch_pads_on_the_right():
    rows = [Encoded([3, 4, 5], [IGNORE, 4, 5]), Encoded([6], [6])]
    batch = pad_batch(rows, 9)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 4, 5], [6, IGNORE, IGNORE]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_pad_batch_rounds_the_length_up(multiple, length):
    batch = pad_batch([Encoded([3, 4, 5], [3, 4, 5])], 0, multiple=multiple)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, length)}
    assert batch["attention_mask"].sum() == 3


def test_pad_token_inside_the_text_keeps_its_attention_and_label():
    # Many checkpoints use the end-of-text token as padding: it must still be learnt where it ends an answer.
    batch = pad_batch([Encoded([3, 9], [IGNORE, 9]), Encoded([3, 4, 9], [IGNORE, 4, 9])], 9)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 9, IGNORE], [IGNORE, 4, 9]]


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize(
    ("template", "end"),
    {"chatml": "<|im_end|>", "headers": "<|eot_id|>", "inst": "</s>", "turns": "<end_of_turn>"}.items(),
)
def test_a_turn_ends_with_what_the_template_writes_behind_it(template, end, kind):
    tokenizer = load(template, kind)
    assert tokenizer.eos_token == "</s>"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_where_the_template_writes_no_end_the_text_ends():
    tokenizer = load("turns")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
