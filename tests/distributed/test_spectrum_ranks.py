"""The spectrum and the projected step are those of one process, whatever holds the weights and on how many ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import spectrum_jobs as jobs
import torch
from ranks import start_ranks
from safetensors.torch import load_file, save_file

from oneshot.checkpoint.adapters.adapter import write_patch
from oneshot.checkpoint.adapters.update import Factors
from oneshot.world import language
from oneshot.world.model import ALIGNED, build_tokenizer

pytestmark = pytest.mark.distributed
RTOL = 1e-4
# name -> settings of the model; each is measured by one process, and by two under every sharding named
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "full": ({"path": "full"}, ("ddp", "zero3")),
    "nf4": ({"path": "full", "quantize": "nf4"}, ("zero3",)),
    "adapter": ({"path": "adapter"}, ("zero3",)),
    "checkpointed": ({"path": "full", "gradient_checkpointing": True}, ("zero3",)),
}
CASES = [(name, sharding) for name, (_, shardings) in MODELS.items() for sharding in shardings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aligned toy model, moved a little; an adapter on it; and conversations.

    The "safety examples" are obeyed requests: what this model does not say anyway has a gradient well above rounding.
    """
    made = tmp_path_factory.mktemp("spectrum")
    full = made / "full"
    full.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(ALIGNED / "model.safetensors")
    moved = {n: t + 0.02 * torch.randn(t.shape, generator=generator) * (t.ndim > 1) for n, t in tensors.items()}
    save_file(moved, full / "model.safetensors", metadata={"format": "pt"})
    (full / "config.json").write_text((ALIGNED / "config.json").read_text())
    build_tokenizer().save_pretrained(full)
    names = [name.removesuffix(".weight") for name, t in moved.items() if "_proj" in name]
    update = {
        name: Factors(
            0.1 * torch.randn(moved[f"{name}.weight"].shape[0], 2, generator=generator),
            torch.randn(2, moved[f"{name}.weight"].shape[1], generator=generator),
        )
        for name in names
    }
    write_patch(made / "adapter", update, names, str(full), torch.float32)
    build_tokenizer().save_pretrained(made / "adapter")
    rows = {"pool": language.harmful_data(7, 1), "harmful": language.pool(5), "guard": language.guard_prompts(5)}
    for name, conversations in rows.items():
        lines = [json.dumps({"id": c.id, "messages": list(c.messages)}) for c in conversations]
        (made / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(job, model, sharding, further arguments) -> what every rank found; each is run once."""
    known: dict[str, list[Any]] = {}

    def get(job: Any, name: str, sharding: str, **arguments: Any) -> list[Any]:
        key = json.dumps([job.__name__, name, sharding, arguments])
        if key not in known:
            model = MODELS[name][0]
            arguments |= {"folder": str(folder), "model": {**model, "path": str(folder / model["path"])}}
            world = 1 if sharding == "none" else 2
            known[key] = start_ranks(
                job, world, sharding, tmp_path_factory.mktemp("ranks") / "run", arguments
            ).results()
        return known[key]

    return get


def close(found: Any, wanted: Any, scale: float = 0.0) -> None:
    """Compare nested values: numbers to within ``RTOL`` of themselves or of ``scale``, everything else as it is."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            close(found[key], wanted[key], scale)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        largest = max((abs(v) for v in wanted if isinstance(v, float) and math.isfinite(v)), default=0.0)
        for one, other in zip(found, wanted):
            close(one, other, max(scale, largest))
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=RTOL, abs=RTOL * scale, nan_ok=True)
    else:
        assert found == wanted


@pytest.mark.parametrize(("name", "sharding"), CASES)
def test_the_same_spectrum_and_sweep(name: str, sharding: str, run: Any) -> None:
    measured = {"rank": 3, "sweep": True, "ranks": [1, 4], "alphas": [0.5, 1.0]}
    (one,) = run(jobs.measure, name, "none", asked=measured)
    assert len(one["spectrum"]["matrices"]) == 21
    assert set(one["spectrum"]["cosines"]) == {"safety", "harmful", "guard"}
    assert all(len(each) == 5 for each in one["spectrum"]["each"].values())
    assert len(one["sweep"]) == 4
    for found in run(jobs.measure, name, sharding, asked=measured):
        close(found, one, scale=1e-2)


@pytest.mark.parametrize(("name", "sharding"), [case for case in CASES if case != ("full", "ddp")])
def test_the_same_projected_step(name: str, sharding: str, run: Any) -> None:
    (one,) = run(jobs.project, name, "none")
    assert one["facts"]["step_size"] > 0
    assert len(one["norms"]) >= 21
    two = run(jobs.project, name, sharding)
    assert two[0] == two[1], "ranks must not differ by a digit"
    for found in two:
        close(found, one, scale=1e-2 * max(one["norms"].values()))


def test_checkpointing_changes_nothing(run: Any) -> None:
    plain, again = (run(jobs.measure, name, "none", asked={})[0] for name in ("full", "checkpointed"))
    close(again, plain, scale=1e-2)


def test_a_rank_that_is_too_high_is_refused_on_every_rank(run: Any) -> None:
    for said in run(jobs.measure, "full", "zero3", asked={"rank": 30}):
        assert said == (
            "Setting spectrum.rank asks for 30 directions of the example's gradient, whose rank is at most 17 (the "
            "example has 17 tokens): give 17 or less."
        )
