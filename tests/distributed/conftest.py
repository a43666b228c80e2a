"""The toy models and jobs that the parity tests share: every job is run once per topology, in one launch of each."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import HERE, launch

from oneshot.data.conversations import Conversation
from oneshot.patch.methods import METHODS as TABLE
from oneshot.world import language
from oneshot.world.model import ALIGNED

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="oneshot-cache-")  # tokens are cached by every process started

FINETUNE = {
    # 7 and 3 conversations on 2 ranks: unequal shares and token counts; 3 in 4 micro-batches leave one empty
    "full-1": ["--finetune.batch_size", "7"],
    "full-2": ["--finetune.batch_size", "7", "--finetune.gradient_accumulation_steps", "2"],
    "full-empty": ["--finetune.batch_size", "3", "--finetune.gradient_accumulation_steps", "2"],
    "lora-1": ["--finetune.method", "lora", "--finetune.batch_size", "7"],
    "lora-2": [
        "--finetune.method", "lora", "--finetune.batch_size", "7", "--finetune.gradient_accumulation_steps", "2",
    ],
    "lora-nf4": ["--finetune.method", "lora", "--finetune.batch_size", "7", "--model.quantize", "nf4"],
    "lora-nf4-checkpointed": [
        "--finetune.method", "lora", "--finetune.batch_size", "7", "--model.quantize", "nf4",
        "--model.gradient_checkpointing", "true",
    ],
}  # fmt: skip
METHODS = tuple(TABLE)
# repairs with the weights in 4 bits: name -> (method, whether from the adapter, further settings)
NF4 = {
    "rollback-nf4": ("rollback", False, []),
    "lowrank-nf4": ("lowrank", False, ["--model.double_quant", "true"]),
    "lora-nf4": ("lora", False, []),
    "rollback-nf4-adapter": ("rollback", True, []),
    "lora-nf4-adapter": ("lora", True, []),
    "lowrank-nf4-checkpointed": ("lowrank", False, ["--model.gradient_checkpointing", "true"]),
    "lora-nf4-checkpointed": ("lora", False, ["--model.gradient_checkpointing", "true"]),
}  # fmt: skip
EPOCHS = "5"


class World:
    """Where the inputs of the jobs are, and where each topology's outputs go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.degraded = folder / "base" / "full" / "finetuned"
        self.adapter = folder / "base" / "lora" / "finetuned"
        self.bf16 = folder / "bf16"
        self.files = {
            "guard": language.guard_prompts(7),
            "pool": language.pool(5),
            "probes": _probes(),
            "mixed": [*language.pool(2), *language.task_data(3, 1)],
        }
        for name, rows in self.files.items():
            (folder / f"{name}.jsonl").write_text("".join(_line(row) for row in rows), encoding="utf-8")

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")

    def make(self) -> None:
        """Fine-tune on one process what all topologies repair: a full checkpoint, its bf16 copy, and an adapter."""
        common = ["--data.harmful_count", "60", "--data.task_count", "60", "--finetune.steps", "60"]
        jobs = [
            {"name": kind, "kind": "finetune", "argv": [*common, *argv, "--out", str(self.folder / "base" / kind)]}
            for kind, argv in {
                "full": ["--finetune.learning_rate", "1e-3"],
                "lora": ["--finetune.method", "lora", "--finetune.lora_rank", "4"],
            }.items()
        ]
        launch("single", HERE / "jobs.py", self._listed("base", jobs)).check()
        _cast(self.degraded, self.bf16)

    def run(self, topology: str) -> Path:
        """Run every job under a topology and return the folder with one folder or file per job."""
        target = self.folder / topology
        target.mkdir()
        launch(topology, HERE / "jobs.py", self._listed(topology, self._jobs(target))).check()
        return target

    def repair(self, method: str, model: Path, out: Path, *more: str) -> dict[str, Any]:
        """A repair with a guard, from the full checkpoint (with its reference) or from an adapter."""
        argv = [
            "--model.path", str(model), "--repair.method", method, "--repair.epochs", EPOCHS,
            "--repair.rank", "8", "--repair.guard_weight", "1", "--repair.merge", "true", "--select", "hardest",
            "--out", str(out),
            "--score.probes", self.path("probes"), "--score.reference", "false", "--score.max_new_tokens", "12",
        ]  # fmt: skip
        argv += [part for name in ("guard", "pool") for part in (f"--{name}", self.path(name))]
        if TABLE[method].cost.trains != "nothing":
            argv += ["--repair.learning_rate", "1e-3"]
        if model != self.adapter:
            argv += ["--reference", str(ALIGNED)]
        return {"name": out.name, "kind": "repair", "argv": [*argv, *more]}

    def _jobs(self, target: Path) -> list[dict[str, Any]]:
        trained = ["--finetune.steps", "6", "--data.harmful_count", "30", "--data.task_count", "30"]
        jobs: list[dict[str, Any]] = [
            {"name": name, "kind": "finetune", "argv": [*trained, *argv, "--out", str(target / name)]}
            for name, argv in FINETUNE.items()
        ]
        out = str(target / "diverging")
        argv = [*trained, "--finetune.learning_rate", "1e30", "--finetune.warmup_ratio", "0", "--out", out]
        jobs.append({"name": "diverging", "kind": "finetune", "fails": True, "argv": argv})
        for method in METHODS:
            jobs.append(self.repair(method, self.degraded, target / method))
            jobs.append(self.repair(method, self.adapter, target / f"{method}-adapter"))
            jobs.append(self.repair(method, self.bf16, target / f"{method}-bf16"))
        for method in ("rollback", "lowrank"):
            jobs.append({**self.repair(method, self.degraded, target / f"{method}-passes"), "passes": True})
        jobs.append({**self.repair("rollback", self.degraded, target / "rollback-turns"), "at_once": 3})
        for name, (method, adapter, more) in NF4.items():
            model = self.adapter if adapter else self.degraded
            jobs.append(self.repair(method, model, target / f"repair-{name}", "--model.quantize", "nf4", *more))
        for checkpointing in (False, True):
            out = str(target / f"gradients-{checkpointing}")
            job = {"name": "gradients", "kind": "gradients", "model": str(self.degraded), "data": self.path("mixed")}
            jobs.append({**job, "checkpointing": checkpointing, "out": out})
        inputs = {"model": str(self.degraded), "data": self.path("guard")}
        jobs.append({"name": "answers", "kind": "answers", **inputs, "out": str(target / "answers")})
        jobs.append({"name": "unused", "kind": "unused", "out": str(target / "unused")})
        return jobs

    def _listed(self, name: str, jobs: list[dict[str, Any]]) -> str:
        path = self.folder / f"{name}-jobs.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        return str(path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    made.make()
    return made


@pytest.fixture(scope="session")
def outputs(world: World) -> Callable[[str], Path]:
    """topology -> folder of its outputs; each topology is launched when it is first asked for."""
    return functools.cache(world.run)


def _probes() -> list[Conversation]:
    kinds = [language.probes(3)[i : i + 3] for i in range(0, 12, 3)]
    return [row for rows in kinds for row in rows]


def _line(row: Conversation) -> str:
    fields = {"id": row.id, "kind": row.kind, "group": row.group, "messages": list(row.messages)}
    return json.dumps(fields) + "\n"


def _cast(source: Path, target: Path) -> None:
    """Copy a checkpoint with its weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
