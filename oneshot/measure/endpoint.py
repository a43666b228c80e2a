"""Answers from a server that speaks the OpenAI chat protocol, however badly it behaves.

What goes wrong on the way, and what the server cannot do for now, is tried again after growing pauses. An answer is
handed on the moment it is there, so that nothing that comes later can lose it. The key is read from the environment,
sent in one header, and struck out of everything that the server says.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from oneshot.distributed.steps import steps
from oneshot.distributed.watchdog import alive
from oneshot.errors import UserError
from oneshot.measure.body import ACCEPTED, TooMuch, read_body
from oneshot.measure.replies import OF_THIS_REQUEST, Failed, answer_in, short, wish, without_key
from oneshot.measure.room import THOUGHT_TOKENS, Room
from oneshot.settings import EndpointSettings

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a further try; the pause doubles each time
_WISE_TO_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_OF_ALL_REQUESTS = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})  # wrong for one, wrong for all


@dataclass(frozen=True)
class Endpoint:
    """A server that is ready to be asked.

    Attributes:
        url: up to /v1, without a slash at its end
        model: name under which it serves the model
        key: sent as a bearer token; "" for none
        settings: how patient to be
    """

    url: str
    model: str
    settings: EndpointSettings
    key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Unanswered:
    """A request that stays without an answer: its place, why, and whether the server would have none of it."""

    index: int
    reason: str
    rejected: bool = False


def open_endpoint(settings: EndpointSettings, name: str) -> Endpoint:
    """Check the settings, take the key from the environment, and find out what the server serves.

    Args:
        name: of the settings, for messages, such as score.endpoint

    Raises:
        UserError: an address with a key in it or without http, no such environment variable, a server that cannot be
            reached, or that serves several models while the settings name none
    """
    assert settings.url is not None
    try:
        parts = urlsplit(settings.url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, or a port that there is not
        whole = False
    if not whole:
        raise UserError(f"Setting {name}.url is no address: give one such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"Setting {name}.url holds more than an address, and it is written into the run folder: put a key into an "
            f"environment variable and name that with {name}.key_variable."
        )
    key = ""
    if settings.key_variable is not None:
        key = os.environ.get(settings.key_variable, "").strip()
        if not key:
            raise UserError(f"Environment variable {settings.key_variable}, which {name}.key_variable names, is empty.")
        if not key.isascii() or any(character.isspace() for character in key):
            raise UserError(f"Environment variable {settings.key_variable} holds no key: it has spaces or odd letters.")
    found = Endpoint(settings.url.rstrip("/"), settings.model or "", settings, key)
    return found if settings.model else Endpoint(found.url, _finished(_served(found, name)), settings, key)


def ask(
    endpoint: Endpoint,
    prompts: Sequence[list[dict[str, str]]],
    on_answer: Callable[[int, str], None],
    *,
    max_new_tokens: int,
    thought_tokens: int = THOUGHT_TOKENS,
    what: str = "answers",
) -> list[Unanswered]:
    """Ask all prompts, ``concurrency`` at a time, greedily; call ``on_answer(index, answer)`` as each answer arrives.

    Once as many requests in a row as are under way at a time (and at least 4) have failed for good, the server is
    taken for gone and the rest is not asked.

    Args:
        prompts: chat messages of each prompt
        on_answer: called one at a time
        max_new_tokens: longest answer
        thought_tokens: how many more the model may say where it thinks before it answers
        what: the answers are called while one waits for them

    Returns:
        the prompts that have no answer, in their order

    Raises:
        UserError: the server refuses the key, the model or the address
    """
    if not prompts:
        return []
    with steps(what, len(prompts), "prompts") as going:

        def told(index: int, answer: str) -> None:
            on_answer(index, answer)
            going.add()

        return _finished(_ask_all(endpoint, prompts, told, max_new_tokens, thought_tokens))


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns; where this thread has a loop, as a notebook has, by one in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:  # in the same context: phases and steps count on
        return thread.submit(contextvars.copy_context().run, lambda: asyncio.run(work)).result()


async def _ask_all(
    endpoint: Endpoint,
    prompts: Sequence[list[dict[str, str]]],
    on_answer: Callable[[int, str], None],
    max_new_tokens: int,
    thought_tokens: int,
) -> list[Unanswered]:
    waiting = iter(range(len(prompts)))
    failures: dict[int, Failed] = {}
    answered: set[int] = set()
    in_a_row, enough, room = 0, max(4, endpoint.settings.concurrency), Room(max_new_tokens, thought_tokens)

    async def work(client: httpx2.AsyncClient) -> None:
        nonlocal in_a_row
        for index in waiting:
            if in_a_row >= enough:
                return
            messages = [{name: message[name] for name in ("role", "content")} for message in prompts[index]]
            try:
                answer = await room.answer(functools.partial(_completion, client, endpoint, messages))
            except Failed as failure:
                if failure.status in _OF_ALL_REQUESTS:
                    raise
                failures[index] = failure
                rejected = failure.status in OF_THIS_REQUEST
                # of a server that has taken none yet, it need not be the prompts that are wrong
                in_a_row += not (rejected and (answered or endpoint.settings.leave_out_rejected))
                continue
            in_a_row = 0
            answered.add(index)
            on_answer(index, answer)
            alive()

    async with _client(endpoint) as client:
        workers = [asyncio.create_task(work(client)) for _ in range(min(endpoint.settings.concurrency, len(prompts)))]
        try:
            await asyncio.gather(*workers)
        except Failed as failure:
            raise UserError(
                f"{endpoint.url} refuses: {failure}: check the address, the model's name and the key."
            ) from (failure)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    given_up = Failed("not asked, as the requests before it failed", again=True)
    left = {i: failures.get(i, given_up) for i in range(len(prompts)) if i not in answered}
    return [Unanswered(i, str(why), rejected=why.status in OF_THIS_REQUEST) for i, why in left.items()]


async def _completion(
    client: httpx2.AsyncClient, endpoint: Endpoint, messages: list[dict[str, str]], tokens: int
) -> Any:
    """The chat completion of one prompt, of at most so many tokens."""
    body = {"model": endpoint.model, "messages": messages, "max_tokens": tokens, "temperature": 0.0}
    return await _patiently(client, endpoint, "chat/completions", body)


async def _patiently(client: httpx2.AsyncClient, endpoint: Endpoint, path: str, body: dict[str, Any] | None) -> Any:
    """One request, tried until it works or trying is no longer wise; returns the parsed JSON."""
    for attempt in range(endpoint.settings.retries + 1):
        try:
            found = await asyncio.wait_for(_once(client, endpoint, path, body), endpoint.settings.timeout)
            if body is not None:
                answer_in(found)
            return found
        except asyncio.TimeoutError:
            failure = Failed(f"no answer within {endpoint.settings.timeout:g} s", again=True)
        except Failed as error:
            failure = error
        if not failure.again or attempt == endpoint.settings.retries:
            raise failure
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(
            0.5, 1.0
        )  # or all would come back at once
        await asyncio.sleep(max(pause, failure.after))
    raise AssertionError("the last try returns or raises")


async def _once(client: httpx2.AsyncClient, endpoint: Endpoint, path: str, body: dict[str, Any] | None) -> Any:
    import httpx2

    method, address = "GET" if body is None else "POST", f"{endpoint.url}/{path}"
    status = 0
    try:
        async with client.stream(method, address, json=body) as response:
            status, headers = response.status_code, response.headers
            raw = await read_body(response.aiter_raw(), headers.get("content-encoding", ""))
    except TooMuch as error:
        wise = status == 200 or status in _WISE_TO_RETRY
        raise Failed(f"status {status} with a body that is not read: {error}", again=wise, status=status) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        said = f" ({short(str(error), endpoint.key)})" if str(error) else ""
        raise Failed(f"{type(error).__name__}{said}", again=True) from None
    text = raw.decode("utf-8", errors="replace")
    if status != 200:
        raise Failed(
            f"status {status} ({short(text, endpoint.key) or 'nothing said'})",
            again=status in _WISE_TO_RETRY,
            after=wish(headers.get("retry-after")),
            status=status,
        )
    try:
        return without_key(json.loads(text), endpoint.key)
    except (ValueError, RecursionError):
        raise Failed("an answer that is no JSON", again=True) from None


async def _served(endpoint: Endpoint, name: str) -> str:
    """The one model that the server serves."""
    async with _client(endpoint) as client:
        try:
            found = await _patiently(client, endpoint, "models", None)
            served = [str(entry["id"]) for entry in found["data"]]
        except Failed as failure:
            raise UserError(f"{endpoint.url} does not say what it serves: {failure}: start or name the server.") from (
                failure
            )
        except (TypeError, LookupError):
            served = []
    if len(served) != 1:
        listed = f" ({', '.join(short(one, endpoint.key) for one in served[:5])})" if served else ""
        raise UserError(
            f"{endpoint.url} serves {len(served) or 'no known'} models{listed}: name one with {name}.model."
        )
    return served[0]


def _client(endpoint: Endpoint) -> httpx2.AsyncClient:
    import httpx2

    headers = {"Accept-Encoding": ACCEPTED, **({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})}
    # the whole try has its own time limit; redirects are not followed, so that the key goes nowhere else
    limits = httpx2.Limits(max_connections=endpoint.settings.concurrency)
    return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, follow_redirects=False)
