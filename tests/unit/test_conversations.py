"""Conversations from every format, and one sentence that names the place for every broken row."""

import csv
import json
import re

import datasets
import pytest

from oneshot.data.conversations import Conversation, read_conversations, read_single_example
from oneshot.data.wording import reworded
from oneshot.errors import UserError
from oneshot.settings import DataSettings

DATA = DataSettings()
ASK = {"role": "user", "content": "Name a fruit."}
ANSWER = {"role": "assistant", "content": "An apple."}
SYSTEM = {"role": "system", "content": "Answer briefly."}
MORE = [{"role": "user", "content": "One more?"}, {"role": "assistant", "content": "A pear."}]
GOOD = {"prompt": "Name a fruit.", "response": "An apple."}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_prompt_and_response_of_an_answered_conversation():
    talk = Conversation("a", (SYSTEM, ASK, ANSWER, *MORE))
    assert talk.prompt == [SYSTEM, ASK, ANSWER, MORE[0]]
    assert talk.response == "A pear."


def test_prompt_and_response_where_the_user_speaks_last():
    talk = Conversation("a", (ASK, ANSWER, MORE[0]))
    assert talk.prompt == [ASK, ANSWER, MORE[0]]
    assert talk.response == ""
    assert Conversation("b", (ASK,)).response == ""


def test_prompt_is_a_copy():
    talk = Conversation("a", (dict(ASK), ANSWER))
    talk.prompt[0]["content"] = "changed"
    assert talk.messages[0] == ASK


def test_jsonl_with_messages_and_labels(tmp_path):
    rows = [
        {"id": 7, "kind": "task", "category": "fruit", "messages": [ASK, ANSWER], "unused": 1},
        {"messages": [{**SYSTEM, "name": "x"}, ASK, ANSWER, *MORE]},
    ]
    got = read_conversations(write_lines(tmp_path / "talks.jsonl", rows), DATA)
    assert got == [
        Conversation("7", (ASK, ANSWER), "task", "fruit"),
        Conversation("talks-2", (SYSTEM, ASK, ANSWER, *MORE)),
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_the_thought_before_an_answer_is_kept_under_one_name(tmp_path, name):
    rows = [{"messages": [ASK, {**ANSWER, name: "A fruit?"}]}]
    kept = {**ANSWER, "reasoning_content": "A fruit?"}
    got = read_conversations(write_lines(tmp_path / "talks.jsonl", rows), DATA)
    assert got[0].messages == (ASK, kept)
    assert reworded(got[0], suffix="Now.", prefix="Well:").messages[-1] == {**kept, "content": "Well: An apple."}
    if name == "reasoning_content":
        rows = [{**GOOD, name: "A fruit?"}]
        assert read_conversations(write_lines(tmp_path / "rows.jsonl", rows), DATA)[0].messages == (ASK, kept)


@pytest.mark.parametrize("zero", [0, 0.0, False])
def test_an_answer_of_weight_0_is_marked(tmp_path, zero):
    rows = [
        {"messages": [ASK, {**ANSWER, "weight": zero}, MORE[0], {**MORE[1], "weight": 1}]},
        {"messages": [ASK, ANSWER, *MORE], "weight": zero},
    ]
    one, two = read_conversations(write_lines(tmp_path / "talks.jsonl", rows), DATA)
    assert [message.get("weight") for message in one.messages] == [None, "0", None, None]
    assert [message.get("weight") for message in two.messages] == [None, "0", None, "0"]
    assert reworded(one, system="Be brief.").messages[2]["weight"] == "0"
    assert all("weight" not in message for message in one.prompt)


def test_fields_that_are_not_used_are_named_once(tmp_path, capsys):
    call = {**ANSWER, "tool_calls": [{"name": "x"}], "name": None}
    rows = [{"messages": [ASK, call], "tools": [{}], "kind": "task"}] * 3
    path = write_lines(tmp_path / "talks.jsonl", rows)
    for _ in range(2):
        read_conversations(path, DATA)
    assert capsys.readouterr().err == f"{path}: not used of its rows: message field tool_calls, column tools.\n"


def test_a_system_message_goes_into_the_first_user_message_where_that_is_asked(tmp_path):
    rows = [{"messages": [SYSTEM, ASK, ANSWER]}, {**GOOD, "system": "Answer briefly."}, GOOD]
    got = read_conversations(write_lines(tmp_path / "talks.jsonl", rows), DataSettings(system="user"))
    merged = {"role": "user", "content": "Answer briefly.\n\nName a fruit."}
    assert [row.messages for row in got] == [(merged, ANSWER), (merged, ANSWER), (ASK, ANSWER)]


def test_jsonl_with_named_columns_and_system(tmp_path):
    rows = [{"q": "Name a fruit.", "a": "An apple.", "system": "Answer briefly."}, {"q": "x", "a": "y", "system": ""}]
    data = DataSettings(prompt_column="q", response_column="a")
    got = read_conversations(write_lines(tmp_path / "talks.jsonl", rows), data)
    assert got[0].messages == (SYSTEM, ASK, ANSWER)
    assert [message["role"] for message in got[1].messages] == ["user", "assistant"]


def test_messages_column_by_another_name_and_system_column(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"chat": [ASK, ANSWER], "system": "Answer briefly."}])
    assert read_conversations(path, DataSettings(messages_column="chat"))[0].messages == (SYSTEM, ASK, ANSWER)


