"""One rank under ZeRO-3 on a GPU, started as a user does; with offload DeepSpeed first compiles its optimizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gpu_checks
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checks.damaged("cuda", tmp_path_factory.mktemp("damaged") / "run")


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "nf4"])
def test_zero3_reads_what_the_file_holds(tmp_path: Path, four_bit: bool) -> None:
    if four_bit:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    gpu_checks.zero3_tensors_arrive("cuda", tmp_path, four_bit=four_bit)


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offload"])
def test_zero3_repairs_alike(damaged: Path, tmp_path: Path, offload: bool) -> None:
    gpu_checks.zero3_repairs_alike("cuda", damaged, tmp_path, offload=offload)


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offload"])
def test_zero3_finetunes(tmp_path: Path, offload: bool) -> None:
    gpu_checks.zero3_finetunes("cuda", tmp_path, offload=offload)
