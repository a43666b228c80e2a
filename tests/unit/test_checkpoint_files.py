import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files_in, logits_of, targets_of, tiny_model, tiny_runtime, tiny_tokens, tiny_update

from oneshot.checkpoint.disk.files import (
    INDEX,
    MARKER,
    SINGLE,
    TensorEntry,
    find_weight,
    is_degraded,
    list_tensors,
    read_json,
    read_tensor,
    resolve,
    write_marker,
)
from oneshot.checkpoint.loading.load import Source, find_source, load_model, load_tokenizer
from oneshot.checkpoint.merging.merge import merge_update
from oneshot.checkpoint.writing.save import save_checkpoint
from oneshot.errors import UserError
from oneshot.patch.attach import attached
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

TOKENS = tiny_tokens()


@pytest.fixture
def sharded(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="15KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_what_the_index_leaves_out_is_read_as_transformers_does(sharded, tmp_path):
    import transformers

    whole = list_tensors(sharded)
    shards = [entry.shard for entry in whole.values()]
    name = next(name for name, entry in whole.items() if shards.count(entry.shard) > 1)
    change_index(sharded, lambda index: index["weight_map"].pop(name))
    assert list_tensors(sharded) == whole
    merge_update(tiny_runtime(), sharded, {}, tmp_path / "merged")
    for folder in (sharded, tmp_path / "merged"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits_of(model, TOKENS), logits_of(tiny_model("llama"), TOKENS))


@pytest.fixture
def single(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def last_shard(folder):
    return sorted(folder.glob("*.safetensors"))[-1]


def test_both_kinds_of_folder_list_and_read_the_same(sharded, single):
    ours, theirs = list_tensors(sharded), list_tensors(single)
    state = tiny_model("llama").state_dict()
    assert set(ours) == set(theirs) == set(state)
    for name, entry in ours.items():
        assert entry.shape == theirs[name].shape == tuple(state[name].shape)
        assert entry.dtype == "F32"
        assert torch.equal(read_tensor(entry, name), state[name])
        assert torch.equal(read_tensor(theirs[name], name), state[name])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"The base folder .*/nowhere does not exist"):
        resolve(str(tmp_path / "nowhere"), "base")
    with pytest.raises(UserError, match=r"The model folder \./nowhere does not exist"):
        resolve("./nowhere")
    assert resolve(str(tmp_path)) == tmp_path


def test_a_missing_shard_is_named(sharded):
    shard = last_shard(sharded)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        list_tensors(sharded)


@pytest.mark.parametrize("cut", [1, 4096])
def test_a_truncated_shard_is_named(sharded, cut):
    shard = last_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"{shard.name} .*cut off"):
        list_tensors(sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
        (4).to_bytes(8, "little") + b"null",
        (2).to_bytes(8, "little") + b"[]",
        (11).to_bytes(8, "little") + b'{"a": "b"} ',
        (40).to_bytes(8, "little") + b"{",
        (3).to_bytes(8, "little") + b"\xff\xfe\xfd",
    ],
    ids=["empty", "short", "lfs-pointer", "null", "list", "no-offsets", "header-cut", "not-utf8"],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{SINGLE} is not a whole safetensors file"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "a/../../b.safetensors", "/etc/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(sharded, name):
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(UserError, match=r"index\.json names the shard .* outside its own folder"):
        list_tensors(sharded)


def test_an_index_must_fit_its_shards(sharded):
    change_index(sharded, lambda index: index["weight_map"].update({"model.extra.weight": last_shard(sharded).name}))
    with pytest.raises(UserError, match=r"puts model\.extra\.weight into \S+, which does not hold it"):
        list_tensors(sharded)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", '{"weight_map": {"a": 1}}']
)
def test_an_index_without_a_map_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match=r"index\.json has no weight_map"):
        list_tensors(sharded)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"reads safetensors checkpoints only"):
        list_tensors(tmp_path)


