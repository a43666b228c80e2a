"""How bytes are read: in the order of the files, in large requests of which several are under way, in little memory."""

import errno
import fcntl
import os
import re
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny import logits_of, tiny_model, tiny_runtime, tiny_tokens

from oneshot.checkpoint import ranges, rates, storage
from oneshot.checkpoint.files import SINGLE, TensorEntry, list_tensors, read_header
from oneshot.checkpoint.layout import Range, tensor_bytes
from oneshot.checkpoint.load import find_source, load_model
from oneshot.checkpoint.manifest import check_share, read_pieces
from oneshot.checkpoint.ranges import CHUNK, Read, piece_read, read_all, read_in_order
from oneshot.checkpoint.rates import look_at_storage
from oneshot.checkpoint.storage import ALIGNED, Storage, storage_of
from oneshot.checkpoint.write import write_sharded
from oneshot.errors import UserError
from oneshot.patch.directions import checkpoint_difference
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

SMALL, DIRECT = Storage("", 8192, 4, False), Storage("lustre", 8192, 4, True)


@pytest.fixture
def file(tmp_path):
    """Tensors of several requests each, and small ones between them; a comes last, its elements being small."""
    torch.manual_seed(0)
    sizes = {"z": 9001, "b": 3, "a": 40_000, "m": 1, "c": 12_345}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors["a"] = tensors["a"].half()
    save_file(tensors, tmp_path / SINGLE)
    return tmp_path / SINGLE, tensors


def whole(path, dtype=torch.float32, **more):
    """A read of every tensor of the file, whole; more: of each."""
    found = []
    for name, entry in read_header(path).items():
        numel = entry.shape[0]
        found.append(Read(entry, Range(0, numel, numel), torch.full((numel,), float("nan")).to(dtype), name, **more))
    return found


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 1
        file.seek(offset)
        file.write(bytes([byte]))


def use(monkeypatch, how):
    monkeypatch.setattr(ranges, "storage_of", lambda _: how)


def spy(monkeypatch, latency=0.0):
    """What was asked for: (offset, bytes), and how many requests and bytes were under way at most."""
    asked, now, most, lock, real = [], [], [0, 0], threading.Lock(), os.preadv

    def preadv(descriptor, views, offset):
        size = sum(map(len, views))
        with lock:
            asked.append((offset, size))
            now.append(size)
            most[:] = max(most[0], len(now)), max(most[1], sum(now))
        time.sleep(latency)
        try:
            return real(descriptor, views, offset)
        finally:
            with lock:
                now.remove(size)

    monkeypatch.setattr(os, "preadv", preadv)
    return asked, most


