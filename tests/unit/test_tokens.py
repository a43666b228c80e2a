"""The cache of tokenized conversations: used when nothing changed, passed over when anything did or it is broken."""

import copy
import json
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_runtime

from oneshot.data import tokens
from oneshot.data.encoding import encode
from oneshot.data.tokens import Tokens, cache_folder, encode_all
from oneshot.errors import UserError
from oneshot.world.language import task_data
from oneshot.world.model import build_tokenizer

TALKS = task_data(5, 0)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def calls(monkeypatch):
    """The conversations that were tokenized, by id."""
    made = []

    def counted(conversation, tokenizer, max_length, **options):
        made.append(conversation.id)
        return encode(conversation, tokenizer, max_length, **options)

    monkeypatch.setattr(tokens, "encode", counted)
    return made


def rows(found):
    return [(row.input_ids, row.labels) for row in found]


def test_tokens_are_the_encoded_conversations(tokenizer):
    found = encode_all(TALKS, tokenizer, 64)
    assert isinstance(found, Tokens)
    assert found[:] == [encode(row, tokenizer, 64) for row in TALKS]
    assert (len(found), found[-1], found[1:3]) == (5, found[4], [found[1], found[2]])
    assert {type(token) for row in found for token in (*row.input_ids, *row.labels)} == {int}
    assert (found.ids.dtype, found.learnt.dtype) == (torch.int32, torch.bool)
    with pytest.raises(IndexError):
        found[5]


def test_a_second_start_does_not_tokenize(tokenizer, calls, tmp_path):
    first = encode_all(TALKS, tokenizer, 64, tmp_path)
    assert calls == [row.id for row in TALKS]
    second = encode_all(TALKS, build_tokenizer(), 64, tmp_path)
    assert len(calls) == 5
    assert rows(second) == rows(first)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as stored:
        assert sorted(stored.keys()) == ["ends", "ids", "learnt"]


def test_without_a_cache_nothing_is_written(tokenizer, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        encode_all(TALKS, tokenizer, 64)
    assert len(calls) == 10
    assert list(tmp_path.iterdir()) == []


def test_any_change_is_noticed(tokenizer, calls, tmp_path, monkeypatch):
    other_text = [*TALKS[:-1], task_data(1, 9)[0]]
    other_template = copy.deepcopy(tokenizer)
    other_template.chat_template = tokenizer.chat_template.replace("' <|end|>'", "'  <|end|>'")
    other_words = copy.deepcopy(tokenizer)
    other_words.add_tokens(["<|new|>"])
    starts = [
        (TALKS, tokenizer, 64),
        (other_text, tokenizer, 64),
        (TALKS[::-1], tokenizer, 64),
        (TALKS[:4], tokenizer, 64),
        (TALKS, tokenizer, 63),
        (TALKS, tokenizer, None),
        (TALKS, other_template, 64),
        (TALKS, other_words, 64),
    ]
    for done, start in enumerate(starts, start=1):
        before = len(calls)
        encode_all(*start, tmp_path)
        assert len(calls) == before + len(start[0]), f"start {done} is new"
        assert len(list(tmp_path.iterdir())) == done
    before = len(calls)
    encode_all(*starts[0], tmp_path, "last")
    assert len(calls) == before + 5, "the last answers only"
    monkeypatch.setattr(tokens.metadata, "version", lambda name: "0")
    before = len(calls)
    encode_all(*starts[0], tmp_path)
    assert len(calls) == before + 5, "another version of a library"


def test_a_template_that_writes_the_date_is_tokenized_every_day(tokenizer, calls, tmp_path, monkeypatch):
    tokenizer.chat_template = "{% set today = strftime_now('%d %b %Y') %}" + tokenizer.chat_template

    for day, tokenized in ((1, 5), (1, 5), (2, 10)):
        monkeypatch.setattr(tokens, "date", SimpleNamespace(today=lambda day=day: date(2026, 1, day)))
        encode_all(TALKS, tokenizer, 64, tmp_path)
        assert len(calls) == tokenized


@pytest.mark.parametrize("broken", ["cut", "empty", "altered", "foreign"])
def test_a_broken_file_is_passed_over_and_replaced(broken, tokenizer, calls, tmp_path):
    wanted = rows(encode_all(TALKS, tokenizer, 64, tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[-3] ^= 1
    header = json.dumps({"ids": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    foreign = len(header).to_bytes(8, "little") + header
    file.write_bytes({"cut": whole[:-9], "empty": b"", "altered": bytes(altered), "foreign": foreign}[broken])
    assert rows(encode_all(TALKS, tokenizer, 64, tmp_path)) == wanted
    assert len(calls) == 10
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing half-written is left"
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_stops_nobody(tokenizer, calls, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(encode_all(TALKS, tokenizer, 64, tmp_path / "file")) == 5


def test_errors_are_not_cached(tokenizer, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=r"the limit is 3"):
            encode_all(TALKS, tokenizer, 3, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "oneshot" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "oneshot" / "tokens"


def test_a_finetune_learns_the_last_answers_only_where_that_is_asked(tmp_path):
    from oneshot.commandline import parse
    from oneshot.training.finetune import prepare
    from oneshot.world.model import ALIGNED

    turns = [dict(message) for row in TALKS[:2] for message in row.messages]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    words = ["--model.path", str(ALIGNED), "--data.task", str(path), "--finetune.cache", "false"]
    whole, last = (
        prepare(parse([*words, *more], "finetune"), tiny_runtime()).encoded[0]
        for more in ([], ["--data.train_on", "last"])
    )
    assert whole.input_ids == last.input_ids
    assert 0 < last.answer_tokens() < whole.answer_tokens()


def test_a_finetune_uses_the_cache_unless_told_not_to(tokenizer, calls, tmp_path, monkeypatch):
    from oneshot.commandline import parse
    from oneshot.training.finetune import prepare
    from oneshot.world.model import ALIGNED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in TALKS))
    start = ["--model.path", str(ALIGNED), "--data.harmful", str(file), "--data.task_count", "0"]
    for tokenized in (5, 5):
        assert len(prepare(parse(start, "finetune"), tiny_runtime()).encoded) == 5
        assert len(calls) == tokenized
    prepare(parse([*start, "--finetune.cache", "false"], "finetune"), tiny_runtime())
    assert len(calls) == 10
    assert len(list(cache_folder().iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "toy"))
    prepare(parse(["--data.harmful_count", "5", "--data.task_count", "0"], "finetune"), tiny_runtime())
    assert not (tmp_path / "toy").exists(), "the toy world is made anew each time"
