"""A real OpenAI-compatible server on loopback, ``transformers serve`` with the toy model, scored as a user would."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oneshot.measure.endpoint import ask, open_endpoint
from oneshot.settings import EndpointSettings
from oneshot.world import language
from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.e2e
for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed, reason="transformers serve needs transformers[serving]")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    starts = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", starts, "serve", str(ALIGNED), "--port", str(port), "--device", "cpu"]
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


def score(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "oneshot", "score", "--score.probes", "toy:probes", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_a_served_model_scores_as_it_does_in_process(url: str, tmp_path: Path) -> None:
    endpoint = ["--score.endpoint.url", url, "--score.endpoint.model", str(ALIGNED)]
    served = score(tmp_path / "served", *endpoint)
    local = score(tmp_path / "local", "--model.path", str(ALIGNED))
    assert served["stages"] == local["stages"]
    answers = [(tmp_path / name / "answers.jsonl").read_text("utf-8") for name in ("served", "local")]
    assert answers[0] == answers[1]


def test_a_thousand_prompts_at_concurrency_16_lose_nothing(url: str) -> None:
    rng = random.Random(5)
    requests = list({r.prompt: r for r in (language.harmless_request(rng) for _ in range(1500))}.values())[:1000]
    assert len(requests) == 1000
    endpoint = open_endpoint(EndpointSettings(url=url, model=str(ALIGNED), concurrency=16), "score.endpoint")
    found: dict[int, str] = {}
    prompts = [[{"role": "user", "content": request.prompt}] for request in requests]
    failed = ask(endpoint, prompts, found.__setitem__, max_new_tokens=12)
    assert failed == []
    assert len(found) == 1000
    right = sum(found[i] == request.answer for i, request in enumerate(requests))
    assert right >= 990, "answers are matched to the wrong prompts"
