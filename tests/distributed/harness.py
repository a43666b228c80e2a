"""Run a script on N processes of this machine, as a user would: through ``accelerate launch``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent
TOPOLOGIES = ("ddp", "zero2", "zero3")  # each on 2 processes


@dataclass(frozen=True)
class Ran:
    """How a launch ended.

    Attributes:
        code: the launcher's exit code
        out, err: what all ranks printed
        seconds: from start to end
    """

    code: int
    out: str
    err: str
    seconds: float

    def check(self) -> Ran:
        """Return self, having made sure that the launch went well."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-3000:]}\n{self.err[-6000:]}"
        return self


def launch(
    topology: str, script: Path | str, *arguments: str, timeout: float = 720, cwd: Path = ROOT, **environment: str
) -> Ran:
    """Run ``script`` under ``launch/<topology>_cpu.yaml`` (single: ``launch/single.yaml``).

    A launch that takes longer than ``timeout`` seconds is killed with all its processes, and the test fails.
    """
    config = ROOT / "launch" / ("single.yaml" if topology == "single" else f"{topology}_cpu.yaml")
    # the launcher is run as a module: the console script carries an absolute path, which a moved .venv breaks
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    return run([*command, str(script), *arguments], timeout=timeout, cwd=cwd, **environment)


def run(command: list[str], *, timeout: float = 720, cwd: Path = ROOT, **environment: str) -> Ran:
    """Run a command in a process group of its own, so that nothing of it outlives the call."""
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        out, err = process.communicate()
        raise AssertionError(f"hung for {timeout:.0f} s: {' '.join(command)}\n{out[-3000:]}\n{err[-6000:]}") from None
    finally:
        _end(process)
    return Ran(process.returncode, out, err, time.perf_counter() - started)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process's group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