@pytest.mark.parametrize("how", [SMALL, DIRECT], ids=["cached", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
def test_tensors_come_in_the_order_of_the_file_and_are_right(how, dtype, file, monkeypatch):
    path, tensors = file
    use(monkeypatch, how)
    reads = whole(path, dtype)
    came = [read.name for read in read_in_order(reads)]
    assert came == sorted(tensors, key=lambda name: read_header(path)[name].offset)
    for read in reads:
        assert torch.equal(read.out, tensors[read.name].to(dtype)), read.name


def test_requests_are_large_aligned_in_order_and_each_byte_is_asked_for_once(file, monkeypatch):
    path, tensors = file
    use(monkeypatch, Storage("", 8192, 1, False))
    asked, _ = spy(monkeypatch)
    read_all(reversed(whole(path)))
    assert asked == sorted(asked)
    assert sum(size for _, size in asked) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(size for _, size in asked) <= 8192
    assert len(asked) <= path.stat().st_size / 8192 + 2 * len(tensors), "small tensors share a request"
    assert sum(offset % 8192 == 0 for offset, _ in asked) > 10, "cut where blocks of the file begin"


def test_requests_past_the_cache_lie_where_the_file_system_wants_them(file, monkeypatch):
    path, _ = file
    use(monkeypatch, DIRECT)
    asked, _ = spy(monkeypatch)
    read_all(whole(path))
    assert all(offset % ALIGNED == 0 and size % ALIGNED == 0 for offset, size in asked)


@pytest.mark.parametrize("how", [SMALL, DIRECT], ids=["cached", "direct"])
def test_several_requests_are_under_way(how, file, monkeypatch):
    path, _ = file
    use(monkeypatch, how)
    asked, most = spy(monkeypatch, latency=0.02)
    clock = time.perf_counter()
    read_all(whole(path))
    assert most[0] == how.in_flight
    assert time.perf_counter() - clock < 0.02 * len(asked) * 0.7, "requests waited for one another"


def test_the_memory_of_requests_is_bounded(tmp_path, monkeypatch):
    numel = 5 * CHUNK // 2
    save_file({"t": torch.zeros(numel, dtype=torch.bfloat16)}, tmp_path / SINGLE)
    entry = read_header(tmp_path / SINGLE)["t"]
    use(monkeypatch, Storage("", CHUNK, 100, True))
    sizes, real = [], ranges._Buffers.of
    monkeypatch.setattr(ranges._Buffers, "of", lambda self, n: (sizes.append(n), real(self, n))[1])
    _, most = spy(monkeypatch, latency=0.05)
    read_all([Read(entry, Range(0, numel, numel), torch.empty(numel), "t")])
    slack = 4 * ALIGNED
    assert 1 < most[0] <= 3
    assert most[1] <= 3 * CHUNK + slack
    assert max(sizes) <= CHUNK + slack


def test_an_error_comes_after_all_reads_and_names_its_tensor(file, monkeypatch):
    path, _ = file
    use(monkeypatch, SMALL)
    reads, came = whole(path), []
    os.truncate(path, read_header(path)["a"].offset + 2 * 20_000)

    def read_on():
        for read in read_in_order(reads):
            came.append(read.name)

    with pytest.raises(UserError, match=r"model\.safetensors ended in the middle of a: the file was cut off"):
        read_on()
    assert sorted(came) == ["a", "b", "c", "m", "z"]


def test_whoever_stops_early_leaves_no_thread_behind_and_reads_no_more(file, monkeypatch):
    path, _ = file
    use(monkeypatch, SMALL)
    before, (asked, _) = threading.active_count(), spy(monkeypatch, latency=0.02)
    for _ in read_in_order(whole(path)):
        break
    assert threading.active_count() == before
    assert len(asked) <= 3 * SMALL.in_flight < path.stat().st_size / SMALL.block


@pytest.mark.parametrize("at", ["open", "read"])
def test_a_file_system_that_refuses_direct_reads_is_read_through_the_cache(at, file, monkeypatch):
    path, tensors = file
    use(monkeypatch, DIRECT)
    refused, opening, reading = [], os.open, os.preadv

    def refuse(descriptor):
        refused.append(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def open_(path, flags, *more):
        return refuse(path) if at == "open" and flags & os.O_DIRECT else opening(path, flags, *more)

    def preadv(descriptor, views, offset):
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        return refuse(descriptor) if at == "read" and direct else reading(descriptor, views, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    read_all(reads := whole(path))
    assert refused
    assert all(torch.equal(read.out, tensors[read.name].float()) for read in reads)


@pytest.mark.parametrize("how", [SMALL, DIRECT], ids=["cached", "direct"])
def test_reads_cut_short_go_on(how, file, monkeypatch):
    path, tensors = file
    use(monkeypatch, how)
    real = os.preadv
    # in number, not in place: O_DIRECT itself takes no such length
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: min(real(fd, views[:1], offset), ALIGNED + 4))
    read_all(reads := whole(path))
    assert all(torch.equal(read.out, tensors[read.name].float()) for read in reads)


def test_tensors_that_lie_at_odd_bytes_are_read(tmp_path, monkeypatch):
    """safetensors sorts wide dtypes first; another program need not."""
    values = torch.arange(7, dtype=torch.float32)
    (tmp_path / "odd").write_bytes(b"\0\0\0" + values.numpy().tobytes())
    entry = TensorEntry(tmp_path / "odd", "F32", (7,), 3)
    for how in (SMALL, DIRECT):
        use(monkeypatch, how)
        out = torch.empty(7, dtype=torch.float64)
        read_all([Read(entry, Range(0, 7, 7), out)])
        assert torch.equal(out, values.double())


# --- the file system -------------------------------------------------------------------------------------------------

MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
32 30 0:42 / /scratch/local rw - xfs /dev/nvme0n1 rw
30 27 0:40 / /scratch rw - lustre 10.0.0.1@o2ib:/fs rw
31 27 0:41 / /home/some\040one rw,vers=4.2 shared:7 - nfs4 server:/home rw
33 27 0:43 / /bucket rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "direct"),
    [
        ("/models", "ext4", False),
        ("/scratch/models", "lustre", True),
        ("/scratchy", "ext4", False),
        ("/scratch/local/m", "xfs", False),
        ("/home/some one/m", "nfs4", True),
        ("/bucket/m", "fuse.s3fs", True),
    ],
)
def test_the_file_system_is_known_by_its_mount(folder, kind, direct, tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    (tmp_path / "file").write_bytes(b"x")
    size = os.stat(tmp_path / "file")
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(os, "stat", lambda path: size)
    storage._kind.cache_clear()
    try:
        found = storage_of([storage.Path(folder) / "model.safetensors"])
    finally:
        storage._kind.cache_clear()
    assert (found.kind, found.direct) == (kind, direct)
    assert found.block * found.in_flight <= 3 * CHUNK


def test_what_the_page_cache_would_not_keep_goes_past_it(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x" * 4096)
    for available, direct in ((16, False), (7, True)):
        (tmp_path / "meminfo").write_text(f"MemTotal:  99 kB\nMemAvailable:  {available} kB\n")
        monkeypatch.setattr(storage, "_MEMORY", tmp_path / "meminfo")
        assert storage_of([tmp_path / "f"]).direct == direct
    monkeypatch.setattr(storage, "_MEMORY", tmp_path / "none")
    assert not storage_of([tmp_path / "f"]).direct


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    write_sharded(tiny_runtime(), tiny_model("llama"), build_tokenizer(), tmp_path / "saved", torch.float32)
    return tmp_path / "saved"


def load(folder, **options):
    chosen = ModelSettings(path=str(folder), **options)
    return load_model(tiny_runtime(), find_source(chosen, tiny_runtime()), chosen)


def stored(folder):
    return sum(tensor_bytes(entry.shape, entry.dtype) for entry in list_tensors(folder).values())


def test_a_whole_model_is_read_once_checked_on_the_way(saved, monkeypatch):
    asked, _ = spy(monkeypatch)
    load(saved)
    assert sum(size for _, size in asked) == stored(saved)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma3", "phi", "mixtral"])
def test_a_whole_model_is_transformers_own(family, dtype, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    ours, theirs = load(tmp_path, dtype=dtype), load(tmp_path, dtype=dtype, stock_io=True)
    own, other = ours.state_dict(), theirs.state_dict()
    assert list(own) == list(other)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    for (name, one), (_, two) in zip(ours.named_buffers(), theirs.named_buffers()):
        assert torch.equal(one, two), name
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert torch.equal(logits_of(ours, tiny_tokens()), logits_of(theirs, tiny_tokens()))


def test_weights_that_are_tied_in_the_config_and_differ_on_disk_go_the_stock_way(tmp_path):
    model = tiny_model("llama-tied")
    model.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    save_file({**state, "lm_head.weight": torch.ones_like(state["lm_head.weight"])}, tmp_path / SINGLE)
    assert torch.equal(load(tmp_path).lm_head.weight, load(tmp_path, stock_io=True).lm_head.weight)


def test_the_share_of_a_check_is_read_once(saved, monkeypatch):
    asked, _ = spy(monkeypatch)
    check_share(tiny_runtime(), saved)
    assert sum(size for _, size in asked) == stored(saved)


@pytest.mark.parametrize("how", [SMALL, DIRECT], ids=["cached", "direct"])
def test_two_checkpoints_are_compared_reading_each_byte_once(how, tmp_path, monkeypatch):
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        model = tiny_model("llama", seed=seed)
        write_sharded(tiny_runtime(), model, build_tokenizer(), folders[-1], torch.bfloat16)
    name = "model.layers.1.mlp.up_proj"
    use(monkeypatch, how)
    difference = checkpoint_difference(*folders, {name: None})
    asked, _ = spy(monkeypatch)
    delta = difference(name, True)
    ours, theirs = (load(folder).get_submodule(name).weight.float() for folder in folders)
    assert torch.equal(delta, ours - theirs)
    if not how.direct:
        assert sum(size for _, size in asked[:2]) == 2 * 2 * delta.numel(), asked
    flip(folders[1] / SINGLE, list_tensors(folders[1])[f"{name}.weight"].offset)
    with pytest.raises(UserError, match=rf"was altered: {name}\.weight does not have the checksum"):
        difference(name, True)


def test_checksums_of_many_tensors_in_a_request_name_theirs(saved, monkeypatch):
    entries = list_tensors(saved)
    pieces = read_pieces(saved, entries)
    name = "model.layers.0.input_layernorm.weight"
    flip(saved / SINGLE, entries[name].offset)
    for how in (SMALL, DIRECT):
        use(monkeypatch, how)
        with pytest.raises(UserError, match=f"was altered: {name} does not"):
            read_all(piece_read(entry, pieces[n][0], n) for n, entry in entries.items())


# --- rates -----------------------------------------------------------------------------------------------------------


def test_the_storage_is_timed_both_ways_on_files_out_of_the_cache(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file({"t": torch.randint(255, (3 << 20,), dtype=torch.uint8)}, tmp_path / SINGLE)
    assert "too small a checkpoint to be timed" in look_at_storage(tiny_runtime(), tmp_path).found
    monkeypatch.setattr(rates, "_LEAST", 1 << 20)
    dropped, real = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: (dropped.append(given[1:]), real(*given)))
    asked, _ = spy(monkeypatch)
    check = look_at_storage(tiny_runtime(), tmp_path)
    assert check.culprit == ""
    assert re.search(r"\d MiB at a time.*: \d+\.\d+ GB/s, \d+\.\d+ of the \d+\.\d+ GB/s of plain reading", check.found)
    half = (tmp_path / SINGLE).stat().st_size // 2
    assert [given[:2] for given in dropped] == [(0, half), (half, half)], "the two samples overlap, or were cached"
    assert sum(size for offset, size in asked if offset < half) == half
    assert sum(size for offset, size in asked if offset >= half) == half
