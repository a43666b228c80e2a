"""Versions of what a result depends on: the one list of packages that reports, preflight and ``oneshot env`` name."""

from __future__ import annotations

import platform
from importlib import metadata

from oneshot import __version__

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """Return the versions of python, oneshot and the packages, None for one not installed; imports none of them."""
    return {
        "python": platform.python_version(),
        "oneshot": __version__,
        **{name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
