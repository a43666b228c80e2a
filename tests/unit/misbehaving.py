"""A chat server on loopback that misbehaves as it is told: an answer, or how to fail, per request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Misbehaving(ThreadingHTTPServer):
    """Calls ``behave(text, times)`` for each request: the last user message, and how often it was asked before.

    What it returns: a text is the answer; (status, headers, body) is sent as it is; "DROP" closes the connection at
    once; "HALF" closes it in the middle of the body.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave: Callable[[str, int], Any], models: tuple[str, ...] = ("toy",)) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.models = behave, models
        self.lock = threading.Lock()
        self.asked: dict[str, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Misbehaving
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {}, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            times = server.asked.get(text, 0)
            server.asked[text] = times + 1
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization", ""))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self._reply(server.behave(text, times))
        finally:
            with server.lock:
                server.under_way -= 1

    def _reply(self, what: Any) -> None:
        if what == "DROP":
            self.close_connection = True
            self.connection.shutdown(2)
        elif isinstance(what, tuple):
            self._send(*what)
        else:
            answer = {"choices": [{"message": {"role": "assistant", "content": "half" if what == "HALF" else what}}]}
            raw = json.dumps(answer).encode()
            if what == "HALF":
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw[: len(raw) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
            else:
                self._send(200, {}, raw)

    def _send(self, status: int, headers: dict[str, str], raw: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextlib.contextmanager
def serving(behave: Callable[[str, int], Any], **options: Any) -> Iterator[Misbehaving]:
    """Serve in a thread for the block."""
    server = Misbehaving(behave, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def slowly(seconds: float, answer: str) -> str:
    time.sleep(seconds)
    return answer