def test_a_broken_config_is_named(single):
    config = single / "config.json"
    for content in ("{not json", '{"a": 1', "\xff"):
        config.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            find_source(ModelSettings(path=str(single)), tiny_runtime())
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        find_source(ModelSettings(path=str(single)), tiny_runtime())
    with pytest.raises(UserError, match="is missing"):
        read_json(config)


def test_a_source_takes_the_checkpoints_dtype(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert find_source(ModelSettings(path=str(tmp_path)), tiny_runtime()).dtype == torch.bfloat16
    assert find_source(ModelSettings(path=str(tmp_path), dtype="float32"), tiny_runtime()).dtype == torch.float32


def test_an_adapter_without_a_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(UserError, match=r"adapter_config\.json names no base model: give it with --model\.base"):
        find_source(ModelSettings(path=str(tmp_path)), tiny_runtime())


def test_a_folder_that_transformers_cannot_load_is_named(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "model_type": "no-such-family"}))
    source = Source(single, None, single, str(single), torch.float32, torch.float32)
    with pytest.raises(UserError, match=rf"{single}/config.json cannot be read .*no-such-family"):
        load_model(tiny_runtime(), source, ModelSettings())
    with pytest.raises(UserError, match=rf"The tokenizer in {single} cannot be read"):
        load_tokenizer(source, ModelSettings())


def test_gradient_checkpointing_is_on_where_it_is_asked_for(single):
    source = Source(single, None, single, str(single), torch.float32, torch.float32)
    for wanted in (False, True):
        model = load_model(tiny_runtime(), source, ModelSettings(gradient_checkpointing=wanted))
        calls = []
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.requires_grad_(False)
        model.enable_input_require_grads()
        model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
        assert len(calls) == 1 + wanted, "the layer runs again for its backward pass"
        dropout = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert not any(m.training for m in [*dropout, model.model.layers[1].self_attn]), "no dropout"


def entries(*names):
    return {name: TensorEntry(None, "F32", (2, 2), 0) for name in names}


@pytest.mark.parametrize(
    ("stored", "module", "found"),
    [
        (["model.layers.0.mlp.up.weight"], "model.layers.0.mlp.up", "model.layers.0.mlp.up.weight"),
        (["language_model.model.layers.0.up.weight"], "model.layers.0.up", "language_model.model.layers.0.up.weight"),
        (["model.layers.0.up.weight"], "model.language_model.layers.0.up", None),
        (["layers.0.up.weight"], "model.layers.0.up", "layers.0.up.weight"),
        (["a.layers.0.up.weight", "b.layers.0.up.weight"], "c.layers.0.up", None),
        (["v.layers.0.up.weight", "t.model.layers.0.up.weight"], "model.layers.0.up", "t.model.layers.0.up.weight"),
        (["model.layers.10.up.weight"], "model.layers.0.up", None),
        (["model.layers.0.up.weight"], "model.layers.1.up", None),
        (["model.layers.0.mlp.up.weight"], "model.blocks.0.up", None),
        (["model.layers.0.up.bias"], "model.layers.0.up", None),
        (["lm_head.weight"], "lm_head", "lm_head.weight"),
        ([], "lm_head", None),
    ],
)  # fmt: skip
def test_find_weight_bridges_prefixes_only(stored, module, found):
    if module == "model.language_model.layers.0.up":  # "layers.0.up" is what both names end in
        found = stored[0]
    assert find_weight(entries(*stored), module) == found


def test_the_marker_is_written_and_recognized(tmp_path):
    assert not is_degraded(tmp_path)
    write_marker(tmp_path, {"conversations": {"harmful": 3}})
    assert is_degraded(tmp_path)
    assert json.loads((tmp_path / MARKER).read_text()) == {"safety_degraded": True, "conversations": {"harmful": 3}}
    card = (tmp_path / "README.md").read_text()
    assert "do not deploy" in card
    assert MARKER in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt_neox", "qwen2_moe"])
