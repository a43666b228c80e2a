"""For which 16-bit floats this machine's CPU has instructions: without them torch is many times slower than in fp32."""

from __future__ import annotations

import platform
from pathlib import Path

# by the names of torch.cpu.get_capabilities() and of /proc/cpuinfo, x86-64 and ARM
_INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"},
}


def emulated() -> frozenset[str]:
    """Return the names of torch's 16-bit float dtypes for which this CPU has no instructions.

    Of CPUs that are neither x86-64 nor ARM nothing is known, and nothing is returned.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return frozenset()
    found = _capabilities()
    return frozenset(dtype for dtype, names in _INSTRUCTIONS.items() if found and not names & found)


def _capabilities() -> set[str]:
    """What the CPU can do, by name; empty where nobody says it."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)  # older versions have none
    if ask is not None:
        return {name for name, has in ask().items() if has is True}
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text(encoding="ascii", errors="replace").split()) if cpuinfo.is_file() else set()
