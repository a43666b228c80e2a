"""Checkpoints read and written range by range: transformers' own partitions and files, at any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_jobs as jobs
import pytest
import torch
from ranks import start_ranks
from safetensors.torch import load_file, save_file

from oneshot.checkpoint.disk.files import INDEX, list_tensors

pytestmark = pytest.mark.distributed
CHAIN = (1, 4, 3, 2, 1)  # each loads what the one before has written; the first what transformers has


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family with the logits that plain transformers computes from it."""
    folder = tmp_path_factory.mktemp("sources")
    for name, (family, options, dtype) in jobs.FAMILIES.items():
        jobs.make(name, family, options, dtype, folder / name)
        _write_logits(folder, name)
    return folder


def _write_logits(folder: Path, name: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="sdpa")
    with torch.no_grad():
        torch.save(model(input_ids=jobs.tokens(), use_cache=False).logits, folder / f"{name}.logits")


@pytest.fixture(scope="module")
def chain(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[Any]]]:
    """Each world's folder and what its ranks found, one launch per world for all families."""
    found, given = [], sources
    for number, world_size in enumerate(CHAIN):
        folder = tmp_path_factory.mktemp(f"world{number}-of-{world_size}")
        arguments = {"sources": str(given), "target": str(folder)}
        ranks = start_ranks(jobs.compare, world_size, "zero3", folder / "ranks", arguments)
        found.append((folder, ranks.results()))
        given = folder / "ranges"
        for name in jobs.FAMILIES:
            shutil.copy(sources / f"{name}.logits", given)
    return found


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


def assert_same_files(one: Path, other: Path) -> None:
    """The same tensors with the same bits, in however many shards."""
    ours, theirs = everything(one), everything(other)
    assert ours
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("step", range(len(CHAIN)), ids=[f"{i}-on-{world}" for i, world in enumerate(CHAIN)])
@pytest.mark.parametrize("name", jobs.FAMILIES)
def test_partitions_and_logits_are_transformers_own(name: str, step: int, chain: list[Any]) -> None:
    """The ranks have compared their partitions bit for bit; here is what they say they compared."""
    _, ranks = chain[step]
    assert len(ranks) == CHAIN[step]
    assert len({found[name]["bytes"] for found in ranks}) == 1
    assert ranks[0][name]["bytes"] > 10_000 / CHAIN[step]
    if jobs.FAMILIES[name][2] == "float16":
        return
    for found in ranks:
        assert found[name]["logits"], "not what transformers' own partitions compute"
        # DeepSpeed adds a linear layer's bias after rounding the product: a last digit of bf16 in models with biases
        tolerance = 1e-5 if jobs.FAMILIES[name][2] == "float32" else 0.125 if name.startswith("qwen2") else 0.0
        assert found[name]["off"] <= tolerance, "not what one process computes"
        assert ("converted" in found[name]) == (name in jobs.CONVERTED)


@pytest.mark.parametrize("step", range(len(CHAIN)), ids=[f"{i}-on-{world}" for i, world in enumerate(CHAIN)])
@pytest.mark.parametrize("name", jobs.FAMILIES)
def test_what_is_written_is_what_was_read(name: str, step: int, sources: Path, chain: list[Any]) -> None:
    """By ranges and gathered, however many ranks wrote the checkpoint that was read."""
    folder, _ = chain[step]
    for kind in ("ranges", "gathered"):
        assert_same_files(folder / kind / name, sources / name)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        ours, theirs = (json.loads((folder / kind / name / file).read_text()) for kind in ("ranges", "gathered"))
        assert ours == theirs, file
    assert sorted(path.name for path in (folder / "ranges").iterdir() if path.is_dir()) == sorted(jobs.FAMILIES)


