"""Writing shards range by range, reading ranges back, and putting the finished folder in the old one's place."""

import errno
import itertools
import json
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saving import save, whole
from tiny import FAMILIES, files_in, logits_of, tiny_model, tiny_runtime, tiny_tokens

from oneshot.checkpoint.disk import folders
from oneshot.checkpoint.disk.files import INDEX, SINGLE, list_tensors, read_header
from oneshot.checkpoint.disk.folders import OLD, PARTIAL, clean, replacing
from oneshot.checkpoint.layout import ITEM_SIZES, partition
from oneshot.checkpoint.loading.partitioned import own_tensors, why_not
from oneshot.checkpoint.loading.segments import described
from oneshot.checkpoint.reads import ranges
from oneshot.checkpoint.reads.ranges import read_range
from oneshot.checkpoint.reads.storage import Storage
from oneshot.checkpoint.writing import write
from oneshot.checkpoint.writing.write import plan_shards, stored_form, write_sharded
from oneshot.errors import UserError
from oneshot.world.model import build_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- plan_shards -----------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
TENSORS = st.dictionaries(NAMES, st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8)


def size_of(shape, dtype):
    return math.prod(shape) * ITEM_SIZES[dtype]


@quick
@given(TENSORS, st.data(), st.integers(1, 2000))
def test_planned_shards_are_whole_safetensors_files(tmp_path, shapes, data, max_bytes):
    dtypes = {name: data.draw(st.sampled_from(["F32", "BF16", "I64", "U8"])) for name in shapes}
    slots, headers = plan_shards(shapes, dtypes, max_bytes)
    assert set(slots) == set(shapes)
    for shard, header in headers.items():
        inside = {name: slot for name, slot in slots.items() if slot.shard == shard}
        spans = sorted((slot.offset, slot.offset + size_of(slot.shape, slot.dtype)) for slot in inside.values())
        end = len(header)
        for begin, stop in spans:
            assert begin == end, "no gap and no overlap"
            end = stop
        assert all(slot.offset % ITEM_SIZES[slot.dtype] == 0 for slot in inside.values()), "aligned"
        (tmp_path / shard).write_bytes(header + bytes(end - len(header)))
        with safe_open(tmp_path / shard, framework="pt") as whole:
            assert set(whole.keys()) == set(inside)
            for name, slot in inside.items():
                assert whole.get_slice(name).get_dtype() == dtypes[name] == slot.dtype
                assert tuple(whole.get_tensor(name).shape) == shapes[name] == slot.shape
        assert {n: e.offset for n, e in read_header(tmp_path / shard).items()} == {
            n: s.offset for n, s in inside.items()
        }


@quick
@given(TENSORS, st.sampled_from(["F32", "BF16"]), st.integers(1, 2000))
def test_planned_shards_keep_order_and_maximum(shapes, dtype, max_bytes):
    slots, headers = plan_shards(shapes, dict.fromkeys(shapes, dtype), max_bytes)
    assert sorted(shapes, key=lambda name: (slots[name].shard, slots[name].offset)) == list(shapes)
    shards = [[n for n in shapes if slots[n].shard == shard] for shard in sorted(headers)]
    assert [name for shard in shards for name in shard] == list(shapes)
    sizes = [[size_of(shapes[name], dtype) for name in shard] for shard in shards]
    for inside in sizes:
        assert sum(inside) <= max_bytes or [size for size in inside if size] == [max(inside)]
    for inside, following in itertools.pairwise(sizes):
        assert sum(inside) + following[0] > max_bytes, "a shard is closed only when the next tensor does not fit"


def test_a_tensor_larger_than_the_maximum_has_a_shard_of_its_own():
    shapes = {"a": (3,), "large": (100,), "b": (2,), "c": (2,)}
    slots, headers = plan_shards(shapes, dict.fromkeys(shapes, "F32"), 16)
    assert list(headers) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [slots[name].shard[10] for name in shapes] == ["1", "2", "3", "3"]


