"""The checks of tests/gpu on the CPU, at tiny sizes: whoever has a GPU for ten minutes is not to find typos in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import gpu_checks
from gpu_checks import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu makes these checks on it")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checks.damaged("cpu", tmp_path_factory.mktemp("damaged") / "run")


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights(tmp_path: Path, double: bool) -> None:
    gpu_checks.four_bit_weights_are_the_cpus("cpu", tmp_path / "m", double=double)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_kernels(tmp_path: Path, dtype: str) -> None:
    gpu_checks.four_bit_layers_multiply("cpu", tmp_path / "m", dtype)
    gpu_checks.tensors_arrive("cpu", tmp_path / "n", dtype)
    gpu_checks.attention_is_alike("cpu", tmp_path / "a", dtype, wanted="sdpa")


@pytest.mark.parametrize(("method", "dtype"), [("rollback", "float16"), ("lowrank", "bfloat16"), ("lora", "float32")])
def test_repair(damaged: Path, tmp_path: Path, method: str, dtype: str) -> None:
    gpu_checks.repairs("cpu", damaged, tmp_path / "run", dtype, method=method, learning_rate={"lora": 1e-2})


def test_repair_in_four_bits_under_the_watch(damaged: Path, tmp_path: Path) -> None:
    gpu_checks.repairs("cpu", damaged, tmp_path / "run", "float32", method="rollback", quantize="nf4", watch=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetune(tmp_path: Path, method: str) -> None:
    found = gpu_checks.finetunes("cpu", tmp_path / "run", method)
    gpu_checks.tells_mfu("cpu", found)


@pytest.mark.parametrize("method", ["lowrank", "lora"])
def test_memory_beside_the_plan(tmp_path: Path, method: str) -> None:
    measured, planned = gpu_checks.memory_is_as_planned("cpu", tmp_path / "m", gpu_checks.TINY, method)
    assert measured > 0
    assert planned > 0


def test_without_a_gpu_the_tier_is_collected_and_every_test_says_why_it_is_skipped() -> None:
    words = ["-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    assert "skipped" in last
    assert "passed" not in last
    assert "needs an NVIDIA GPU that torch can use" in done.stdout