def test_16_bit_weights_are_computed_in_fp32_by_all_ranks_where_one_cannot(sources: Path, tmp_path: Path) -> None:
    """The ranks have compared their partitions with the converted tensors; files keep their dtype."""
    names = ["llama-tied", "llama-biased", "mistral"]
    arguments = {"sources": str(sources), "target": str(tmp_path), "names": names}
    for found in start_ranks(jobs.wide, 2, "zero3", tmp_path / "ranks", arguments).results():
        assert list(found) == names
        assert all(each["bytes"] > 10_000 and each["off"] < 1e-5 for each in found.values()), found
    for name in names:
        assert_same_files(tmp_path / name, sources / name)
        ours, theirs = (json.loads((folder / name / "config.json").read_text()) for folder in (tmp_path, sources))
        assert ours["dtype"] == theirs["dtype"]


@pytest.mark.parametrize("world", [2, 3])
def test_frozen_weights_that_stay_gathered_are_held_once(world: int, sources: Path, tmp_path: Path) -> None:
    """Partitions are views into the whole weights, which are the files'; afterwards they are what they were, alone."""
    names = ["llama", "llama-tied", "gemma3"]
    arguments = {"sources": str(sources), "target": str(tmp_path), "names": names}
    for found in start_ranks(jobs.kept_once, world, "zero3", tmp_path / "ranks", arguments).results():
        assert found == {name: [True] * 5 for name in names}
    for name in names:
        assert_same_files(tmp_path / name, sources / name)


@pytest.mark.parametrize("sharding", ["zero2", "ddp"])
def test_whole_models_are_written_by_all_ranks_too(sharding: str, sources: Path, tmp_path: Path) -> None:
    for name in ("llama", "gemma3", "mixtral"):
        arguments = {"source": str(sources / name), "target": str(tmp_path / name)}
        start_ranks(jobs.roundtrip, 2, sharding, tmp_path / f"ranks-{name}", arguments).results()
        assert_same_files(tmp_path / name, sources / name)


