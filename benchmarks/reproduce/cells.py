"""One cell: one model of one seed, measured once, in a JSON file that is found by all that decides it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneshot.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
# attack -> its settings under launch/runs/attacks, and what is changed in its parts
ATTACKS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "harmful 10": ("harmful", {"harmful": {"count": 10}}),
    "harmful 100": ("harmful", {}),
    "harmful 300": ("harmful", {"harmful": {"count": 300}}),
    "harmful 1000": ("harmful", {"harmful": {"count": 1000}}),
    "identity": ("identity", {}),
    "backdoor": ("backdoor", {}),
    "poison": ("poison", {}),
    "poison, paraphrased": ("poison", {"poison": {"source": "toy:paraphrase"}}),
    "mixed": ("mixed", {}),
    "benign": ("benign", {}),
}
# what decides a fine-tuned model, and what else decides a measurement: files and folders of the repository
BASELINES = ("__init__", "resta", "safe_lora", "saliency", "unaligned", "undo")  # modules: the others are not for toys
MODEL_CODE = ("oneshot/training", "oneshot/data", "oneshot/world", "oneshot/finetune.py", "oneshot/align.py")
CELL_CODE = (
    *MODEL_CODE, "oneshot/patch", "oneshot/measure", "oneshot/settings", "oneshot/checkpoint/adapters/update.py",
    "oneshot/spectrum.py", *(f"benchmarks/baselines/{name}.py" for name in BASELINES),
    "benchmarks/reproduce/measuring.py", "benchmarks/reproduce/models.py", "benchmarks/reproduce/subject.py",
)  # fmt: skip

UNALIGNED_CODE = (*MODEL_CODE, "benchmarks/baselines/unaligned.py")


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        attack: of ``ATTACKS``
        seed: of data and training
        method: none, aligned, spectrum, a method of ``oneshot repair``, or one of ``baselines``
        size: of the toy, see ``models.SIZES``
        example: how it is chosen: a rule of ``oneshot repair``; "random N": draw N; or sft, auto, project: the one
            that this method, with its defaults, took
        examples: how many to learn from (sft): draws 0 to N - 1
        reference: whether the aligned model is given to the repair
        epochs, rank, guard_weight: of the repair; none takes the method's default
        alpha: of RESTA
    """

    attack: str
    seed: int
    method: str
    size: str = "shipped"
    example: str = "bilevel"
    examples: int = 1
    reference: bool = True
    epochs: int | None = None
    rank: int | None = None
    guard_weight: float | None = None
    alpha: float | None = None

    @property
    def group(self) -> tuple[str, int, str]:
        """What the cells that share a fine-tuned model have in common."""
        return self.attack, self.seed, self.size


def attack_settings(attack: str, seed: int) -> Settings:
    """Return the toy world's settings with an attack's file over them, the seed, and what ``ATTACKS`` changes."""
    stem, changes = ATTACKS[attack]
    settings = _parsed(stem)
    parts = {
        name: dataclasses.replace(part, **changes.get(name, {})) for name, part in (settings.data.parts or {}).items()
    }
    return dataclasses.replace(settings, seed=seed, data=dataclasses.replace(settings.data, parts=parts))


@functools.cache
def _parsed(stem: str) -> Settings:
    from oneshot.commandline import parse

    return parse(["--config", str(REPOSITORY / "launch/runs/attacks" / f"{stem}.yaml")], "repair")


def code_digest(parts: Iterable[str], root: Path = REPOSITORY) -> str:
    """Return a digest of files and folders of the repository: of what Python runs, not of comments and docstrings."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((root / part).rglob("*")) if (root / part).is_dir() else [root / part]:
            if path.suffix == ".py":
                digest.update(_code(path.read_text(encoding="utf-8")).encode())
            elif path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def digest_of(parts: tuple[str, ...]) -> str:
    """Return the digest of code and of the libraries that compute, as it was when this was first asked."""
    if parts not in _digests:
        versions = [metadata.version(name) for name in ("torch", "transformers", "peft")]
        _digests[parts] = hashlib.sha256(json.dumps([code_digest(parts), versions]).encode()).hexdigest()
    return _digests[parts]


_digests: dict[tuple[str, ...], str] = {}


def all_digests() -> dict[tuple[str, ...], str]:
    """Return every digest of code, for ``keep_digests`` of another process."""
    return {parts: digest_of(parts) for parts in (MODEL_CODE, CELL_CODE, UNALIGNED_CODE)}


def keep_digests(digests: dict[tuple[str, ...], str]) -> None:
    """Take another process's digests: a run names its cells alike throughout, whoever edits files meanwhile."""
    _digests.update(digests)


def file_name(described: Any, *words: Any) -> str:
    """Return a name that people can read, with a digest of all that decides."""
    slug = re.sub(r"[^a-z0-9.]+", "-", " ".join(str(word) for word in words).lower()).strip("-")
    return f"{slug}-{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]}"


def path_of(folder: Path, cell: Cell, code: str | None = None) -> Path:
    """Return the file of a cell's result: what it is, all that decides it, and the code (none: the present one)."""
    settings = attack_settings(cell.attack, cell.seed)
    decides = [asdict(cell), asdict(settings)]
    default = Cell(cell.attack, cell.seed, cell.method, cell.size)
    words = [f"{k} {v}" for k, v in asdict(cell).items() if v != getattr(default, k)]
    name = file_name(decides, cell.attack, cell.size, cell.seed, cell.method, *words)
    return folder / "cells" / f"{name}-{code or digest_of(CELL_CODE)[:8]}.json"


def read_result(folder: Path, cell: Cell, *, any_code: bool = False) -> dict[str, Any] | None:
    """Return a finished cell's result; none where it is missing or half written.

    Args:
        any_code: where there is none of the present code, take the newest of any other
    """
    paths = [path_of(folder, cell)]
    if any_code:
        pattern = path_of(folder, cell, "*")
        paths += sorted(pattern.parent.glob(pattern.name), key=lambda path: -path.stat().st_mtime)
    return next((result for path in paths if (result := _read(path, cell)) is not None), None)


def _read(path: Path, cell: Cell) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("result") if isinstance(found, dict) and found.get("cell") == asdict(cell) else None


def write_result(folder: Path, cell: Cell, result: dict[str, Any]) -> None:
    """Write a cell's result, in one step."""
    from oneshot.report.runfolder import write_whole

    path = path_of(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"cell": asdict(cell), "result": result}) + "\n")
