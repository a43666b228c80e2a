"""Whole runs on a GPU, in one process: the fine-tune and the repair of the toy model."""

from __future__ import annotations

from pathlib import Path

import gpu_checks
import pytest


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checks.damaged("cuda", tmp_path_factory.mktemp("damaged") / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["rollback", "lowrank"])
def test_repair(damaged: Path, tmp_path: Path, method: str, dtype: str) -> None:
    gpu_checks.repairs("cuda", damaged, tmp_path / "run", dtype, method=method)


@pytest.mark.parametrize("method", ["sft", "lora", "project"])
def test_repair_with_the_other_methods(damaged: Path, tmp_path: Path, method: str) -> None:
    rates = {"sft": 1e-3, "lora": 1e-2}
    gpu_checks.repairs("cuda", damaged, tmp_path / "run", "bfloat16", method=method, learning_rate=rates)


@pytest.mark.parametrize("method", ["rollback", "lowrank"])
def test_repair_in_four_bits(damaged: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    gpu_checks.repairs("cuda", damaged, tmp_path / "run", "bfloat16", method=method, quantize="nf4")


def test_repair_with_the_watch(damaged: Path, tmp_path: Path) -> None:
    gpu_checks.repairs("cuda", damaged, tmp_path / "run", "bfloat16", method="rollback", watch=True)


def test_repair_is_the_cpus(damaged: Path, tmp_path: Path) -> None:
    gpu_checks.repairs_as_a_cpu_does("cuda", damaged, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetune_and_its_mfu(tmp_path: Path, method: str, dtype: str) -> None:
    found = gpu_checks.finetunes("cuda", tmp_path / "run", method, dtype)
    gpu_checks.tells_mfu("cuda", found)


def test_finetune_with_flash_attention_packs_flat(tmp_path: Path) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    gpu_checks.finetunes("cuda", tmp_path / "run", "lora", "bfloat16", attention="auto")


def test_finetune_with_liger(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    plain = gpu_checks.finetunes("cuda", tmp_path / "plain", "full", "bfloat16")
    liger = gpu_checks.finetunes("cuda", tmp_path / "liger", "full", "bfloat16", liger=True)
    assert all(abs(a["loss"] - b["loss"]) < 0.05 * a["loss"] for a, b in zip(plain, liger))