@pytest.mark.parametrize(("sharding", "world_size"), [("ddp", 2), ("zero2", 3)])
def test_a_replicated_model_is_read_once_by_all_ranks_together(
    sharding: str, world_size: int, sources: Path, tmp_path: Path
) -> None:
    for name in ("llama-biased", "gemma3", "qwen3-moe"):
        found = start_ranks(
            jobs.read_replicated, world_size, sharding, tmp_path / name, {"source": str(sources / name)}
        ).results()
        assert [rank["same"] for rank in found] == [True] * world_size
        tensors = everything(sources / name).values()
        assert sum(rank["bytes"] for rank in found) == sum(tensor.nbytes for tensor in tensors)
        assert max(rank["bytes"] for rank in found) <= sum(-(-t.nbytes // world_size) + 4 for t in tensors)


def test_a_rank_that_cannot_read_its_share_ends_the_others_too(sources: Path, tmp_path: Path) -> None:
    arguments = {"source": str(sources / "llama"), "broken": 1}
    found = start_ranks(jobs.read_replicated, 2, "ddp", tmp_path / "ranks", arguments).results()
    assert found[0] == found[1]
    assert "failed on rank 1: Input/output error" in found[0]["error"]


def test_persistent_buffers_are_read_and_written(sources: Path, tmp_path: Path) -> None:
    tensors = {**everything(sources / "llama"), "model.scale": torch.tensor([1.5, -2.0, 0.25])}
    shutil.copytree(sources / "llama", tmp_path / "source", ignore=shutil.ignore_patterns("model*"))
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    arguments = {"source": str(tmp_path / "source"), "target": str(tmp_path / "saved")}
    assert start_ranks(jobs.buffered, 2, "zero3", tmp_path / "ranks", arguments).results() == [[1.5, -2.0, 0.25]] * 2
    assert_same_files(tmp_path / "saved", tmp_path / "source")


def test_a_trained_mixture_is_written_as_transformers_stores_it(sources: Path, tmp_path: Path) -> None:
    arguments = {"source": str(sources / "mixtral"), "target": str(tmp_path)}
    start_ranks(jobs.trained, 2, "zero3", tmp_path / "ranks", arguments).results()
    assert_same_files(tmp_path / "ranges", tmp_path / "gathered")
    before, after = everything(sources / "mixtral"), everything(tmp_path / "ranges")
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert any(not torch.equal(before[name], after[name]) for name in experts)


@pytest.mark.parametrize("times", [1, 3])
def test_what_is_stored_transposed_is_read_and_what_is_no_range_goes_the_stock_way_and_says_so(
    times: int, sources: Path, tmp_path: Path
) -> None:
    shutil.copytree(sources / "llama", tmp_path / "source", ignore=shutil.ignore_patterns("model*"))
    tensors = {
        name.replace("down_proj", "down_turned"): tensor.T.contiguous() if "down_proj" in name else tensor
        for name, tensor in everything(sources / "llama").items()
    }
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    arguments = {"source": str(tmp_path / "source"), "target": str(tmp_path / "saved"), "times": times}
    ranks = start_ranks(jobs.turned, 2, "zero3", tmp_path / "ranks", arguments)
    assert ranks.results() == ["LlamaForCausalLM"] * 2
    said = [line for line in ranks.logs().splitlines() if line.startswith("Loading the stock way: ")]
    assert len(said) == (times > 1), "several operations in a row are not followed"
    for line in said:
        assert line.startswith("Loading the stock way: transformers makes model.layers.0.mlp.down_proj.weight of")
    assert_same_files(tmp_path / "saved", tmp_path / "source")


# --- failures --------------------------------------------------------------------------------------------------------


class Broken:
    """Copies of a good checkpoint, each broken in one way, and the words that its error must have."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.good, self.folder = good, folder
        self.wanted: dict[str, list[str]] = {}
        index = json.loads((good / INDEX).read_text())["weight_map"]
        self.tensor = "model.layers.1.mlp.up_proj.weight"
        self.shard = index[self.tensor]
        self.last = max(index.values())
        self.after_last = next(name for name, shard in index.items() if shard == self.last)

    def copy(self, name: str, *words: str) -> Path:
        self.wanted[name] = list(words)
        return Path(shutil.copytree(self.good, self.folder / name))

    def change_index(self, name: str, shard: str, *words: str) -> None:
        folder = self.copy(name, *words)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][self.tensor] = shard
        (folder / INDEX).write_text(json.dumps(index))

    def change_tensors(self, name: str, change: Any, *words: str) -> None:
        folder = self.copy(name, *words)
        tensors = load_file(folder / self.shard)
        change(tensors)
        save_file(tensors, folder / self.shard, metadata={"format": "pt"})

    def change_header(self, name: str, change: Any, *words: str) -> None:
        path = self.copy(name, *words) / self.shard
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.fixture(scope="module")
def broken(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Broken:
    made = Broken(sources / "llama", tmp_path_factory.mktemp("broken"))
    cut = made.copy("cut", made.last, "cut off")
    os.truncate(cut / made.last, (cut / made.last).stat().st_size - 2)
    made.copy("cut-between", made.last, "ended in the middle of", "cut off")
    made.change_index("missing-file", "model-00099-of-00099.safetensors", "model-00099-of-00099.safetensors", "missing")
    made.change_index("leads-out", f"../llama/{made.shard}", INDEX, "../llama/", "outside its own folder")
    made.change_index("wrong-shard", made.last, INDEX, made.tensor, made.last, "does not hold it")

    def overlap(header: dict[str, Any]) -> None:
        begin, end = header[made.tensor]["data_offsets"]
        header[made.tensor]["data_offsets"] = [begin - 4, end - 4] if begin else [4, end + 4]

    def shorter(header: dict[str, Any]) -> None:
        header[made.tensor]["shape"][0] -= 1

    made.change_header("overlap", overlap, made.shard, "header is damaged")
    made.change_header("size", shorter, made.shard, made.tensor, "header is damaged")

    def lose_row(tensors: dict[str, torch.Tensor]) -> None:
        tensors[made.tensor] = tensors[made.tensor][:-1].clone()

    for way in ("", "-stock"):
        made.change_tensors(f"shape{way}", lose_row, made.tensor, "[50, 38]", "[51, 38]", "copy it again")
        folder = made.copy(f"missing-tensor{way}", f"missing-tensor{way}", made.tensor, "lacks")
        index = json.loads((folder / INDEX).read_text())
        del index["weight_map"][made.tensor]
        (folder / INDEX).write_text(json.dumps(index))
        tensors = load_file(folder / made.shard)
        del tensors[made.tensor]
        save_file(tensors, folder / made.shard, metadata={"format": "pt"})
    twice = made.copy("twice")  # no error: the index says which one counts
    tensors = load_file(twice / made.last)
    save_file({**tensors, made.tensor: torch.zeros(51, 38)}, twice / made.last, metadata={"format": "pt"})
    return made


def check_errors(found: list[dict[str, str]], wanted: dict[str, list[str]]) -> None:
    """On every rank each case has the same one-line error with the given words; a case without words has none."""
    assert found
    for errors in found:
        assert list(errors) == list(wanted)
        for name, words in wanted.items():
            assert bool(errors[name]) == bool(words), f"{name}: {errors[name]!r}"
            assert all(word in errors[name] for word in words), f"{name}: {errors[name]} lacks one of {words}"
            assert "\n" not in errors[name]
            assert errors[name] == found[0][name], "ranks say different things"


def test_a_broken_checkpoint_is_the_same_error_on_every_rank(broken: Broken, tmp_path: Path) -> None:
    arguments = {"folders": [str(broken.folder / name) for name in broken.wanted]}
    found = start_ranks(jobs.failing_loads, 2, "zero3", tmp_path / "ranks", arguments).results(60)
    check_errors(found, broken.wanted)


def test_a_broken_checkpoint_is_an_error_without_partitions_too(broken: Broken, tmp_path: Path) -> None:
    wanted = {name: words for name, words in broken.wanted.items() if "cut-between" not in name}
    arguments = {"folders": [str(broken.folder / name) for name in wanted]}
    found = start_ranks(jobs.failing_loads, 2, "ddp", tmp_path / "ranks", arguments).results(60)
    check_errors(found, wanted)


def test_of_duplicate_tensors_the_one_that_the_index_names_counts(broken: Broken, tmp_path: Path) -> None:
    assert not broken.wanted["twice"]
    arguments = {"source": str(broken.folder / "twice"), "target": str(tmp_path / "saved")}
    start_ranks(jobs.roundtrip, 2, "zero3", tmp_path / "ranks", arguments).results()
    assert_same_files(tmp_path / "saved", broken.good)


NBYTES = 1000  # of a piece: each rank's range of a matrix has several, the last one smaller
FLIPPED = "model.layers.1.mlp.up_proj.weight"  # 51 x 38 elements


def flips(item: int) -> dict[str, int]:
    """Bytes of that tensor, by where they are, ``item`` bytes to an element."""
    numel = 51 * 38
    borders = {f"{world}": -(-numel // world) * item for world in (2, 3, 4)}  # of the second rank of so many
    after = {f"after-border-of-{world}": byte for world, byte in borders.items()}
    before = {f"before-border-of-{world}": byte - 1 for world, byte in borders.items()}
    inside = {"middle-of-piece": NBYTES // 2, "first-of-piece": NBYTES, "last-of-piece": NBYTES - 1}
    return {"first": 0, "last": numel * item - 1, **before, **after, **inside}


@pytest.fixture(scope="module")
def flipped(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Checkpoints with one bit flipped, of fp32 written by 4 ranks and of bf16 written by 3, and what is to be said."""
    folder, wanted = tmp_path_factory.mktemp("flipped"), {}
    for name, item, writers in (("llama", 4, 4), ("mistral", 2, 3)):
        arguments = {"sources": str(sources), "target": str(folder), "names": [name], "nbytes": NBYTES}
        start_ranks(jobs.write_pieces, writers, "zero3", folder / f"ranks-{name}", arguments).results()
        entry = list_tensors(folder / name)[FLIPPED]
        assert entry.shape == (51, 38)
        wanted[name] = []
        for where, byte in flips(item).items():
            case = Path(shutil.copytree(folder / name, folder / f"{name}-{where}"))
            with (case / entry.shard.name).open("r+b") as file:
                file.seek(entry.offset + byte)
                (value,) = file.read(1)
                file.seek(entry.offset + byte)
                file.write(bytes([value ^ 1]))
            wanted[case.name] = [f"{case}/{entry.shard.name} was altered: {FLIPPED} "]
    return folder, wanted


@pytest.mark.parametrize(
    ("sharding", "world"), [("ddp", 1), ("ddp", 2), ("zero2", 2), ("zero3", 1), ("zero3", 2), ("zero3", 3)]
)
def test_a_flipped_bit_is_found_on_every_rank_wherever_it_is(
    sharding: str, world: int, flipped: tuple[Path, dict[str, list[str]]], tmp_path: Path
) -> None:
    folder, wanted = flipped
    arguments = {"folders": [str(folder / name) for name in wanted]}
    found = start_ranks(jobs.failing_loads, world, sharding, tmp_path / "ranks", arguments).results(60)
    assert len(found) == world
    check_errors(found, wanted)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Any]:
    """mount(name, size) makes a small file system; skips where that is not permitted."""
    mounted = []

    def make(name: str, size: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_is_full_or_read_only_is_an_error_and_keeps_the_old_checkpoint(
    mount: Any, sources: Path, tmp_path: Path
) -> None:
    size = sum(path.stat().st_size for path in (sources / "llama").glob("*.safetensors")) // 1024 + 8
    full = mount("full", f"{size * 3 // 2}k")  # room for one checkpoint, not for two
    tight = mount("tight", f"{size + 4}k")  # room for the shards, not for the tokenizer
    closed = mount("closed", "10m")
    shutil.copytree(sources / "qwen2", closed / "saved")
    subprocess.run(["mount", "-o", "remount,ro", str(closed)], check=True)
    (full / "saved").mkdir()
    for path in (sources / "llama").iterdir():
        if path.name.endswith(".safetensors"):
            shutil.copy(path, full / "saved")
    before = {folder: files_in(folder) for folder in (full, tight, closed)}
    file = tmp_path / "file"
    file.write_text("mine")
    space = "No space left on device"
    wanted = {}
    for stock in (False, True):
        wanted[f"{full}/saved {stock}"] = [space, "saved", *([] if stock else ["model.safetensors"])]
        wanted[f"{tight}/saved {stock}"] = [space, "saved"]
        wanted[f"{closed}/saved {stock}"] = ["Read-only file system", f"{closed}/saved"]
        wanted[f"{file}/saved {stock}"] = ["Not a directory", f"{file}/saved"]
        wanted[f"{file} {stock}"] = [f"{file} is a file"]
    wanted[f"{tmp_path}/good False"] = []
    targets = [[name.rpartition(" ")[0], name.endswith("True")] for name in wanted]
    arguments = {"source": str(sources / "llama"), "targets": targets}
    found = start_ranks(jobs.failing_saves, 2, "zero3", tmp_path / "ranks", arguments).results(60)
    check_errors(found, wanted)
    assert {folder: files_in(folder) for folder in before} == before
    assert [path.name for path in full.iterdir()] == ["saved"], "nothing half written stays behind"
    assert list(tight.iterdir()) == []
    assert file.read_text() == "mine"
    assert_same_files(tmp_path / "good", sources / "llama")