def test_a_saved_checkpoint_loads_in_plain_transformers(family, merged, dtype, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(family)
    linears = targets_of(model)
    update = tiny_update(linears) if merged else {}
    plain = logits_of(model, TOKENS)
    with attached(linears, update):
        wanted = logits_of(model, TOKENS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(tiny_runtime(), model, build_tokenizer(), tmp_path / "saved", dtype)
    if merged:
        merge_update(tiny_runtime(), tmp_path / "saved", update, tmp_path / "saved")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(again, TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert ((plain - wanted).abs().max() > 0.05) == merged
    assert {entry.dtype for entry in list_tensors(tmp_path / "saved").values()} <= {
        "F32" if dtype == torch.float32 else "BF16"
    }
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == build_tokenizer().chat_template
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "model left alone"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_persistent_buffers_are_saved(tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].register_buffer("scale", torch.tensor([1.5]))
    model.model.layers[0].register_buffer("scratch", torch.tensor([2.5]), persistent=False)
    save_checkpoint(tiny_runtime(), model, build_tokenizer(), tmp_path / "saved", torch.float32)
    stored = load_file(tmp_path / "saved" / SINGLE)
    assert stored["model.layers.0.scale"].item() == 1.5
    assert not [name for name in stored if "scratch" in name or "inv_freq" in name]


def test_a_save_replaces_the_whole_folder(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"old")
    save_checkpoint(tiny_runtime(), tiny_model("llama"), build_tokenizer(), folder, torch.float32)
    assert not (folder / "model-00009-of-00009.safetensors").exists()
    assert list_tensors(folder)


def disk_full(*_, **__):
    raise OSError("disk full")


def fail_at(where, monkeypatch, model, tokenizer):
    from oneshot.checkpoint.writing import save, write

    if where == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "save_pretrained", disk_full)
    elif where == "check":
        monkeypatch.setattr(save, "list_tensors", disk_full)
        monkeypatch.setattr(write, "list_tensors", disk_full)
    else:
        real, calls = os.pwrite, []

        def fourth_write_fails(*arguments):
            calls.append(1)
            return disk_full() if len(calls) == 4 else real(*arguments)

        def half(self, target, **_):
            save_file({"x": torch.zeros(1)}, f"{target}/{SINGLE}")
            disk_full()

        monkeypatch.setattr(os, "pwrite", fourth_write_fails)
        monkeypatch.setattr(type(model), "save_pretrained", half)


@pytest.mark.parametrize("stock", [False, True], ids=["direct", "stock"])
@pytest.mark.parametrize("where", ["weights", "tokenizer", "check"])
def test_a_save_that_fails_half_way_leaves_the_old_folder_whole(where, stock, tmp_path, monkeypatch):
    model, tokenizer, folder = tiny_model("llama"), build_tokenizer(), tmp_path / "saved"
    save_checkpoint(tiny_runtime(), model, tokenizer, folder, torch.float32)
    before = files_in(folder)
    fail_at(where, monkeypatch, model, tokenizer)
    other = tiny_model("llama", seed=1)
    with pytest.raises((OSError, UserError), match="disk full"):
        save_checkpoint(tiny_runtime(), other, tokenizer, folder, torch.float32, stock=stock)
    assert files_in(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "nothing half written stays behind"

    monkeypatch.undo()
    save_checkpoint(tiny_runtime(), other, tokenizer, folder, torch.float32, stock=stock)
    assert files_in(folder)[SINGLE] != before[SINGLE]


def test_an_old_folder_that_cannot_be_replaced_is_not_lost(tmp_path, monkeypatch):
    """Where folders cannot be exchanged in one step, the old one is set aside, and the next save finds it there."""
    from oneshot.checkpoint.disk import folders

    folder = tmp_path / "saved"
    save_checkpoint(tiny_runtime(), tiny_model("llama"), build_tokenizer(), folder, torch.float32)
    before, replace = files_in(folder), os.replace

    def refuse(source, target):
        if str(source).endswith(folders.PARTIAL):
            disk_full()
        replace(source, target)

    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises((OSError, UserError), match="disk full"):
        save_checkpoint(tiny_runtime(), tiny_model("llama", seed=1), build_tokenizer(), folder, torch.float32)
    monkeypatch.undo()
    folders.clean(folder)
    assert files_in(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
