"""What waits for a GPU, tried out without one: launches under ZeRO-3, and the one call that measures everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import gpu_checks
from gpu_checks import ROOT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu does this on it"),
]


def call(out: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """Run benchmarks/gpu.py; returns how it ended, and its records by part."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=out.parent)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done, {record["part"]: record for record in records}


def test_one_call_runs_its_parts_in_order_and_leaves_a_line_of_each(tmp_path: Path) -> None:
    done, found = call(tmp_path / "out", "--only", "stock-adamw-bf16", "rollback-bf16", "unsloth-lora")
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    assert list(found) == ["build", "rollback-bf16", "stock-adamw-bf16", "unsloth-lora", "ratios"]
    assert {record["card"] for record in found.values()} == {"cpu"}
    assert found["unsloth-lora"]["status"] == "not here"
    ours, stock = found["rollback-bf16"], found["stock-adamw-bf16"]
    assert (ours["status"], stock["status"]) == ("ok", "ok")
    assert ours["tokens"] == stock["tokens"]
    speedup = stock["seconds_per_step"] / ours["seconds_per_step"]
    assert found["ratios"]["step_speedup_rollback_over_adamw"] == round(speedup, 3)
    assert "dry run" in done.stdout
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["device"] == "cpu"


def test_one_rank_under_zero3(tmp_path: Path) -> None:
    damaged = gpu_checks.damaged("cpu", tmp_path / "damaged")
    gpu_checks.zero3_tensors_arrive("cpu", tmp_path / "loaded", four_bit=True)
    gpu_checks.zero3_repairs_alike("cpu", damaged, tmp_path / "repaired")
