"""lm-eval's harness on the toy model, offline, with a task of our own definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toytask import write_task

from oneshot.world import language
from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.e2e
pytest.importorskip("lm_eval", reason="needs the extra eval")

ROOT = Path(__file__).parents[2]
SECRET = "sk-fnord-blim-0123456789"


class Chat(BaseHTTPRequestHandler):
    """A chat server that answers harmless requests rightly and all others "no", after a failure that tells the key."""

    keys: ClassVar[set[str]] = set()
    seen: ClassVar[set[str]] = set()

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.add(self.headers.get("Authorization", ""))
        text = body["messages"][-1]["content"]
        words = text.split()
        answer = language.right_answer(words[1], words[-4]) if words[0] == "please" else "no"
        choice = {"index": 0, "message": {"role": "assistant", "content": f"{answer}\nand more"}}
        failing = text not in self.seen
        self.seen.add(text)
        raw = f"bad key {SECRET}".encode() if failing else json.dumps({"choices": [choice]}).encode()
        self.send_response(500 if failing else 200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def scored(out: Path, *arguments: str, **variables: str) -> tuple[dict[str, Any], str]:
    """The rate of the task in report.json, and what was printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out.parent / "home"), "OMP_NUM_THREADS": "1"}
    tasks = [
        "--score.probes",
        "toy:probes",
        "--score.lm_eval",
        "toyworld",
        "--score.lm_eval_folder",
        str(write_task(out.parent / "tasks")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "oneshot", "score", *tasks, "--out", str(out), *arguments],
        cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text("utf-8"))
    return report["stages"]["model"]["toyworld_exact_match (lm-eval)"], done.stdout + done.stderr


def test_its_figures_stand_in_our_table(tmp_path: Path) -> None:
    rate, printed = scored(tmp_path / "run", "--model.path", str(ALIGNED))
    # the 20 harmless requests are answered right, and the 20 of the new task, which it never saw, are not
    assert (rate["value"], rate["n"]) == (0.5, 40)
    assert 0.3 < rate["low"] < 0.5 < rate["high"] < 0.7
    assert "toyworld exact match (lm-eval)" in printed


def test_it_runs_on_a_server_too_and_tells_no_key(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        endpoint = ["--score.endpoint.url", url, "--score.endpoint.model", "toy", "--score.endpoint.concurrency", "32"]
        key = ["--score.endpoint.key_variable", "BLIM_KEY"]
        rate, printed = scored(tmp_path / "run", *endpoint, *key, BLIM_KEY=SECRET, NO_PROXY="127.0.0.1")
        server.shutdown()
    assert (rate["value"], rate["n"]) == (0.5, 40)
    assert Chat.keys == {f"Bearer {SECRET}"}
    texts = [path.read_text("utf-8") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [text[:80] for text in [*texts, printed] if SECRET in text] == []
