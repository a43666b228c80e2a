"""A real vLLM, in an environment of its own: ``ONESHOT_VLLM`` names its ``vllm`` program, ``make serve-test`` sets it.

Without one the tests are skipped, and say why.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
STARTS = 300.0  # seconds; vLLM imports for half a minute where the disk is cold
# one GB of cache; adapters may come and go
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
PLAIN = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serve)


@pytest.fixture(scope="session")
def vllm() -> str:
    """The program."""
    found = shutil.which(os.environ.get("ONESHOT_VLLM", "vllm"))
    if found is None:
        pytest.skip("no vLLM: ONESHOT_VLLM names its program (make serve-test installs one of its own)")
    return found


class Server:
    """A server that runs: where it is, and what it is asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"

    def post(self, path: str, **fields: Any) -> str:
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return str(response.read().decode())

    def continued(self, model: str, prompts: list[list[int]], tokens: int) -> list[str]:
        """Greedy continuations of prompts of token ids, without spaces, which not all ways to decode tell alike."""
        answer = json.loads(
            self.post("completions", model=model, prompt=prompts, max_tokens=tokens, temperature=0, ignore_eos=True)
        )
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [choice["text"].replace(" ", "") for choice in choices]

    def models(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/models", timeout=60) as response:
            return [model["id"] for model in json.loads(response.read())["data"]]


@contextlib.contextmanager
def serving(vllm: str, log: Path, arguments: list[str]) -> Iterator[Server]:
    """Start ``vllm serve``, wait until it answers, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | QUIET
    with log.open("w") as stream:
        command = [vllm, "serve", *arguments, *PLAIN, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + STARTS
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                time.sleep(0.5)
            else:
                pytest.fail(f"vLLM did not start: {' '.join(command)}\n{log.read_text()[-3000:]}")
            yield Server(port)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
