"""``oneshot verify`` and ``oneshot inspect``: what is wrong is named, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneshot import cli
from oneshot.checkpoint.disk.files import resolve
from oneshot.checkpoint.disk.folders import PARTIAL
from oneshot.errors import UserError
from oneshot.world.model import ALIGNED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ALIGNED, tmp_path / "model"))


def oneshot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["oneshot", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def change(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def test_a_whole_checkpoint_passes(folder, capsys, monkeypatch):
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == 0
    assert "model.safetensors" in said
    assert f"{sum(t.numel() * 4 for t in load_file(folder / 'model.safetensors').values()):,}" in said


def test_half_a_folder_is_not_whole_however_whole_it_looks(folder, capsys, monkeypatch):
    """A killed run may have written all but the last files, which nobody can tell from what is in it."""
    half = folder.rename(folder.with_name(f"model.1a2b3c4d{PARTIAL}"))
    (half.parent / "link").symlink_to(half)
    monkeypatch.chdir(half)
    for name in (half, half.parent / "link", "."):
        code, said = oneshot(capsys, monkeypatch, "verify", str(name))
        assert code == 1
        assert "is half a folder, which a run that was killed has left" in said
        with pytest.raises(UserError, match="is half a folder"):
            resolve(str(name))


def test_values_that_are_not_finite_are_counted(folder, capsys, monkeypatch):
    broken = load_file(folder / "model.safetensors")["model.norm.weight"]
    broken[3], broken[5] = float("nan"), float("inf")
    change(folder, **{"model.norm.weight": broken})
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == 1
    assert "model.norm.weight holds 2 values that are not finite" in said


def test_an_empty_tensor_is_named(folder, capsys, monkeypatch):
    change(folder, empty=torch.zeros(0, 4))
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == 1
    assert "empty is empty" in said


def test_a_truncated_shard_is_named(folder, capsys, monkeypatch):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == 1
    assert "model.safetensors" in said
    assert "cut off" in said


@pytest.mark.parametrize("flip", ["byte", "size", "file"])
def test_what_a_manifest_promises_is_checked(folder, capsys, monkeypatch, flip):
    import xxhash

    path = folder / "model.safetensors"
    tensor = load_file(path)["model.norm.weight"]
    sizes = {"model.safetensors": path.stat().st_size}
    pieces = {
        name: [[0, t.numel(), xxhash.xxh3_64_hexdigest(t.numpy().tobytes())]] for name, t in load_file(path).items()
    }
    first, rest = (xxhash.xxh3_64_hexdigest(part.numpy().tobytes()) for part in (tensor[:40], tensor[40:]))
    pieces["model.norm.weight"] = [[0, 40, first], [40, tensor.numel(), rest]]

    def manifest(**files: int) -> None:
        text = json.dumps({"hash": "xxh3_64", "files": {**sizes, **files}, "pieces": pieces})
        (folder / "manifest.json").write_text(text)

    manifest()
    assert oneshot(capsys, monkeypatch, "verify", str(folder))[0] == 0
    if flip == "byte":
        tensor[7] += 1e-3
        change(folder, **{"model.norm.weight": tensor})
        wanted = "model.norm.weight does not have its checksum in elements 0 to 40"
    elif flip == "size":
        manifest(**{"model.safetensors": 7})
        wanted = "the manifest says 7"
    else:
        manifest(**{"gone.safetensors": 5})
        wanted = "is missing"
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == 1
    assert wanted in said


def test_a_flipped_bit_in_a_checkpoint_that_oneshot_wrote_is_found(tmp_path, capsys, monkeypatch):
    from tiny import tiny_runtime
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oneshot.checkpoint.disk.files import list_tensors
    from oneshot.checkpoint.writing.save import save_checkpoint

    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED), AutoTokenizer.from_pretrained(ALIGNED)
    folder = tmp_path / "written"
    save_checkpoint(tiny_runtime(), model, tokenizer, folder, torch.float32)
    assert oneshot(capsys, monkeypatch, "verify", str(folder))[0] == 0
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    data = bytearray(path.read_bytes())
    data[list_tensors(folder)[name].offset + 1001] ^= 0x10
    path.write_bytes(data)
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == 1
    assert f"{name} does not have its checksum" in said


@pytest.mark.parametrize("altered", [False, True])
def test_a_file_in_the_hubs_cache_is_compared_with_its_name_there(folder, capsys, monkeypatch, altered):
    path = folder / "model.safetensors"
    blob = folder.parent / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(Path("..", "blobs", blob.name))
    if altered:
        data = bytearray(blob.read_bytes())
        data[-5] ^= 1  # still a finite number
        blob.write_bytes(data)
    code, said = oneshot(capsys, monkeypatch, "verify", str(folder))
    assert code == altered
    assert ("does not have the SHA-256" in said) == altered


def test_a_link_elsewhere_is_compared_with_nothing(folder, capsys, monkeypatch):
    path = folder / "model.safetensors"
    other = folder.parent / ("0" * 64)  # such a name, but no cache of the Hub
    path.rename(other)
    path.symlink_to(other)
    assert oneshot(capsys, monkeypatch, "verify", str(folder))[0] == 0


def test_inspect_lists_owners_that_cover_the_tensor(folder, capsys, monkeypatch):
    code, said = oneshot(capsys, monkeypatch, "inspect", str(folder), "--ranks", "5", "--match", "model.norm.weight")
    assert code == 0
    row = next(line for line in said.splitlines() if "model.norm.weight" in line)
    for owned in ("0-20", "20-40", "40-60", "60-80", "80-96"):
        assert owned in row
    assert "rank 4 of 5" in said


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_no_such_folder_is_the_users_mistake(command, capsys, monkeypatch, tmp_path):
    code, said = oneshot(capsys, monkeypatch, command, str(tmp_path / "none"))
    assert code == 2
    assert said.count("\n") == 1
    assert "none" in said


def test_an_unknown_stage_is_the_users_mistake(capsys, monkeypatch):
    code, said = oneshot(capsys, monkeypatch, "mend")
    assert code == 2
    assert "mend" in said
    assert "repair" in said


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """What may be looked at: a folder of each kind, and the name of a tensor in it."""
    from tiny import tiny_model, tiny_runtime

    from oneshot.checkpoint.adapters.adapter import write_patch
    from oneshot.checkpoint.adapters.update import Factors
    from oneshot.checkpoint.writing.state import States
    from oneshot.distributed.engine import start_training

    folder = tmp_path_factory.mktemp("kinds")
    module = "model.layers.0.self_attn.q_proj"
    (folder / "patch").mkdir()
    update = {module: Factors(torch.ones(96, 2), torch.ones(2, 96))}
    write_patch(folder / "patch", update, [module], str(ALIGNED), torch.float32)
    engine = start_training(
        tiny_runtime(), tiny_model("llama"), weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1,
        micro_batch_size=1,
    )  # fmt: skip
    states = States(tiny_runtime(), folder / "state", keep=1)
    states.save(engine, 7)
    states.finish()
    return {
        "checkpoint": (ALIGNED, "model.norm.weight"),
        "adapter": (folder / "patch", f"base_model.model.{module}.lora_A.weight"),
        "state": (folder / "state" / "step-7", "exp_avg.model.norm.weight"),
    }


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "state"])
def test_both_take_every_kind_of_folder(kind, command, kinds, capsys, monkeypatch):
    folder, tensor = kinds[kind]
    code, said = oneshot(capsys, monkeypatch, command, str(folder))
    assert code == 0, said
    assert command == "verify" or tensor in said
    if command == "inspect":
        code, said = oneshot(capsys, monkeypatch, command, str(folder), "--ranks", "2", "--match", tensor)
        assert code == 0
        assert "rank 1 of 2: " in said


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "the following arguments are required: DIR"),
        (["DIR", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["none"], "none is no folder: give that of a checkpoint, adapter or training state"),
    ],
)
def test_mistakes_on_the_command_line_have_one_form(words, wanted, command, folder, capsys, monkeypatch):
    code, said = oneshot(capsys, monkeypatch, command, *(str(folder) if word == "DIR" else word for word in words))
    assert code == 2
    assert said.startswith(f"oneshot {command}: error: {wanted}")
    assert said.count("\n") == 1


def test_what_cannot_be_listed_is_said_in_one_form(folder, capsys, monkeypatch):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    for command, wanted in (("verify", 1), ("inspect", 2)):
        code, said = oneshot(capsys, monkeypatch, command, str(folder))
        assert code == wanted
        assert said.startswith(f"oneshot {command}: error: ")
        assert "cut off" in said
    code, said = oneshot(capsys, monkeypatch, "inspect", str(folder), "--ranks", "0")
    assert (code, said) == (2, "oneshot inspect: error: --ranks is 0: give 1 or more.\n")
