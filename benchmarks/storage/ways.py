"""Ways to get a checkpoint's bytes into memory, timed one by one in fresh processes that find the page cache empty."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SLOW = Path(__file__).with_name("slow.py")
_PLAIN = 4 << 20
_PAST = 16 << 20  # of a plain request past the page cache, where a small one has all of the waiting


def plain(shards: list[Path]) -> None:
    """Read as dd does: in sequence, one request after the other, into the same memory."""
    memory = memoryview(bytearray(_PLAIN))
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def plain_direct(shards: list[Path]) -> None:
    """Do the same past the page cache (dd iflag=direct)."""
    import mmap

    memory = memoryview(mmap.mmap(-1, _PAST))
    for shard in shards:
        descriptor, offset = os.open(shard, os.O_RDONLY | os.O_DIRECT), 0
        while got := os.preadv(descriptor, [memory], offset):
            offset += got
            if got % 4096:
                break
        os.close(descriptor)


def safetensors(shards: list[Path]) -> None:
    """Load all tensors with safetensors; what it maps only is touched."""
    from safetensors.torch import load_file

    found = [load_file(shard) for shard in shards]
    for tensors in found:
        _touch(tensors.values())


def transformers(shards: list[Path]) -> None:
    """Load the model with transformers; what it maps only is touched."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shards[0].parent, dtype="auto")
    _touch(model.parameters())


def fastsafetensors(shards: list[Path]) -> None:
    """Load all tensors with fastsafetensors, into memory of the CPU."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [str(shard) for shard in shards]})
    loader.copy_files_to_device()


def oneshot(shards: list[Path]) -> None:
    """Load the model as oneshot does."""
    from oneshot.checkpoint.loading.load import find_source, load_model
    from oneshot.distributed.runtime import start
    from oneshot.settings import ModelSettings

    settings = ModelSettings(path=str(shards[0].parent))
    runtime = start()
    load_model(runtime, find_source(settings, runtime), settings)


WAYS: dict[str, Callable[[list[Path]], None]] = {
    "plain": plain,
    "plain, direct": plain_direct,
    "safetensors": safetensors,
    "transformers": transformers,
    "fastsafetensors": fastsafetensors,
    "oneshot": oneshot,
}


def installed() -> list[str]:
    """Return the ways that can be taken here."""
    return [way for way in WAYS if way != "fastsafetensors" or find_spec(way)]


def timed(way: str, folder: Path) -> float:
    """Return the seconds that a way takes in this process; its imports are done before."""
    import torch  # noqa: F401
    import transformers as _  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import oneshot.checkpoint.loading.load  # noqa: F401
    from oneshot.distributed.runtime import start

    start()
    shards = sorted(folder.glob("*.safetensors"))
    clock = time.perf_counter()
    WAYS[way](shards)
    return time.perf_counter() - clock


def empty_cache(folder: Path) -> None:
    """Have no byte of the folder's files in the page cache; as root of no file, so that one below FUSE is empty too."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")


@contextlib.contextmanager
def slow_files(folder: Path, seconds: float, rate: float) -> Iterator[Path | None]:
    """Yield the folder as it is seen through a slow file system; none where FUSE or mfusepy is missing."""
    if not (find_spec("mfusepy") and Path("/dev/fuse").exists()):
        yield None
        return
    with tempfile.TemporaryDirectory() as point:
        command = [sys.executable, str(SLOW), str(folder), point, f"--seconds={seconds}", f"--rate={rate}"]
        server = subprocess.Popen(command, stdout=sys.stderr)
        try:
            deadline = time.monotonic() + 20
            while not os.path.ismount(point):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the slow file system did not start")
                time.sleep(0.1)
            yield Path(point)
        finally:
            subprocess.run(["umount", point], check=False)
            server.terminate()
            server.wait()


def _touch(tensors: Any) -> None:
    for tensor in tensors:
        tensor.detach().reshape(-1)[:: 4096 // tensor.element_size()].sum()
