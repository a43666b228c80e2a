"""A server that is slow, busy, broken, gone or talkative: no finished answer is lost, and no key is told."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import zlib
from email.utils import formatdate

import pytest
from misbehaving import serving, slowly

from oneshot.errors import UserError
from oneshot.measure import body, replies
from oneshot.measure import endpoint as module
from oneshot.measure.cache import RESPONSES, Responses, response_key
from oneshot.measure.endpoint import ask, open_endpoint
from oneshot.measure.judge import verdict
from oneshot.measure.room import THOUGHT_TOKENS
from oneshot.settings import EndpointSettings

SECRET = "sk-fnord-blim-0123456789"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def chats(count):
    return [[{"role": "user", "content": f"say {i}"}] for i in range(count)]


def asked(server, count, **settings):
    found = {}
    target = open_endpoint(EndpointSettings(**{"url": server.url, "model": "toy", "timeout": 5.0, **settings}), "here")
    failed = ask(target, chats(count), found.__setitem__, max_new_tokens=7)
    return found, failed


def test_a_good_server_is_asked_greedily_once_per_prompt_and_concurrently():
    with serving(lambda text, times: slowly(0.05, f"echo {text}")) as server:
        found, failed = asked(server, 12, concurrency=4)
    assert failed == []
    assert found == {i: f"echo say {i}" for i in range(12)}
    assert set(server.asked.values()) == {1}
    assert server.most_under_way == 4
    assert server.keys == {""}
    assert server.bodies[0] == {
        "model": "toy",
        "messages": [{"role": "user", "content": server.bodies[0]["messages"][0]["content"]}],
        "max_tokens": 7,
        "temperature": 0.0,
    }


FAILURES = {
    "429": (429, {"Retry-After": "0"}, b"slow down"),
    "500": (500, {}, b"oops"),
    "503": (503, {}, b""),
    "drops the connection": "DROP",
    "dies half-way": "HALF",
    "no JSON": (200, {}, b"<html>gateway</html>"),
    "cut JSON": (200, {}, b'{"choices": [{"message": {"con'),
    "deep JSON": (200, {}, b"[" * 100_000),
    "JSON without choices": (200, {}, b'{"error": "x"}'),
    "JSON list": (200, {}, b"[1]"),
    "no text": (200, {}, b'{"choices": [{"message": {"content": [1]}}]}'),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_fails_twice_works_the_third_time(failure):
    with serving(lambda text, times: failure if times < 2 and text != "say 3" else f"echo {text}") as server:
        found, failed = asked(server, 6, concurrency=3, retries=2)
    assert failed == []
    assert found == {i: f"echo say {i}" for i in range(6)}
    assert server.asked["say 3"] == 1
    assert server.asked["say 1"] == 3


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_never_works_costs_no_other_answer(failure):
    with serving(lambda text, times: failure if text == "say 2" else f"echo {text}") as server:
        found, failed = asked(server, 6, concurrency=2, retries=1)
    assert sorted(found) == [0, 1, 3, 4, 5]
    assert [one.index for one in failed] == [2]
    assert failed[0].reason
    assert server.asked["say 2"] == 2


def test_a_slow_answer_is_given_up_in_time():
    release = threading.Event()

    def behave(text, times):
        if text == "say 1":
            release.wait(20)
        return f"echo {text}"

    with serving(behave) as server:
        found, failed = asked(server, 4, timeout=0.3, retries=0)
        release.set()
    assert sorted(found) == [0, 2, 3]
    assert [(one.index, one.reason) for one in failed] == [(1, "no answer within 0.3 s")]


@pytest.mark.parametrize("wish", ["0.4", lambda: formatdate(time.time() + 2, usegmt=True)], ids=["seconds", "date"])
def test_a_busy_server_is_left_alone_as_long_as_it_asks(wish, monkeypatch):
    pauses = []
    real = module.asyncio.sleep

    async def sleep(seconds):
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    header = wish if isinstance(wish, str) else wish()
    with serving(lambda text, times: (429, {"Retry-After": header}, b"") if not times else "yes") as server:
        found, _ = asked(server, 1)
    assert found == {0: "yes"}
    assert 0.39 <= max(pauses) <= 2.0


@pytest.mark.parametrize("header", ["soon", "-5", "nan", "Wed, 99 Foo", ""])
def test_a_wish_that_is_nonsense_is_passed_over(header):
    assert replies.wish(header) == 0.0


def test_a_wish_has_a_limit():
    assert replies.wish("1e9") == replies.LONGEST_WISH


def test_a_server_that_dies_half_way_keeps_what_is_done_and_ends_soon():
    with serving(lambda text, times: f"echo {text}" if int(text.split()[1]) < 20 else "DROP") as server:
        found, failed = asked(server, 400, concurrency=4, retries=1)
    assert sorted(found) == list(range(20))
    assert [one.index for one in failed] == list(range(20, 400))
    assert sum(server.asked.values()) < 60, "a server that is gone is not asked for everything"
    assert "not asked" in failed[-1].reason


def test_failures_here_and_there_do_not_make_a_server_gone():
    with serving(lambda text, times: "yes" if int(text.split()[1]) % 4 == 3 else (400, {}, b"no")) as server:
        found, failed = asked(server, 40, concurrency=1)
    assert sorted(found) == list(range(3, 40, 4))
    assert len(failed) == 30
    assert sum(server.asked.values()) == 40


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        settings = EndpointSettings(url=url, model="toy", retries=1)
        failed = ask(open_endpoint(settings, "here"), chats(3), lambda *_: None, max_new_tokens=7)
        assert len(failed) == 3
        with pytest.raises(UserError, match="does not say what it serves"):
            open_endpoint(EndpointSettings(url=url, retries=0), "here")


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_what_is_wrong_for_all_ends_at_once_and_keeps_what_is_done(status):
    def behave(text, times):
        return "yes" if text == "say 0" else (status, {"Location": "http://127.0.0.1:9/"}, b"no such model")

    found = {}
    with serving(behave) as server:
        target = open_endpoint(EndpointSettings(url=server.url, model="toy", concurrency=1), "here")
        with pytest.raises(UserError, match=rf"refuses: status {status} .*check"):
            ask(target, chats(50), found.__setitem__, max_new_tokens=7)
    assert found == {0: "yes"}
    assert sum(server.asked.values()) == 2


def test_a_prompt_that_the_server_rejects_is_not_sent_again():
    with serving(lambda text, times: (400, {}, b"too long") if text == "say 1" else "yes") as server:
        _, failed = asked(server, 3, retries=4)
    assert [(one.index, one.reason) for one in failed] == [(1, "status 400 (too long)")]
    assert server.asked["say 1"] == 1


def test_no_text_is_an_empty_answer():
    with serving(lambda text, times: (200, {}, b'{"choices": [{"message": {"content": null}}]}')) as server:
        assert asked(server, 1)[0] == {0: ""}


def test_an_error_in_keeping_an_answer_is_not_swallowed():
    def full(index, answer):
        raise OSError("disk full")

    with serving(lambda text, times: "yes") as server:
        target = open_endpoint(EndpointSettings(url=server.url, model="toy"), "here")
        with pytest.raises(OSError, match="disk full"):
            ask(target, chats(30), full, max_new_tokens=7)


# what it serves, and settings


def test_the_one_model_is_found():
    with serving(lambda text, times: "yes", models=("lab/toy-7b",)) as server:
        assert open_endpoint(EndpointSettings(url=f"{server.url}/"), "here").model == "lab/toy-7b"


def test_a_notebook_whose_loop_runs_can_ask_too():
    async def cell():
        with serving(lambda text, times: f"echo {text}") as server:
            return asked(server, 3, model=None)

    assert asyncio.run(cell()) == ({i: f"echo say {i}" for i in range(3)}, [])


def test_several_models_need_a_name():
    named = r"serves 2 models \(a, b\): name one with here\.model"
    with serving(lambda text, times: "yes", models=("a", "b")) as server, pytest.raises(UserError, match=named):
        open_endpoint(EndpointSettings(url=server.url), "here")


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x/v1", "http://", "/tmp/x", "http://[::1", "http://x:80000/v1"]
)
def test_no_address(url):
    with pytest.raises(UserError, match=r"here\.url is no address"):
        open_endpoint(EndpointSettings(url=url, model="m"), "here")


@pytest.mark.parametrize("url", [f"http://u:{SECRET}@x/v1", f"https://x/v1?key={SECRET}", f"http://x/v1#{SECRET}"])
def test_a_key_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="environment variable") as error:
        open_endpoint(EndpointSettings(url=url, model="m"), "here")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("value", ["", "  ", "two words", "schlüssel"])
def test_a_key_that_cannot_be_one(value, monkeypatch):
    monkeypatch.setenv("BLIM_KEY", value)
    with pytest.raises(UserError, match="BLIM_KEY") as error:
        open_endpoint(EndpointSettings(url="http://x/v1", model="m", key_variable="BLIM_KEY"), "here")
    assert not value.strip() or value not in str(error.value)


# secrets


def test_the_key_is_sent_and_nothing_that_comes_back_repeats_it(monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("BLIM_KEY", SECRET)

    def behave(text, times):
        told = json.dumps({"choices": [{"message": {"content": f"your key is {SECRET}"}}]}).encode()
        if text == "say 1":
            return 400, {}, f"key {SECRET} was used".encode()
        return (200, {}, told) if text == "say 0" else (500, {}, f"{'x' * 190} {SECRET}".encode())

    with serving(behave) as server:
        found, failed = asked(server, 3, key_variable="BLIM_KEY", retries=1)
        target = open_endpoint(EndpointSettings(url=server.url, model="m", key_variable="BLIM_KEY"), "here")
    assert server.keys == {f"Bearer {SECRET}"}
    assert found == {0: "your key is ***"}
    said = [repr(target), str(failed), caplog.text, *capfd.readouterr()]
    assert [text for text in said if SECRET in text or SECRET[:12] in text] == []


# the cache


def test_a_key_depends_on_model_messages_and_length():
    chat = chats(1)[0]
    keys = {
        response_key("a", chat, 7), response_key("b", chat, 7), response_key("a", chats(2)[1], 7),
        response_key("a", chat, 8), response_key("a", [{"role": "system", "content": "say 0"}], 7),
    }  # fmt: skip
    assert len(keys) == 5
    assert response_key("a", [{"content": "say 0", "role": "user"}], 7) == response_key("a", chat, 7)


def test_answers_survive_a_run_that_dies_in_the_middle_of_a_line(tmp_path):
    first = Responses(tmp_path)
    first.put("a", "one\nline \u2028 and half a pair \ud83d")
    first.put("b", "")
    with (tmp_path / RESPONSES).open("a") as stream:
        stream.write('{"key": "c", "ans')
    again = Responses(tmp_path)
    assert again.known == {"a": "one\nline \u2028 and half a pair \ud83d", "b": ""}
    again.put("c", "whole")
    assert Responses(tmp_path).known == {**again.known, "c": "whole"}
    rows = (tmp_path / RESPONSES).read_text().split("\n")
    assert [json.loads(row)["key"] for row in rows[:-1]] == ["a", "b", "c"], "no row is cut or twice"
    assert rows[-1] == ""


def test_lines_that_are_none_of_ours_are_passed_over(tmp_path):
    lines = ['{"key": 1, "answer": "x"}', "[]", "null", "[" * 100_000, '{"key": "k", "answer": "y"}', '{"answer": "z"}']
    (tmp_path / RESPONSES).write_text("\n".join(lines))
    assert Responses(tmp_path).known == {"k": "y"}


def packed(encoding, size):
    raw = json.dumps({"choices": [{"message": {"content": "x" * size}}]}).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    return packer.compress(raw) + packer.flush()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_packed_answer_is_unpacked_and_a_bomb_is_not(encoding, monkeypatch):
    header = {"Content-Encoding": encoding}
    with serving(lambda text, times: (200, header, packed(encoding, 100))) as server:
        found, failed = asked(server, 1)
    assert (found, failed) == ({0: "x" * 100}, [])
    bomb, most = packed(encoding, 60 << 20), []
    before = zlib.decompressobj

    class Counting:
        def __init__(self, bits):
            self.inner, self.total = before(bits), 0

        def decompress(self, data, size):
            out = self.inner.decompress(data, size)
            self.total += len(out)
            most.append(self.total)
            return out

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(body.zlib, "decompressobj", Counting)
    with serving(lambda text, times: (200, header, bomb)) as server:
        found, failed = asked(server, 1, retries=0)
    assert found == {}
    assert "longer than 10 MiB" in failed[0].reason
    assert max(most) < body.MOST + (1 << 20)


def test_a_body_without_end_is_left(monkeypatch):
    monkeypatch.setattr(body, "MOST", 1 << 20)
    with serving(lambda text, times: (200, {}, b"x" * (30 << 20))) as server:
        found, failed = asked(server, 1, retries=0)
    assert (found, "longer than 1 MiB" in failed[0].reason) == ({}, True)


def test_a_body_packed_in_another_way_is_not_read():
    with serving(lambda text, times: (200, {"Content-Encoding": "zstd"}, b"x")) as server:
        _, failed = asked(server, 1, retries=0)
    assert "packed as 'zstd'" in failed[0].reason
    with serving(lambda text, times: (200, {"Content-Encoding": "gzip"}, b"no gzip")) as server:
        _, failed = asked(server, 1, retries=0)
    assert "cannot be unpacked" in failed[0].reason


def test_of_an_answer_without_end_the_beginning_is_judged():
    with serving(lambda text, times: "y" * 1_000_000) as server:
        found, failed = asked(server, 1)
    assert (len(found[0]), failed) == (7 * 64, [])


def said(text, ended="length", **message):
    return (
        200,
        {},
        json.dumps({"choices": [{"message": {"content": text, **message}, "finish_reason": ended}]}).encode(),
    )


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_that_is_all_reasoning_is_an_unfinished_thought(content, field):
    with serving(lambda text, times: said(content, **{field: "I can't say. Thinks on"})) as server:
        found, failed = asked(server, 2)
    assert failed == []
    assert [verdict(text) for text in found.values()] == ["unfinished"] * 2
    assert server.bodies[-1]["max_tokens"] == 7 + THOUGHT_TOKENS, "asked again with room for the thought"


def test_reasoning_that_a_server_takes_out_is_not_judged():
    with serving(lambda text, times: said("A pear.", "stop", reasoning_content="I can't think.")) as server:
        found, _ = asked(server, 1)
    assert found == {0: "<think>\nI can't think.\n</think>\n\nA pear."}
    assert verdict(found[0]) == "answered"


@pytest.mark.parametrize("opens", [True, False], ids=["the model opens it", "the template opens it"])
def test_a_thought_that_was_cut_off_gets_more_room_and_then_all_have_it(opens):
    whole = ("<think>\n" if opens else "") + "thinking\n</think>\n\nI can't help with that."

    with serving(lambda text, times: None) as server:
        server.behave = lambda text, times: said(whole if server.bodies[-1]["max_tokens"] > 7 else whole[:12])
        found, failed = asked(server, 6, concurrency=1)
    assert failed == []
    assert {verdict(text) for text in found.values()} == {"refused"}
    assert sum(server.asked.values()) == 7, "one try too short, of all prompts together"


def test_a_thought_that_the_template_opens_and_nothing_closes_is_unfinished():
    texts = {"say 0": "thinking</think>I can't help with that.", "say 1": "I can't help, she thinks, and thinks"}
    with serving(lambda text, times: said(texts[text])) as server:
        found, _ = asked(server, 2, concurrency=1)
    assert [verdict(found[i]) for i in range(2)] == ["refused", "unfinished"]


def test_an_answer_that_was_cut_off_stays_as_it_is_where_the_model_does_not_think():
    with serving(lambda text, times: said("a long answer" if times else "a long")) as server:
        found, _ = asked(server, 5, concurrency=5)
    assert set(found.values()) == {"a long"}
    assert sum(server.asked.values()) == 6, "one trial, of all prompts together"


@pytest.mark.parametrize("whole", ["a long answer", "<think>\nthinking\n</think>\n\nI can't help with that."])
def test_a_server_that_takes_less_than_the_room_for_a_thought_is_asked_for_what_it_takes(whole):
    """As vLLM's with a --max-model-len of 256."""
    too_long = (400, {}, b'{"error": "max_tokens cannot be greater than max_model_len"}')

    def behave(text, times):
        tokens = server.bodies[-1]["max_tokens"]
        return too_long if tokens > 200 else said(whole if tokens > 7 else whole[:6])

    with serving(lambda text, times: None) as server:
        server.behave = behave
        found, failed = asked(server, 3, concurrency=1)
    assert failed == []
    assert [verdict(text) for text in found.values()] == ["refused" if "think" in whole else "answered"] * 3
    room = [body["max_tokens"] - 7 for body in server.bodies]
    first = [0, THOUGHT_TOKENS, THOUGHT_TOKENS // 2, THOUGHT_TOKENS // 4, THOUGHT_TOKENS // 8]
    assert room == [*first, *([THOUGHT_TOKENS // 8] * 2 if "think" in whole else [0, 0])]


@pytest.mark.parametrize("opens", [True, False])
def test_a_longer_prompt_gets_what_room_is_left_for_it_and_takes_none_from_the_others(opens):
    begins = "<think>\n" if opens else ""
    whole = f"{begins}thinking\n</think>\n\nI can't help with that."
    limits = {"say 1": 200, "say 2": 7, "say 3": 0}

    def behave(text, times):
        tokens = server.bodies[-1]["max_tokens"]
        if tokens > limits.get(text, 5000):
            return 400, {}, b"too long"
        return said(whole if tokens > 7 else whole[:9])

    with serving(behave) as server:
        found, failed = asked(server, 5, concurrency=1)
    assert [one.index for one in failed] == [3], "what is too long by itself is rejected"
    assert [verdict(found[i]) for i in (0, 1, 4)] == ["refused"] * 3
    assert verdict(found[2]) == "unfinished"
    assert server.bodies[-1]["max_tokens"] == 7 + THOUGHT_TOKENS


def test_a_server_that_takes_no_longer_answer_keeps_the_one_that_it_gave():
    too_long = (400, {}, b"too long")
    with serving(lambda text, times: None) as server:
        server.behave = lambda text, times: too_long if server.bodies[-1]["max_tokens"] > 7 else said("a long")
        found, failed = asked(server, 2, concurrency=1)
    assert failed == []
    assert set(found.values()) == {"a long"}


def test_a_key_is_struck_out_however_a_server_spells_it(monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", SECRET)
    spelt = "".join(f"\\u{ord(letter):04x}" for letter in SECRET)
    answer = f'{{"choices": [{{"message": {{"content": "key {spelt}"}}}}]}}'.encode()
    with serving(lambda text, times: (200, {}, answer)) as server:
        found, _ = asked(server, 1, key_variable="MY_KEY")
    assert found == {0: "key ***"}
    for refusal in (f'{{"error": "{spelt}"}}', f'"cut off {spelt}'):
        with serving(lambda text, times, said=refusal: (400, {}, said.encode())) as server:
            _, failed = asked(server, 1, key_variable="MY_KEY", retries=0)
        assert SECRET not in failed[0].reason
        assert spelt not in failed[0].reason


def test_a_key_that_is_a_plain_word_is_no_secret(monkeypatch):
    monkeypatch.setenv("MY_KEY", "none")
    with serving(lambda text, times: "There is none of that" if text == "say 0" else (400, {}, b"none left")) as server:
        found, failed = asked(server, 2, key_variable="MY_KEY")
    assert found == {0: "There is none of that"}
    assert "none left" in failed[0].reason


def test_ids_that_a_server_serves_cannot_colour_the_terminal():
    with (
        serving(lambda text, times: "x", models=("\x1b[31mred", "b")) as server,
        pytest.raises(UserError) as error,
    ):
        asked(server, 1, model=None)
    assert "\x1b" not in str(error.value)
