"""Fused experts are repaired alike on one rank and on two, whose tokens go to other experts; and nobody waits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import experts_jobs as jobs
import pytest
import torch
from ranks import start_ranks
from safetensors.torch import load_file

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.data.conversations import Conversation
from oneshot.world import language

pytestmark = pytest.mark.distributed
TOPOLOGIES = {"ddp": ("ddp", 2, False), "zero3": ("zero3", 2, False), "zero3, checkpointing": ("zero3", 2, True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    aligned, tuned = jobs.make(tmp_path_factory.mktemp("mixture"))
    return {"aligned": str(aligned), "tuned": str(tuned)}


@pytest.fixture(scope="module")
def alone(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank finds."""
    folder = tmp_path_factory.mktemp("alone") / "ranks"
    found: dict[str, Any] = start_ranks(jobs.worked, 1, "ddp", folder, folders).results()[0]
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_two_ranks_find_what_one_finds(
    topology: str, folders: dict[str, str], alone: dict[str, Any], tmp_path: Path
) -> None:
    sharding, world, checkpointing = TOPOLOGIES[topology]
    given = {**folders, "checkpointing": checkpointing}
    first, second = start_ranks(jobs.worked, world, sharding, tmp_path / "ranks", given).results()
    assert first == second
    experts = 2 * 24 * 2
    assert 0 < len(alone["missed"]) < experts
    assert first["missed"] == alone["missed"]
    for kind in ("directions", "example"):
        assert first[kind].keys() == alone[kind].keys()
        for name, values in alone[kind].items():
            assert first[kind][name] == pytest.approx(values, rel=1e-3, abs=1e-4 * max(values)), (kind, name)
    for kind in ("lowrank", "target"):
        assert first[kind].keys() == alone[kind].keys()
        largest = max(alone[kind].values())
        for name, value in alone[kind].items():
            assert first[kind][name] == pytest.approx(value, rel=2e-3, abs=1e-4 * largest), (kind, name)
    for ours, wanted in zip(first["scores"], alone["scores"]):
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-3 * max(map(abs, wanted)))
    pairs = [
        (one, two)
        for name, wanted in alone["coefficients"].items()
        for one, two in zip(first["coefficients"][name], wanted)
    ]
    # a step of Adam has the sign of the gradient, which rounding decides for a few
    assert sum(abs(one - two) < 1e-2 for one, two in pairs) > 0.97 * len(pairs)
    assert all(set(alone["coefficients"][name]) == {0.0} for name in alone["missed"])


# by name: the stage and what it is asked; a learning rate at which two steps move more than rounding
WHOLE = {
    "full": ("finetune", ["--finetune.method", "full", "--finetune.learning_rate", "1e-3"]),
    "lora-tuned": ("finetune", ["--finetune.method", "lora", "--finetune.learning_rate", "1e-3"]),
    "sft": ("repair", ["--repair.method", "sft", "--repair.learning_rate", "1e-3"]),
    "lora": ("repair", ["--repair.method", "lora", "--repair.learning_rate", "1e-3"]),
}
TUNED = ["--finetune.steps", "3", "--finetune.batch_size", "6", "--data.task_count", "18"]
REPAIRED = ["--repair.watch", "false", "--repair.epochs", "3", "--repair.merge", "true", "--select", "random"]
REPAIRED += ["--repair.rank", "6", "--repair.rank_experts", "4", "--score.reference", "false"]
REPAIRED += ["--score.max_new_tokens", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By stage: arguments that name files of a few rows each."""
    folder = tmp_path_factory.mktemp("data")

    def written(name: str, rows: Iterable[Conversation]) -> str:
        lines = (json.dumps({"id": r.id, "kind": r.kind, "messages": list(r.messages)}) for r in rows)
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
        return str(folder / name)

    guard = written("guard.jsonl", language.guard_prompts(4))
    pool = written("pool.jsonl", language.pool(2))
    return {
        "finetune": ["--data.task", written("task.jsonl", language.task_data(18, 1))],
        "repair": ["--guard", guard, "--score.probes", guard, "--pool", pool],
    }


def whole_runs(
    folders: dict[str, str], data: dict[str, list[str]], out: Path, world: int, sharding: str
) -> dict[str, dict[str, torch.Tensor]]:
    """What each run of ``WHOLE`` changed, by matrix; a patch and what was merged of it apart."""
    asked = []
    for name, (stage, more) in WHOLE.items():
        usual = TUNED if stage == "finetune" else [*REPAIRED, "--reference", folders["aligned"]]
        asked.append([stage, "--model.path", folders["tuned"], "--out", str(out / name), *usual, *data[stage], *more])
    start_ranks(jobs.ran, world, sharding, out / "ranks", {"jobs": asked}).results(300)
    return {
        key: tensors for name, (stage, _) in WHOLE.items() for key, tensors in changes(out / name, folders["tuned"])
    }


def changes(run: Path, tuned: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    before = load_file(Path(tuned) / "model.safetensors")
    for folder in (run / "finetuned", run / "patch", run / "repaired"):
        if (folder / "adapter_config.json").is_file():
            update = read_adapter(folder).update
            yield f"{run.name}/{folder.name}", {key: f.b.float() @ f.a.float() for key, f in update.items()}
        elif folder.is_dir():
            after = load_file(folder / "model.safetensors")
            yield f"{run.name}/{folder.name}", {key: after[key] - before[key] for key in after}


@pytest.fixture(scope="module")
def one_rank(
    folders: dict[str, str], data: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    return whole_runs(folders, data, tmp_path_factory.mktemp("one"), 1, "ddp")


@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_experts_are_trained_on_two_ranks_as_on_one(
    sharding: str,
    folders: dict[str, str],
    data: dict[str, list[str]],
    one_rank: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """Fine-tunes and the repairs that train by Adam, full-weight and LoRA, whole stages: what they write is alike."""
    two_ranks = whole_runs(folders, data, tmp_path, 2, sharding)
    assert set(two_ranks) == set(one_rank) == {
        "full/finetuned", "lora-tuned/finetuned", "sft/patch", "sft/repaired", "lora/patch", "lora/repaired",
    }  # fmt: skip
    for run, wanted in one_rank.items():
        found = two_ranks[run]
        assert found.keys() == wanted.keys()
        experts = [key for key, change in wanted.items() if "experts." in key and change.any()]
        assert len(experts) > 10, run
        for key, change in wanted.items():
            torch.testing.assert_close(
                found[key], change, rtol=0, atol=1e-6 + 2e-2 * float(change.abs().max()), msg=key
            )
