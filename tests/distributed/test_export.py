"""Exports by several ranks: they share the work, and the result is the one of a single process, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experts_jobs
import export_jobs as jobs
import pytest
import torch
from harness import launch
from ranks import start_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
KINDS = ("merge", "both", "nf4", "back", "low", "patch", "experts")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    jobs.make(folder)
    experts_jobs.make(folder)
    return folder


def commands(given: Path, out: Path) -> list[list[str]]:
    base, a, b = ["--model", str(given / "base")], ["--adapter", str(given / "a")], ["--adapter", str(given / "b")]
    made = {
        "merge": [*base, *a],
        "both": [*base, *a, *b, "--weight", "1", "--weight", "0.3"],
        "nf4": [*base, *b, "--base", "dequantized", "--double_quant"],
        "back": ["--model", str(out / "merge"), *a, "--subtract"],
        "low": [*b, "--rank", "2"],
        "patch": ["--extract", str(out / "both"), *base, "--rank", "4"],
        "experts": ["--extract", str(given / "aligned"), "--model", str(given / "tuned"), "--rank", "4"],
        "refused": [*base, "--adapter", str(given / "base")],
    }
    assert [*KINDS, "refused"] == list(made)
    return [[*arguments, "--out", str(out / name)] for name, arguments in made.items()]


@pytest.fixture(scope="module")
def worlds(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[Any]]]:
    """world size -> folder with all results, and what each rank says."""
    found = {}
    for world in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"world{world}")
        ranks = start_ranks(jobs.run_all, world, "ddp", out / "ranks", {"commands": commands(given, out)})
        found[world] = (out, ranks.results())
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_writes_the_same(world: int, kind: str, worlds: dict[int, Any]) -> None:
    one, several = worlds[1][0] / kind, worlds[world][0] / kind
    assert {path.name for path in several.iterdir()} == {path.name for path in one.iterdir()}
    ours, theirs = tensors(several), tensors(one)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_writes_its_share_of_the_tensors(world: int, kind: str, worlds: dict[int, Any]) -> None:
    out, said = worlds[world]
    shares = [next(share for folder, share in rank["written"].items() if folder.startswith(kind)) for rank in said]
    assert all(shares)
    assert sorted(name for share in shares for name in share) == sorted(tensors(out / kind))


def test_a_refusal_reaches_every_rank(worlds: dict[int, Any]) -> None:
    for out, said in worlds.values():
        refusals = [list(rank["refused"].values()) for rank in said]
        assert all(len(refusal) == 1 and "holds no adapter_config.json" in refusal[0] for refusal in refusals)
        assert not (out / "refused").exists()


def test_a_rank_that_cannot_write_ends_all_and_leaves_nothing(given: Path, tmp_path: Path) -> None:
    command = commands(given, tmp_path)[0]
    ranks = start_ranks(jobs.fail_on_one, 2, "ddp", tmp_path / "ranks", {"command": command, "rank": 1})
    for said in ranks.results():
        assert "writing the checkpoint" in said
        assert "failed on rank 1: No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["ranks"]


@pytest.mark.parametrize("topology", ["zero3"])
def test_it_is_launched_as_the_other_stages(topology: str, given: Path, tmp_path: Path, worlds: dict[int, Any]) -> None:
    command = commands(given, tmp_path)[0]
    ran = launch(topology, "-m", "oneshot.export", *command).check()
    assert ran.out.count("tensors changed") == 1
    assert ran.err == "", "chatter of the libraries"
    ours, theirs = tensors(tmp_path / "merge"), tensors(worlds[1][0] / "merge")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_mistake_is_said_once(given: Path, tmp_path: Path) -> None:
    ran = launch("ddp", "-m", "oneshot.export", "--model", str(tmp_path / "no"), *commands(given, tmp_path)[0][2:])
    assert ran.code == 1, "accelerate's own"
    assert ran.err.count("oneshot export: error: ") == 1
    assert f"{tmp_path}/no does not exist" in ran.err