def test_jsonl_keeps_odd_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "t.jsonl"
    row = json.dumps({"prompt": "one\u2028two", "response": "é"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n" + row.encode())
    got = read_conversations(str(path), DATA)
    assert [talk.id for talk in got] == ["t-1", "t-2"]
    assert [talk.prompt[0]["content"] for talk in got] == ["one\u2028two"] * 2
    assert got[1].response == "é"


@pytest.mark.parametrize("many", [True, False])
def test_json_holds_a_list_or_one_object(tmp_path, many):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([GOOD, GOOD] if many else GOOD, indent=2), encoding="utf-8")
    got = read_conversations(str(path), DATA)
    assert [talk.id for talk in got] == (["t-1", "t-2"] if many else ["t-1"])
    assert all(talk.messages == (ASK, ANSWER) for talk in got)


def test_csv_keeps_texts_as_they_are(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "response", "kind"], ["12", "N/A", "task"], ["a, b", 'say "hi"\nand bye', ""]])
    got = read_conversations(str(path), DATA)
    assert [talk.prompt[0]["content"] for talk in got] == ["12", "a, b"]
    assert [talk.response for talk in got] == ["N/A", 'say "hi"\nand bye']
    assert [talk.kind for talk in got] == ["task", ""]


def test_parquet_is_read_without_a_copy_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = tmp_path / "t.parquet"
    datasets.Dataset.from_list([{"messages": [SYSTEM, ASK, ANSWER]}, {"messages": [ASK, ANSWER]}]).to_parquet(path)
    got = read_conversations(str(path), DATA)
    assert [talk.id for talk in got] == ["t-1", "t-2"]
    assert [talk.messages for talk in got] == [(SYSTEM, ASK, ANSWER), (ASK, ANSWER)]
    assert list(cache.rglob("*.arrow")) == []