def test_one_shard_has_the_plain_name():
    slots, headers = plan_shards({"a": (3,)}, {"a": "F32"})
    assert list(headers) == [SINGLE] == [slots["a"].shard]


# --- write_sharded, against transformers -----------------------------------------------------------------------------


def save_both(model, dtype, tmp_path, **options):
    """Save by transformers and by us; returns both folders."""
    write_sharded(tiny_runtime(), model, build_tokenizer(), tmp_path / "ours", dtype, **options)
    cast = type(model)(model.config)
    cast.load_state_dict(model.state_dict())
    cast.to(dtype).save_pretrained(tmp_path / "theirs")
    return tmp_path / "ours", tmp_path / "theirs"


def equal_files(one, other):
    """Whether two checkpoints hold the same tensors bit for bit (their bytes are compared, so NaN equals NaN)."""
    ours, theirs = everything(one), everything(other)
    assert sorted(ours) == sorted(theirs)
    assert ours, "nothing is compared"
    return all(
        ours[n].dtype == theirs[n].dtype
        and ours[n].shape == theirs[n].shape
        and ours[n].contiguous().view(-1).view(torch.uint8).equal(theirs[n].contiguous().view(-1).view(torch.uint8))
        for n in ours
    )


def everything(folder):
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])  # that one is renamed
def test_a_written_checkpoint_is_transformers_own(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "CHUNK", 1001)  # many writes per tensor, none of them at a row's end
    model = tiny_model(family, vocab_size=101)
    assert list(stored_form(model)) == list(own_tensors(model))
    ours, theirs = save_both(model, dtype, tmp_path)
    assert equal_files(ours, theirs)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())


def test_buffers_keep_their_own_dtype(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    first = model.model.layers[0]
    first.register_buffer("mask", torch.tensor([True, False, True]))
    first.register_buffer("steps", torch.tensor([2**40 + 1, 3]))
    first.register_buffer("scale", torch.tensor([1.0 + 2**-20, 2.0]))
    first.register_buffer("scratch", torch.tensor([2.5]), persistent=False)
    write_sharded(tiny_runtime(), model, build_tokenizer(), tmp_path / "ours", torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    assert equal_files(tmp_path / "ours", tmp_path / "theirs")
    assert everything(tmp_path / "ours")["model.layers.0.steps"].tolist() == [2**40 + 1, 3]


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_several_shards_have_an_index_and_load_in_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    ours, theirs = save_both(model, torch.float32, tmp_path, max_bytes=20_000)
    shards = sorted(path.name for path in ours.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((ours / INDEX).read_text())
    assert set(index["weight_map"]) == set(list_tensors(theirs))
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for shard in shards:
        assert {n for n, s in index["weight_map"].items() if s == shard} == set(load_file(ours / shard))
    assert equal_files(ours, theirs)
    loaded, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits_of(loaded, tiny_tokens()), logits_of(model, tiny_tokens()))


def test_a_write_cut_short_by_the_system_goes_on(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:777], offset))
    ours, theirs = save_both(tiny_model("llama"), torch.bfloat16, tmp_path)
    assert equal_files(ours, theirs)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rust_no_space(*_, **__):
    raise Exception("No space left on device (os error 28)")  # as the tokenizers library does


