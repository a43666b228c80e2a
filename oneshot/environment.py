"""``oneshot env``: versions, devices and memory, to paste into a bug report. Names no user, host, path or variable."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

from oneshot.versions import versions

PROG = "oneshot env"
DESCRIPTION = "Print versions, devices and memory for a bug report; no paths, names or secrets."
GIB = 2**30
# what decides how fast a CPU multiplies, and with which kernels
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot env``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Print the facts, one a line, or as JSON."""
    import json

    options = parser().parse_args(argv)
    found = facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found)) + 2
    for name, value in found.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{name:{width}}{line}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    made = CommandParser(PROG, DESCRIPTION)
    made.add_argument("--json", action="store_true", help="the same as JSON")
    return made


def facts() -> dict[str, str | list[str]]:
    """Return what is printed, by name; a list where there may be several (GPUs)."""
    found: dict[str, str | list[str]] = {name: value or "not installed" for name, value in versions().items()}
    cuda, gpus = _gpus()
    return {
        **found,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cuda": cuda,
        "gpu": gpus or "none",
        "cpu": f"{_cpu_field('model name') or platform.machine()}, {_cores()} cores",
        "instructions": ", ".join(_instructions()) or "none of note",
        "bf16 on the cpu": "yes" if {"avx512_bf16", "amx_bf16", "bf16"} & set(_instructions()) else "emulated",
        "memory": _memory(),
    }


def _gpus() -> tuple[str, list[str]]:
    """The CUDA (or ROCm) that torch was built for, and each GPU with its memory."""
    try:
        import torch
    except Exception as error:  # a torch that cannot be loaded is what such a report is often about
        return f"torch cannot be imported: {type(error).__name__}", []
    built = torch.version.cuda or getattr(torch.version, "hip", None) or "torch is built for the CPU"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return built, [f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB" for gpu in gpus]


def _instructions() -> list[str]:
    flags = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [name for name in _INSTRUCTIONS if name in flags]


def _cpu_field(name: str) -> str:
    """The first value of a field of Linux' /proc/cpuinfo; empty where there is none."""
    return _field(Path("/proc/cpuinfo"), name)


def _memory() -> str:
    total, free = (_field(Path("/proc/meminfo"), name).split() for name in ("MemTotal", "MemAvailable"))
    if not total or not free:
        return "unknown"
    return f"{int(total[0]) * 1024 / GIB:.1f} GiB, {int(free[0]) * 1024 / GIB:.1f} GiB of it available"


def _field(path: Path, name: str) -> str:
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
