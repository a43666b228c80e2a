"""What oneshot writes it knows again: one bit of adapter, config, tokenizer or template that changes is named."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
import torch
from test_export import alone, export, repair_on, run  # noqa: F401 (a fixture)
from test_merge import save_base, save_lora
from tiny import tiny_runtime

from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.disk.folders import replacing
from oneshot.checkpoint.disk.seal import check_sealed, seal
from oneshot.checkpoint.loading.configs import read_tokenizer
from oneshot.checkpoint.reads import digests
from oneshot.checkpoint.reads.digests import fingerprint, tensor_digests
from oneshot.checkpoint.writing.identity import IDENTITY, check_identity, read_identity, write_identity
from oneshot.checkpoint.writing.save import save_checkpoint
from oneshot.checkpoint.writing.verify import check_shards
from oneshot.data.cache import folder_of, put
from oneshot.errors import UserError
from oneshot.measure.cache import Responses
from oneshot.report.answers import write_answers
from oneshot.world.model import ALIGNED, build_tokenizer

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A base, a patch and a checkpoint that oneshot wrote; tests do not write there."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("written")
    save_base(folder / "base", dtype=torch.float32)
    save_lora(folder / "lora", folder / "base", seed=1)
    repair_on(folder / "base", folder / "lora", folder / "patch")
    seal(folder / "patch")
    model = AutoModelForCausalLM.from_pretrained(ALIGNED)
    save_checkpoint(tiny_runtime(), model, build_tokenizer(), folder / "model", torch.float32)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def problems(folder):
    try:
        return [problem for shard in check_shards(folder) for problem in shard.problems]
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("place", [-1, -1000, -4001])
def test_a_flipped_bit_in_a_patch_is_found_by_whoever_reads_it(copy, place, capsys):
    path = copy / "patch" / "adapter_model.safetensors"
    flip(path, place)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not the file that was written"):
        read_adapter(copy / "patch")
    assert "is not the file that was written" in problems(copy / "patch")[0]
    with pytest.raises(SystemExit) as end:
        run("--model", copy / "base", "--adapter", copy / "patch", "--out", copy / "out")
    assert end.value.code == 2
    assert not (copy / "out").exists()


def test_a_changed_number_in_a_patchs_config_is_found_and_another_place_of_its_base_is_none(copy):
    path = copy / "patch" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "base_model_name_or_path": "elsewhere", "revision": "v2"}))
    read_adapter(copy / "patch")
    path.write_text(json.dumps({**fields, "lora_alpha": fields["lora_alpha"] + 1}))
    with pytest.raises(UserError, match=r"adapter_config\.json is not the file that was written"):
        read_adapter(copy / "patch")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("change", ["flip", "remove"])
def test_a_changed_or_missing_file_of_a_checkpoint_is_found(copy, name, change):
    path = copy / "model" / name
    assert problems(copy / "model") == []
    flip(path, -3) if change == "flip" else path.unlink()
    assert name in problems(copy / "model")[0]


def test_a_tokenizer_of_ours_is_compared_where_it_is_read(copy):
    path = copy / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not the file that was written"):
        read_tokenizer(copy / "model")


def test_verify_finds_a_missing_template_and_a_broken_tokenizer_in_other_folders_too(copy):
    folder = copy / "base"
    if not (folder / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(folder)
    assert problems(folder) == []
    template = folder / "chat_template.jinja"
    template.unlink()
    assert "has no chat template" in problems(folder)[0]
    template.write_text("{{ 1/0 }}")
    assert "division by zero" in problems(folder)[0]
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in problems(folder)[0]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "there is no tokenizer" in problems(folder)[0]


def test_a_manifest_that_leads_elsewhere_is_refused(copy):
    path = copy / "model" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": {"../x/config.json": "0"}}))
    with pytest.raises(UserError, match="not in this folder"):
        check_sealed(copy / "model")


def test_every_tensor_of_the_base_counts(copy):
    patch, base = copy / "patch", copy / "base"
    check_identity(patch, base)
    for name, entry in list_tensors(base).items():
        flip(entry.shard, entry.offset + 2050 if entry.shape[0] > 600 else entry.offset + 5)
        with pytest.raises(UserError, match="holds other values"):
            check_identity(patch, base)
        assert fingerprint(base) != read_identity(patch).tensors, name
        flip(entry.shard, entry.offset + 2050 if entry.shape[0] > 600 else entry.offset + 5)
    check_identity(patch, base)


def test_a_patch_of_before_is_still_checked_by_its_samples(copy):
    from oneshot.checkpoint.writing import identity

    path, base = copy / "patch" / IDENTITY, copy / "base"
    tensors = list_tensors(base)
    fields = json.loads(path.read_text())
    old = {name: identity._sample(tensors[name], name) for name in fields["changed"]}
    path.write_text(json.dumps({**fields, "schema": 1, "changed": old, "others": {}}))
    check_identity(copy / "patch", base)
    entry = tensors[next(iter(old))]
    flip(entry.shard, entry.offset)
    with pytest.raises(UserError, match="holds other values"):
        check_identity(copy / "patch", base)


def test_digests_come_from_the_manifest_or_the_cache_where_they_can(copy, monkeypatch):
    def no_reading(*_):
        raise AssertionError("weights were read")

    plain = copy / "plain"
    shutil.copytree(copy / "model", plain)
    (plain / "manifest.json").unlink()
    os.utime(plain / "model.safetensors", (1, 1))
    monkeypatch.setattr(digests, "_YOUNG", -1.0)
    found = tensor_digests(plain)
    monkeypatch.setattr(digests, "_hashed", no_reading)
    assert tensor_digests(copy / "model") == found, "of the manifest"
    assert tensor_digests(plain) == found, "of the cache"
    assert set(found) == set(list_tensors(plain))
    os.utime(plain / "model.safetensors", (2, 2))
    with pytest.raises(AssertionError, match="weights were read"):
        tensor_digests(plain)


def test_a_damaged_cache_of_digests_is_passed_over(copy, monkeypatch):
    monkeypatch.setattr(digests, "_YOUNG", -1.0)
    found = tensor_digests(copy / "base")
    for path in folder_of("digests").iterdir():
        path.write_text("[1" if path.stat().st_mtime_ns % 2 else '{"key": 3}')
    assert tensor_digests(copy / "base") == found


def test_what_is_published_honours_the_umask(tmp_path):
    with replacing(tiny_runtime(), tmp_path / "patch") as temporary:
        write_patch(temporary, {MODULE: Factors(torch.ones(96, 2), torch.ones(2, 96))}, [MODULE], "base", torch.float32)
        write_identity(temporary, ALIGNED, kind="repair", base="base")
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "patch").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_what_holds_prompts_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(b"tokens", folder_of("tokens") / "a")
    Responses(tmp_path).put("key", "answer")
    write_answers(tmp_path, {"model": [{"id": "1", "answer": "a"}]})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [*tmp_path.iterdir(), folder_of("tokens") / "a"]}
    assert {modes[name] for name in ("responses.jsonl", "answers.jsonl", "a")} == {0o600}
    assert stat.S_IMODE(folder_of("tokens").stat().st_mode) == 0o700


def test_no_file_of_a_published_folder_holds_a_key(tmp_path):
    key = "hf_" + "Ab1" * 8
    with replacing(tiny_runtime(), tmp_path / "patch") as temporary:
        update = {MODULE: Factors(torch.ones(96, 2), torch.ones(2, 96))}
        write_patch(temporary, update, [MODULE], f"/models/{key}/base", torch.float32)
        write_identity(temporary, ALIGNED, kind="repair", base=f"/models/{key}/base")
        (temporary / "config.json").write_text(json.dumps({"_name_or_path": f"https://me:{'p/a@b'}@host/{key}"}))
        (temporary / "SAFETY_DEGRADED.json").write_text(json.dumps({"fine_tuned_from": key}))
        (temporary / "README.md").write_text(f"base_model: {key}")
    for path in (tmp_path / "patch").iterdir():
        assert key.encode() not in path.read_bytes(), path
        assert b"p/a@b" not in path.read_bytes(), path
    read_adapter(tmp_path / "patch")
