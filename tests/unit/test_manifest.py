"""Checksums while reading: a bit flip anywhere is found, by one rank, whoever wrote the file and whoever reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_runtime

from oneshot.checkpoint.disk.files import MANIFEST, SINGLE, list_tensors
from oneshot.checkpoint.layout import partition
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.reads import manifest, ranges
from oneshot.checkpoint.reads.manifest import read_pieces, write_manifest
from oneshot.checkpoint.reads.ranges import read_range
from oneshot.checkpoint.writing import write
from oneshot.checkpoint.writing.write import create_shards, opened_shards, plan_shards, write_range, write_sharded
from oneshot.errors import UserError
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

SHORT = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_as(folder: Path, tensor: torch.Tensor, world_size: int) -> None:
    """Write one tensor as that many ranks would, with a manifest."""
    shapes, dtypes = {"t": tuple(tensor.shape)}, {"t": SHORT[tensor.dtype]}
    slots, headers = plan_shards(shapes, dtypes)
    create_shards(folder, slots, headers)
    written = []
    with opened_shards(folder, slots) as descriptors:
        for rank in range(world_size):
            own = partition(tuple(tensor.shape), rank, world_size)
            values = tensor.reshape(-1)[own.start : own.stop]
            written.append({"t": write_range(descriptors[SINGLE], slots["t"], own, values)})
    write_manifest(folder, written, {})


def flip(path: Path, byte: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(4, 60),
    st.data(),
)
def test_every_piece_is_checked_once_and_a_flip_is_found(
    tmp_path, shape, stored, wanted, writers, readers, chunk, data
):
    torch.manual_seed(math.prod(shape))
    tensor = torch.randn(shape).to(stored)
    for path in tmp_path.iterdir():
        path.unlink()
    checked: list[ranges.Piece] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (write, ranges, manifest):
            patch.setattr(module, "CHUNK", chunk)
        write_as(tmp_path, tensor, writers)
        entry = list_tensors(tmp_path)["t"]
        pieces = read_pieces(tmp_path, {"t": entry})["t"]
        item = tensor.element_size()
        assert all((stop - start) * item <= chunk for start, stop, _ in pieces)
        borders = {partition(shape, rank, writers).start for rank in range(writers)}
        assert borders - {tensor.numel()} <= {start for start, _, _ in pieces}, "no piece crosses a rank's border"
        real = ranges._check
        patch.setattr(
            ranges, "_check", lambda part, *a: (checked.append((part.start, part.end, part.checksum)), real(part, *a))
        )

        def read_all() -> list[str]:
            errors = []
            for rank in range(readers):
                own = partition(shape, rank, readers)
                out = torch.empty(own.size, dtype=wanted)
                try:
                    read_range(entry, own, out, "layer.t", pieces)
                    assert torch.equal(out[: own.numel], tensor.reshape(-1)[own.start : own.stop].to(wanted))
                except UserError as error:
                    errors.append(str(error))
            return errors

        assert read_all() == []
        assert sorted(checked) == pieces
        byte = data.draw(st.integers(0, tensor.numel() * item - 1))
        flip(tmp_path / SINGLE, entry.offset + byte)
        tensor = list_values(tmp_path)
        (error,) = read_all()
        (start, stop) = next(piece[:2] for piece in pieces if piece[0] * item <= byte < piece[1] * item)
        assert f"{tmp_path / SINGLE} was altered: layer.t " in error
        assert f"elements {start} to {stop};" in error


def list_values(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / SINGLE)["t"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_sharded(tiny_runtime(), tiny_model("llama"), build_tokenizer(), tmp_path / "saved", torch.float32)
    return tmp_path / "saved"


def load(folder: Path, **options: bool) -> object:
    chosen = ModelSettings(path=str(folder), **options)
    return load_model(tiny_runtime(), find_source(chosen, tiny_runtime()), chosen)


def test_a_flip_is_found_when_a_whole_model_is_loaded(saved):
    name = "model.layers.1.mlp.up_proj.weight"
    load(saved)
    flip(saved / SINGLE, list_tensors(saved)[name].offset + 77)
    with pytest.raises(UserError, match=rf"{SINGLE} was altered: {name} does not have the checksum"):
        load(saved)
    load(saved, stock_io=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 200])
def test_ranks_that_share_the_check_check_every_piece_once(world_size, saved, monkeypatch):
    checked: list[tuple[str, ranges.Piece]] = []
    monkeypatch.setattr(manifest, "agree", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(manifest, "read_all", lambda reads: checked.extend((r.name, r.pieces[0]) for r in reads))
    for rank in range(world_size):
        manifest.check_share(dataclasses.replace(tiny_runtime(), rank=rank, world_size=world_size), saved)
    pieces = read_pieces(saved, list_tensors(saved))
    assert sorted(checked) == sorted((name, piece) for name, found in pieces.items() for piece in found)


NORM = "model.norm.weight"


def misfits():
    def without(text: dict) -> None:
        del text["pieces"][NORM]

    def renamed(text: dict) -> None:
        text["pieces"]["model.other.weight"] = text["pieces"].pop(NORM)

    def gap(text: dict) -> None:
        text["pieces"][NORM][0][0] = 1

    def short(text: dict) -> None:
        text["pieces"][NORM][0][1] -= 1

    def words(text: dict) -> None:
        text["pieces"][NORM] = "all"

    def parts(text: dict) -> None:
        text["pieces"][NORM][0] = [0, 32.0, None]

    def huge(text: dict) -> None:
        text["pieces"][NORM][0][1] = 2**40

    def size(text: dict) -> None:
        text["files"][SINGLE] = 7

    def gone(text: dict) -> None:
        text["files"]["model-2.safetensors"] = 7

    def outside(text: dict) -> None:
        text["files"]["../saved/model.safetensors"] = text["files"][SINGLE]

    def unlisted(text: dict) -> None:
        text["files"] = {}

    def older(text: dict) -> None:
        del text["hash"]

    def half(text: dict) -> None:
        del text["pieces"]

    return [without, renamed, gap, short, words, parts, huge, size, gone, outside, unlisted, older, half]


@pytest.mark.parametrize("edit", misfits(), ids=lambda edit: edit.__name__)
def test_a_manifest_that_does_not_fit_is_named(edit, saved):
    text = json.loads((saved / MANIFEST).read_text())
    del text["sha256"]  # which would tell of any edit, but need not be there
    edit(text)
    (saved / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(UserError, match=rf"{MANIFEST} does not fit the files beside it: .*; copy the checkpoint") as e:
        load(saved)
    assert "\n" not in str(e.value)


def test_a_manifest_that_is_no_json_is_named(saved):
    (saved / MANIFEST).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=rf"{MANIFEST} is not valid JSON"):
        load(saved)


@pytest.mark.parametrize("text", ['{"name": "an app"}', "[1]"])
def test_another_programs_manifest_is_left_alone(text, saved):
    (saved / MANIFEST).write_text(text)
    load(saved)


def test_a_checkpoint_without_manifest_is_loaded_unchecked(saved):
    (saved / MANIFEST).unlink()
    flip(saved / SINGLE, list_tensors(saved)[NORM].offset + 1)
    load(saved)


def test_a_copy_keeps_its_checksums(saved, tmp_path):
    load(Path(shutil.copytree(saved, tmp_path / "copy")))
