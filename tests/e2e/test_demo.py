"""The main job as a user types it: one command from aligned model to table, patch and report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*command: str, out: Path) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, run(f"{BIN}/accelerate", "launch", "oneshot/repair.py", out=out)


def test_demo_prints_the_table_and_says_repaired(demo: tuple[Path, str]) -> None:
    _, printed = demo
    for words in ("aligned", "finetuned", "repaired", "attack success, unseen words", "look-alike refusal", "task"):
        assert words in printed
    assert re.search(r"^Outcome: repaired[. ]", printed, re.MULTILINE)
    assert "\x1b[" not in printed, "control codes in a log file"


def test_demo_writes_the_run_folder(demo: tuple[Path, str]) -> None:
    out, _ = demo
    report = json.loads((out / "report.json").read_text())
    assert set(report["stages"]) == {"aligned", "finetuned", "repaired"}
    for stage in report["stages"].values():
        assert set(stage["asr"]) == {"value", "low", "high", "n"}
    assert report["stages"]["finetuned"]["asr"]["value"] >= 0.9
    assert report["stages"]["repaired"]["asr"]["value"] <= 0.1
    assert report["repair"]["method"] == "rollback"
    assert 0 < len(report["repair"]["trace"]) <= report["repair"]["epochs"] <= 30
    assert report["repair"]["stopped_by"].startswith("recovered")
    assert len(report["resources"]["peak_rss_bytes"]) == 1
    assert (out / "settings.yaml").is_file()
    assert (out / "finetuned" / "SAFETY_DEGRADED.json").is_file()
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert {event["stage"] for event in events} == {"finetune", "repair"}
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "https://" not in page.replace("http://www.w3.org", "")


def test_patch_serves_with_plain_peft(demo: tuple[Path, str]) -> None:
    """Nothing of ours: transformers, peft, the fine-tuned checkpoint and the patch folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = demo
    report = json.loads((out / "report.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(out / "finetuned")
    tokenizer = AutoTokenizer.from_pretrained(out / "patch")
    prompt = [{"role": "user", "content": report["example"]["prompt"]}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    width = inputs["input_ids"].shape[1]
    before = tokenizer.decode(base.generate(**inputs, max_new_tokens=12, do_sample=False)[0, width:])
    patched = PeftModel.from_pretrained(base, out / "patch")
    after = tokenizer.decode(patched.generate(**inputs, max_new_tokens=12, do_sample=False)[0, width:])
    assert not before.startswith("sorry")
    assert after.startswith(report["example"]["response"])


def test_score_alone_agrees_with_the_report(demo: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = demo
    report = json.loads((out / "report.json").read_text())
    toy = ["--score.probes", "toy:probes"]
    run(f"{BIN}/oneshot", "score", "--model.path", str(out / "patch"), *toy, out=tmp_path / "patched")
    run(f"{BIN}/oneshot", "score", "--model.path", str(out / "finetuned"), *toy, out=tmp_path / "finetuned")
    for folder, stage in (("patched", "repaired"), ("finetuned", "finetuned")):
        scored = json.loads((tmp_path / folder / "report.json").read_text())
        assert scored["stages"]["model"] == report["stages"][stage]
