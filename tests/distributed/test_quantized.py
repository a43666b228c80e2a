"""4-bit weights quantized while they are read: bitsandbytes' own bytes and logits, at any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import quantized_jobs as jobs
from ranks import start_ranks

pytestmark = pytest.mark.distributed
WORLDS = (1, 2, 3, 4)
COMPARED = {
    "bfloat16": ("layers", "logits", "again", "gradient"),
    "float32": ("layers", "logits", "again"),  # DeepSpeed multiplies the head's gradient in another order
    "float16": ("layers",),  # no DeepSpeed engine computes in it on a CPU
}
CASES = [(f"{family}-{dtype}", double) for family, dtype, double in jobs.CASES]
WIDE = [("llama-bfloat16", True), ("qwen2-tied-bfloat16", False)]  # computed in fp32, as no dtype is named


def asked(name: str, double: bool) -> dict[str, Any]:
    """The settings of a case in the checkpoint's own dtype."""
    return {"quantize": "nf4", "double_quant": double, "dtype": name.rsplit("-", 1)[-1]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, dtype in sorted({(family, dtype) for family, dtype, _ in jobs.CASES}):
        jobs.make(family, dtype, folder / f"{family}-{dtype}")
    return folder


@pytest.fixture(scope="module")
def stored(models: Path) -> Path:
    """Checkpoints that bitsandbytes has quantized and saved, packed as bytes and as bf16."""
    for storage in ("uint8", "bfloat16"):
        model = jobs.stock(models / "llama-bfloat16", True, storage)
        model.save_pretrained(models / f"stored-{storage}", max_shard_size="20KB")
        jobs.build_tokenizer().save_pretrained(models / f"stored-{storage}")
    return models


@pytest.fixture(scope="module")
def found(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """What the ranks of every world found; 0 stands for one process without DeepSpeed."""
    cases: list[Any] = [(name, asked(name, double)) for name, double in CASES]
    cases += [(f"stored-{storage}", {"dtype": "bfloat16"}) for storage in ("uint8", "bfloat16")]
    cases += [(name, {"quantize": "nf4", "double_quant": double}) for name, double in WIDE]
    cases += [("stored-uint8", {})]
    arguments = {"folder": str(stored), "cases": cases}
    results = {}
    for world in (0, *WORLDS):
        ranks = start_ranks(
            jobs.describe,
            max(world, 1),
            "zero3" if world else "none",
            tmp_path_factory.mktemp("ranks") / "run",
            arguments,
        )
        results[world] = ranks.results()
    return results


def expected(folder: Path, double: bool, dtype: str | None = None) -> dict[str, Any]:
    """What bitsandbytes makes of the whole model; layers that it cannot pack in this dtype are skipped by both."""
    dtype = dtype or folder.name.rsplit("-", 1)[-1]
    uneven = (
        [f"{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")] if "uneven" in folder.name else []
    )
    model = jobs.stock(folder, double, dtype, skip=[*uneven, "lm_head"], dtype=dtype)
    layers = {path: jobs.digests(m) for path, m in model.named_modules() if hasattr(m, "quant_state")}
    return {"layers": layers, **jobs.run(model)}


@pytest.mark.parametrize(("name", "double"), CASES, ids=[f"{name}-{double}" for name, double in CASES])
def test_bytes_scales_logits_and_gradients_are_bitsandbytes_own(
    name: str, double: bool, models: Path, found: dict[int, list[Any]]
) -> None:
    wanted = expected(models / name, double)
    assert len(wanted["layers"]) == (8 if "uneven" in name else 14)
    key = name + json.dumps(asked(name, double))
    for world, ranks in found.items():
        for rank, every in enumerate(ranks):
            for what in COMPARED[name.rsplit("-", 1)[-1]]:
                assert every[key][what] == wanted[what], (world, rank, what)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_quantized_checkpoint_loads_as_it_is(storage: str, stored: Path, found: dict[int, list[Any]]) -> None:
    wanted = expected(stored / "llama-bfloat16", True)
    for ranks in found.values():
        for every in ranks:
            ours = every[f"stored-{storage}" + json.dumps({"dtype": "bfloat16"})]
            assert {key: ours[key] for key in wanted} == wanted


@pytest.mark.parametrize(("name", "double"), WIDE)
def test_without_bf16_instructions_the_same_bytes_are_computed_in_fp32(
    name: str, double: bool, models: Path, found: dict[int, list[Any]]
) -> None:
    wanted, narrow = expected(models / name, double, "float32"), expected(models / name, double)
    for layer, sums in narrow["layers"].items():
        assert {**sums, "dtype": "torch.float32"} == wanted["layers"][layer], "the bytes hang on the dtype"
    for ranks in found.values():
        for every in ranks:
            ours = every[name + json.dumps({"quantize": "nf4", "double_quant": double})]
            assert {key: ours[key] for key in COMPARED["float32"]} == {key: wanted[key] for key in COMPARED["float32"]}


def test_without_bf16_instructions_a_quantized_checkpoint_is_computed_in_fp32(
    stored: Path, found: dict[int, list[Any]]
) -> None:
    """Unpacked in fp32, which the checkpoint's own state would round to bf16; its embeddings and norms are bf16's."""
    wanted = expected(stored / "llama-bfloat16", True, "float32")
    for ranks in found.values():
        for every in ranks:
            ours = every["stored-uint8{}"]
            assert {key: ours[key] for key in COMPARED["float32"]} == {key: wanted[key] for key in COMPARED["float32"]}


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_holds_no_more_than_its_share(world: int, found: dict[int, list[Any]]) -> None:
    """Packed bytes of every layer's share; gathering them for a pass leaves nothing behind."""
    numels = [52 * 52, 52 * 26, 52 * 26, 52 * 52, 52 * 130, 52 * 130, 52 * 130] * 2
    for every in found[world]:
        held = every["llama-bfloat16" + json.dumps(asked("llama-bfloat16", False))]["held"]
        assert sorted(held) == sorted(math.ceil(n / 4 / world) * 2 for n in numels)
