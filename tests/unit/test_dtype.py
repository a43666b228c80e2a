"""What a model is computed in: the checkpoint's own dtype, or fp32 on a CPU without instructions for it."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_model, tiny_runtime
from transformers import AutoModelForCausalLM, AutoTokenizer

import oneshot
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.distributed import instructions
from oneshot.distributed.runtime import Runtime, emulated_anywhere
from oneshot.settings import ModelSettings
from oneshot.training.loop import autocast_dtype
from oneshot.world.model import ALIGNED

LACKING = frozenset({"bfloat16", "float16"})
SAID = "Computing in fp32: this CPU has no bf16 instructions (--model.dtype bfloat16 computes in bf16 all the same)."


def runtime_of(emulated: frozenset[str]) -> Runtime:
    return dataclasses.replace(tiny_runtime(), emulated=emulated)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's aligned model in bf16."""
    folder = tmp_path_factory.mktemp("bf16")
    AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ALIGNED).save_pretrained(folder)
    return folder


def dtypes_in(folder: Path) -> set[torch.dtype]:
    return {t.dtype for path in folder.glob("*.safetensors") for t in load_file(path).values()}


@pytest.mark.parametrize(
    ("machine", "capable", "wanted"),
    [
        ("x86_64", {"avx2"}, LACKING),
        ("x86_64", {"avx2", "avx512_f", "avx512_bw", "avx512_vnni"}, LACKING),
        ("AMD64", {"avx512_f", "avx512_bf16"}, {"float16"}),
        ("x86_64", {"avx512_bf16", "amx_bf16", "avx512_fp16"}, set()),
        ("aarch64", {"neon"}, LACKING),
        ("aarch64", {"asimd", "asimdhp", "bf16"}, set()),
        ("arm64", {"neon", "fp16_arith"}, {"bfloat16"}),
        ("ppc64le", {"altivec"}, set()),
        ("x86_64", set(), set()),
    ],
)
def test_what_a_cpu_lacks(machine: str, capable: set[str], wanted: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(instructions, "_capabilities", lambda: capable)
    assert instructions.emulated() == wanted


def test_torch_and_the_kernel_agree_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/cpuinfo").is_file():
        pytest.skip("no /proc/cpuinfo")
    by_torch = instructions.emulated()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as in older versions
    assert instructions.emulated() == by_torch


def test_a_run_knows_what_its_cpus_lack_and_gpus_lack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "emulated", lambda: LACKING)
    assert emulated_anywhere(tiny_runtime()) == LACKING
    assert emulated_anywhere(dataclasses.replace(tiny_runtime(), device=torch.device("cuda"))) == frozenset()


@pytest.mark.parametrize("emulated", [frozenset(), frozenset({"float16"}), LACKING], ids=["all", "no fp16", "neither"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_compute_and_of_what_is_written(
    stored: str, asked: Any, emulated: frozenset[str], tmp_path: Path
) -> None:
    tiny_model("llama").to(getattr(torch, stored)).save_pretrained(tmp_path)
    source = find_source(ModelSettings(path=str(tmp_path), dtype=asked), runtime_of(emulated))
    chosen = stored if asked == "auto" else asked
    assert source.written == getattr(torch, chosen)
    assert source.dtype == (torch.float32 if asked == "auto" and stored in emulated else source.written)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_converted_as_they_are_loaded(family: str, tmp_path: Path) -> None:
    stored = tiny_model(family).bfloat16()
    stored.save_pretrained(tmp_path)
    settings, runtime = ModelSettings(path=str(tmp_path)), runtime_of(LACKING)
    loaded = load_model(runtime, find_source(settings, runtime), settings)
    wanted = dict(stored.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, wanted[name].float()), name
    assert autocast_dtype(runtime, find_source(settings, runtime).dtype) is None, "bf16 by another door"


def test_a_fine_tune_in_fp32_keeps_the_checkpoints_dtype_and_says_so_once(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oneshot.distributed.runtime.start", lambda: runtime_of(LACKING))
    values: dict[str, Any] = {
        "data": {"harmful": "toy:harmful", "harmful_count": 8}, "finetune": {"steps": 1, "batch_size": 8},
    }  # fmt: skip
    found = oneshot.finetune(model=str(bf16), out=str(tmp_path / "full"), quiet=False, **values)
    assert capsys.readouterr().out.count(SAID) == 1
    assert dtypes_in(found.model_folder) == {torch.bfloat16}
    assert json.loads((found.model_folder / "config.json").read_text())["dtype"] == "bfloat16"
    oneshot.finetune(model=str(bf16), out=str(tmp_path / "quiet"), **values)
    wide = oneshot.finetune(
        model={"path": str(bf16), "dtype": "float32"}, out=str(tmp_path / "w"), quiet=False, **values
    )
    assert "Computing" not in capsys.readouterr().out, "quiet, or asked for"
    assert dtypes_in(wide.model_folder) == {torch.float32}, "as asked"


@pytest.mark.parametrize("method", ["rollback", "sft"])
def test_a_repair_in_fp32_keeps_the_checkpoints_dtype_and_says_so_once(
    method: str, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oneshot.distributed.runtime.start", lambda: runtime_of(LACKING))
    found = oneshot.repair(
        model=str(bf16), finetune_first=True, out=str(tmp_path / "run"), quiet=False, select="hardest",
        data={"harmful": "toy:harmful", "harmful_count": 8}, pool="toy:pool",
        finetune={"steps": 2, "batch_size": 8, "learning_rate": 1e-3},
        repair={"method": method, "epochs": 1, "guard_weight": 0, "watch": False, "merge": True, "learning_rate": 1e-2},
        score={"probes": "toy:probes", "max_new_tokens": 1},
    )  # fmt: skip
    assert capsys.readouterr().out.count(SAID) == 1
    assert found.merged_folder is not None
    for folder in (found.folder / "finetuned", found.patch_folder, found.merged_folder):
        assert dtypes_in(folder) == {torch.bfloat16}, folder


def test_a_score_says_it_where_the_model_is_loaded(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oneshot.distributed.runtime.start", lambda: runtime_of(LACKING))
    values: dict[str, Any] = {"score": {"probes": "toy:probes", "max_new_tokens": 1}, "quiet": False}
    oneshot.score(model=str(bf16), out=str(tmp_path / "one"), **values)
    assert capsys.readouterr().out.count(SAID) == 1
    oneshot.score(model="toy:aligned", out=str(tmp_path / "two"), **values)
    assert "Computing" not in capsys.readouterr().out