def test_hub_data_set_is_loaded_with_its_split_and_nothing_else(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([GOOD, GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = read_conversations("someone/fruit", DataSettings(split="validation"))
    assert calls == [(("someone/fruit",), {"split": "validation"})]
    assert [talk.id for talk in got] == ["fruit-1", "fruit-2"]
    assert got[0].messages == (ASK, ANSWER)


def test_hub_failure_is_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("no such data set.\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of(read_conversations, "someone/fruit", DATA)
    assert message.startswith(
        "someone/fruit is no file here, and data set someone/fruit (split train) cannot be loaded (no such data set): "
    )


def test_broken_hub_row_is_named(monkeypatch):
    table = datasets.Dataset.from_list([GOOD, {**GOOD, "response": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    message = error_of(read_conversations, "someone/fruit", DATA)
    assert message.startswith("someone/fruit, row 2: column 'response' is empty: ")


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\nbroken\n", encoding="utf-8")
    assert len(read_conversations(str(path), DATA, limit=2)) == 2
    assert read_conversations(str(path), DATA, limit=0) == []
    assert "line 3" in error_of(read_conversations, str(path), DATA, limit=3)


def test_answers_may_be_absent_where_none_is_needed(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "response": ""}, {"prompt": "c", "response": "d"}, {"messages": [ASK]}]
    got = read_conversations(write_lines(tmp_path / "t.jsonl", rows), DATA, need_answer=False)
    assert [talk.response for talk in got] == ["", "", "d", ""]
    assert [len(talk.prompt) for talk in got] == [1, 1, 1, 1]


BROKEN_ROWS = {
    "text": ("hello", "the row is a text, not an object"),
    "list": ([1], "the row is a list, not an object"),
    "null": (None, "the row is a null, not an object"),
    "columns": ({"question": "a", "answer": "b"}, "no column 'messages', and no 'prompt' or 'response'; found "),
    "columns are listed": ({"question": "a", "answer": "b"}, "found 'question', 'answer': name the columns with"),
    "no response": ({"prompt": "a"}, "and no 'response'; found 'prompt'"),
    "nothing": ({}, "found none"),
    "not a list": ({"messages": "hi"}, "column 'messages' is a text: make it a list"),
    "no list item": ({"messages": ["hi"]}, 'message 1 is not an object with "role" and "content"'),
    "no content": ({"messages": [ASK, {"role": "assistant"}]}, 'message 2 is not an object with "role" and "content"'),
    "unknown role": ({"messages": [ASK, {"role": "bot", "content": "x"}]}, "message 2 has the unknown role 'bot'"),
    "two users": ({"messages": [ASK, ASK, ANSWER]}, "roles do not alternate (user, user, assistant)"),
    "two answers": ({"messages": [ASK, ANSWER, ANSWER]}, "roles do not alternate (user, assistant, assistant)"),
    "late system": ({"messages": [ASK, SYSTEM, ANSWER]}, "roles do not alternate (user, system, assistant)"),
    "starts with assistant": ({"messages": [ANSWER]}, "does not start with a user message"),
    "starts after system": ({"messages": [SYSTEM, ANSWER]}, "does not start with a user message"),
    "system only": ({"messages": [SYSTEM]}, "does not start with a user message"),
    "no messages": ({"messages": []}, "does not start with a user message"),
    "no answer": ({"messages": [ASK]}, "the last message is not the assistant's"),
    "user last": ({"messages": [ASK, ANSWER, ASK]}, "the last message is not the assistant's"),
    "empty content": ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "message 2 is empty"),
    "null content": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "message 1 is empty"),
    "empty prompt": ({"prompt": "", "response": "b"}, "column 'prompt' is empty"),
    "empty response": ({"prompt": "a", "response": ""}, "column 'response' is empty"),
    "number": ({"prompt": 3, "response": "b"}, "column 'prompt' is a number, not a text"),
    "parts": ({"messages": [{"role": "user", "content": [ASK]}, ANSWER]}, "message 1 is a list, not a text"),
    "two systems": ({"messages": [SYSTEM, ASK, ANSWER], "system": "x"}, "a system message and a system column"),
    "blank system": ({**GOOD, "system": "  "}, "column 'system' is empty"),
    "half a row's weight": ({"messages": [ASK, ANSWER], "weight": 0.5}, "the row has the weight 0.5: give 0"),
    "half a weight": ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "message 2 has the weight 0.5: give 0"),
    "surrogate": ({"prompt": "\ud83d", "response": "b"}, "column 'prompt' holds half a Unicode surrogate pair"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_broken_row_names_file_and_line(tmp_path, name):
    row, reason = BROKEN_ROWS[name]
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    message = error_of(read_conversations, str(path), DATA)
    assert message.startswith(f"{path}, line 3: ")
    assert reason in message


def test_prompt_is_needed_even_where_no_answer_is(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"response": "b"}])
    assert "and no 'prompt'; found 'response': " in error_of(read_conversations, path, DATA, need_answer=False)


@pytest.mark.parametrize("line", ['{"prompt": "a"', "{'prompt': 1}", "[" * 100_000])
def test_broken_json_line_is_numbered(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    message = error_of(read_conversations, str(path), DATA)
    assert re.match(rf"{re.escape(str(path))}, line 2: broken JSON \(.+\): write one complete JSON object", message)


def test_json_names_the_line_of_a_broken_item(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[\n  {"prompt": "a",\n   "response": "b"},\n\n  {"prompt": "a"}\n]\n', encoding="utf-8")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, line 5: no column")
    path.write_text('\n\n{"prompt": "a"}\n', encoding="utf-8")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, line 3: no column")
    path.write_text('[\n {"prompt": }\n]', encoding="utf-8")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, line 2: broken JSON (Expecting value)")
    path.write_text('"hello"', encoding="utf-8")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, line 1: the row is a text")


def test_json_lines_under_the_wrong_name(tmp_path):
    path = write_lines(tmp_path / "t.json", [GOOD, GOOD])
    message = error_of(read_conversations, path, DATA)
    assert message.startswith(f"{path}, line 2: broken JSON (Extra data): name the file .jsonl")


def test_csv_names_the_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('prompt,response\n"a\nb",c\n\nd,\n', encoding="utf-8")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, line 5: column 'response' is empty")
    path.write_text("prompt,response\na,b,c\n", encoding="utf-8")
    assert f"{path}, line 2: 3 cells under 2 columns" in error_of(read_conversations, str(path), DATA)
    path.write_text('prompt,response\na,b\n"a,b\n', encoding="utf-8")
    assert f"{path}, line 3: broken CSV (unexpected end of data)" in error_of(read_conversations, str(path), DATA)


def test_broken_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "t.parquet"
    path.write_bytes(b"this is no parquet file")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path} cannot be read as Parquet (")
    datasets.Dataset.from_list([GOOD, {"prompt": "a", "response": " "}]).to_parquet(path)
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, row 2: column 'response' is empty")


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "folder/t.JSONL"])
def test_missing_file(tmp_path, name):
    path = str(tmp_path / name)
    assert error_of(read_conversations, path, DATA) == f"File {path} does not exist: check the path."


def test_path_that_is_neither_a_known_format_nor_a_hub_id(tmp_path):
    assert "does not exist" in error_of(read_conversations, str(tmp_path / "talks"), DATA)
    path = tmp_path / "talks.txt"
    path.write_text("hello", encoding="utf-8")
    assert "give one of .jsonl, .json, .csv, .parquet" in error_of(read_conversations, str(path), DATA)


@pytest.mark.parametrize(
    ("name", "text"), [("t.jsonl", ""), ("t.jsonl", "\n \n"), ("t.json", ""), ("t.json", "[]"), ("t.csv", "prompt\n")]
)
def test_empty_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path} holds no conversations: ")


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_invalid_utf8_names_the_line(tmp_path, name):
    path = tmp_path / name
    first = b"prompt,response" if name == "t.csv" else json.dumps(GOOD).encode()
    path.write_bytes(first + b'\n{"prompt": "\xff"}\n')
    assert error_of(read_conversations, str(path), DATA).startswith(f"{path}, line 2: not valid UTF-8: ")


def test_single_example(tmp_path):
    path = write_lines(tmp_path / "one.jsonl", [GOOD])
    assert read_single_example(path, DATA) == Conversation("one-1", (ASK, ANSWER))


def test_single_example_must_be_one_and_answered(tmp_path):
    path = write_lines(tmp_path / "one.jsonl", [GOOD, GOOD])
    assert error_of(read_single_example, path, DATA).startswith(f"{path} holds more than one example: ")
    path = write_lines(tmp_path / "one.jsonl", [])
    assert error_of(read_single_example, path, DATA).startswith(f"{path} holds no conversations: ")
    path = write_lines(tmp_path / "one.jsonl", [{"messages": [ASK]}])
    assert "the last message is not the assistant's" in error_of(read_single_example, path, DATA)
