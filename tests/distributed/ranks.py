"""Start ranks without a launcher, forked from a process that has imported everything: a second per start, not ten.

What a launcher sets in the environment is set here; each rank has a process id that a test may kill.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRELOADED = ["checkpoint_jobs", "quantized_jobs", "packing_jobs", "export_jobs", "stopping_jobs", "preflight_jobs"]
PRELOADED += ["selection_jobs", "spectrum_jobs", "repair_jobs", "folder_jobs", "experts_jobs"]
DEEPSPEED = {"zero2": "ds_configs/zero2.json", "zero3": "ds_configs/zero3.json"}


@dataclass(frozen=True)
class Ranks:
    """Ranks that run, or have run: their processes, and the folder of their logs and results."""

    processes: list[Any]
    folder: Path

    def wait(self, timeout: float) -> list[int | None]:
        """Return all exit codes (-9: killed); ranks that take longer are killed, and the test fails."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            assert not any(process.is_alive() for process in self.processes), f"hung\n{self.logs()}"
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [process.exitcode for process in self.processes]

    def results(self, timeout: float = 120) -> list[Any]:
        """Return what the job returned on each rank, having made sure that all ended well."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.logs()}"
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(len(codes))]

    def logs(self) -> str:
        """Return what the ranks printed."""
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("*.log")))


def start_ranks(
    job: Callable[..., Any], world_size: int, sharding: str, folder: Path, arguments: dict[str, Any]
) -> Ranks:
    """Start ``job(runtime, **arguments)`` on each rank; ``folder`` takes the logs and results.

    Args:
        sharding: ddp (on one rank: none), zero2 or zero3
    """
    folder.mkdir(parents=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # up to Python 3.12 the server does not look where its parent does, and goes on with nothing imported
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        if sharding in DEEPSPEED:
            environment["ACCELERATE_USE_DEEPSPEED"] = "true"
            environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / DEEPSPEED[sharding])
        process = context.Process(target=_be_rank, args=(job, rank, environment, folder, arguments), daemon=True)
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


def _be_rank(
    job: Callable[..., Any], rank: int, environment: dict[str, str], folder: Path, arguments: dict[str, Any]
) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    code = 1
    try:
        import torch
        import torch.distributed as dist

        from oneshot.distributed.runtime import start

        torch.set_num_threads(1)
        result = job(start(timeout_minutes=1.0), **arguments)
        (folder / f"{rank}.json").write_text(json.dumps(result))
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