@pytest.mark.parametrize(
    ("where", "how", "named"),
    [
        ("posix_fallocate", no_space, SINGLE),
        ("pwrite", no_space, SINGLE),
        ("fsync", no_space, SINGLE),
        ("tokenizer", rust_no_space, "tokenizer.json"),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(where, how, named, tmp_path, monkeypatch):
    tokenizer, folder = build_tokenizer(), tmp_path / "saved"
    write_sharded(tiny_runtime(), tiny_model("llama"), tokenizer, folder, torch.float32)
    before = files_in(folder)
    monkeypatch.setattr(*((type(tokenizer), "save_pretrained") if where == "tokenizer" else (os, where)), how)
    with pytest.raises(UserError, match="No space left on device") as error:
        write_sharded(tiny_runtime(), tiny_model("llama", seed=1), tokenizer, folder, torch.float32)
    assert str(tmp_path) in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert files_in(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# --- read_range ------------------------------------------------------------------------------------------------------


@quick
@given(
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from(list(DTYPES.values())),
    st.integers(1, 6),
    st.builds(Storage, st.just(""), st.integers(1, 50), st.integers(1, 3), st.booleans()),
)
def test_a_range_is_the_slice_of_the_tensor(tmp_path, shape, stored, wanted, world_size, storage):
    torch.manual_seed(math.prod(shape))
    tensor = (torch.randn(shape) * 100).to(stored)
    save_file({"before": torch.ones(3, dtype=stored), "t": tensor, "zz": torch.ones(5)}, tmp_path / SINGLE)
    entry = read_header(tmp_path / SINGLE)["t"]
    for rank in range(world_size):
        own = partition(shape, rank, world_size)
        out = torch.full((own.size,), float("nan"), dtype=wanted)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranges, "storage_of", lambda _: storage)
            read_range(entry, own, out)
        expected = tensor.reshape(-1)[own.start : own.stop].to(wanted)
        assert torch.equal(out[: own.numel], expected)
        assert torch.equal(out[own.numel :], torch.zeros(own.padding, dtype=wanted))


def test_what_is_no_range_of_a_stored_tensor_is_left_to_transformers(tmp_path):
    model, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    state = dict(model.state_dict())

    def reason(model, tensors):
        save_file(tensors, tmp_path / SINGLE)
        return why_not(model, described(tmp_path, read_header(tmp_path / SINGLE), model))

    assert reason(model, state) is None
    assert reason(model, {**state, name: state[name].to(torch.int8)}) == f"the checkpoint stores {name} as I8"
    assert reason(model, {n: t for n, t in state.items() if n != name}).startswith(
        f"the checkpoint stores {name} under"
    )
    with pytest.raises(
        UserError, match=rf"{SINGLE} holds {name} of shape \[32, 48\] where config.json makes it \[48, 32\]"
    ):
        reason(model, {**state, name: state[name].T.contiguous()})
    model.model.register_buffer("scale", torch.ones(1))
    assert reason(model, state) == "the checkpoint stores model.scale under another name or in parts"
    model.config.quantization_config = {"quant_method": "fp8"}
    assert reason(model, state) == "the checkpoint is quantized"
    mixtral = tiny_model("mixtral")
    assert reason(mixtral, dict(mixtral.state_dict())) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
def test_a_read_cut_short_by_the_system_goes_on(dtype, tmp_path, monkeypatch):
    tensor, real = torch.randn(10, 7), os.preadv
    save_file({"t": tensor}, tmp_path / SINGLE)
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: real(descriptor, [views[0][:13]], offset))
    own, out = partition((10, 7), 1, 3), torch.empty(24, dtype=dtype)
    read_range(read_header(tmp_path / SINGLE)["t"], own, out)
    assert torch.equal(out[: own.numel], tensor.reshape(-1)[24:48].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
def test_a_shard_cut_off_after_its_header_was_checked_is_named(dtype, tmp_path):
    save_file({"t": torch.randn(10, 7)}, tmp_path / SINGLE)
    entry = read_header(tmp_path / SINGLE)["t"]
    os.truncate(tmp_path / SINGLE, entry.offset + 4 * 30)
    first = torch.empty(24, dtype=dtype)
    read_range(entry, partition((10, 7), 0, 3), first, "t")  # what is there can still be read
    for rank in (1, 2):
        with pytest.raises(UserError, match=r"model\.safetensors ended in the middle of layer\.weight"):
            read_range(entry, partition((10, 7), rank, 3), torch.empty(24, dtype=dtype), "layer.weight")


def test_a_dtype_that_cannot_be_cut_is_named(tmp_path):
    save_file({"t": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"model\.safetensors holds t as F8_E4M3"):
        read_range(read_header(tmp_path / SINGLE)["t"], partition((4,), 0, 1), torch.empty(4), "t")


def test_a_read_error_of_the_disk_names_the_shard(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_file({"t": torch.ones(4)}, tmp_path / SINGLE)
    entry = read_header(tmp_path / SINGLE)["t"]
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="Input/output error") as error:
        read_range(entry, partition((4,), 0, 1), torch.empty(4))
    assert error.value.filename == str(tmp_path / SINGLE)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "fallback"])
@pytest.mark.parametrize("error", [OSError, UserError, RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_old_folder_stays_when_the_block_raises(error, exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    save(tmp_path / "saved", "old")

    def half():
        with replacing(tiny_runtime(), tmp_path / "saved") as temporary:
            (temporary / "one").write_text("half")
            raise error("stop")

    with pytest.raises(error):
        half()
    assert whole(tmp_path / "saved") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_when_it_cannot_be_replaced(error, step, tmp_path, monkeypatch):
    """Without an exchange the old folder is moved aside first; if the second move fails, it is moved back."""
    save(tmp_path / "saved", "old")
    real, calls = os.replace, []

    def refuse(source, target):
        calls.append(source)
        if len(calls) == step:
            raise error
        real(source, target)

    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises((UserError, KeyboardInterrupt)):
        save(tmp_path / "saved", "new")
    assert whole(tmp_path / "saved") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_cannot_be_removed_does_not_fail_a_save_that_is_done(tmp_path, monkeypatch):
    save(tmp_path / "saved", "old")
    real = os.unlink
    monkeypatch.setattr(os, "unlink", no_space)
    save(tmp_path / "saved", "new")
    monkeypatch.setattr(os, "unlink", real)
    assert whole(tmp_path / "saved") == "new"
    clean(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_neighbours_of_the_user_are_left_alone(tmp_path):
    for name in ("saved.old", "saved.partial", "saved.bak", "saved2"):
        save(tmp_path / name, name)
    save(tmp_path / "saved", "new")
    save(tmp_path / "saved", "newer")
    assert {path.name: whole(path) for path in tmp_path.iterdir()} == {
        "saved": "newer", "saved.old": "saved.old", "saved.partial": "saved.partial", "saved.bak": "saved.bak",
        "saved2": "saved2",
    }  # fmt: skip
    assert PARTIAL != OLD


def test_of_a_link_the_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    save(tmp_path / "disk" / "real", "old")
    (tmp_path / "saved").symlink_to(tmp_path / "disk" / "real")
    save(tmp_path / "saved", "new")
    assert (tmp_path / "saved").is_symlink()
    assert whole(tmp_path / "disk" / "real") == whole(tmp_path / "saved") == "new"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_file_in_the_folders_place_is_left_alone(tmp_path):
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(UserError, match="saved is a file where a folder is to be written"):
        save(tmp_path / "saved", "new")
    assert (tmp_path / "saved").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_below_a_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"Not a directory \(.*file"):
        save(tmp_path / "file" / "saved", "new")


def test_missing_parents_are_made(tmp_path):
    save(tmp_path / "a" / "b" / "saved", "new")
    assert whole(tmp_path / "a" / "b" / "saved") == "new"


def test_files_are_on_disk_before_the_folder_takes_its_place(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "saved").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path / "saved", "new")
    (temporary,) = {path for path, _ in synced if path.endswith(PARTIAL)}
    early = [path for path, visible in synced if not visible]
    assert set(early) == {f"{temporary}/one", f"{temporary}/sub", f"{temporary}/sub/two", temporary}
    assert [path for path, visible in synced if visible] == [str(tmp_path)], "and the rename itself afterwards"
