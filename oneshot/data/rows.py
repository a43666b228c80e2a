"""Rows of JSONL, JSON, CSV or Parquet files or of a Hub data set, each with its place for error messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oneshot.errors import UserError, first_line
from oneshot.online import say_fetching

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(source: str, split: str, subset: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (place for error messages, row) lazily, so that whoever stops early spares the rest of a large file.

    Args:
        source: path that ends in .jsonl, .json, .csv or .parquet, else a Hub id
        split: of a Hub data set
        subset: configuration of a Hub data set; none: its only or default one
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"File {source} does not exist: check the path.")
        read = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[suffix]
        try:
            yield from read(path, source)
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror or error}): check the file.") from error
    elif path.is_file():
        raise UserError(f"{source} has no format that is known here: give one of {', '.join(SUFFIXES)}.")
    elif source.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise UserError(f"File {source} does not exist: check the path.")
    else:
        yield from _hub_rows(source, split, subset)


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    # Lines end at \n only: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{name}, line {number}"
            text = _decode(raw, name, number)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "cannot be parsed")
                raise UserError(
                    f"{where}: broken JSON ({reason}): write one complete JSON object on each line."
                ) from error
            yield where, row


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    text = _decode(path.read_bytes(), name, 1)
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "name the file .jsonl if it holds one object on each line" if error.msg == "Extra data" else "mend it"
        raise UserError(f"{name}, line {error.lineno}: broken JSON ({error.msg}): {hint}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken JSON (cannot be parsed): mend it.") from error
    # json.loads keeps no positions, so the items are decoded again one by one to know the line of each.
    items, position = (whole, text.index("[") + 1) if isinstance(whole, list) else ([whole], 0)
    decoder, counted, line = json.JSONDecoder(), 0, 1
    for _ in items:
        while text[position].isspace() or text[position] == ",":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        row, position = decoder.raw_decode(text, position)
        yield f"{name}, line {line}", row


def _csv_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    # The standard library, not datasets: that one turns the texts "N/A" and "12" into nothing and a number, loses the
    # line, and writes a cache that all ranks of a run would fight for.
    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _decode(raw, name, number)

    reader = csv.reader(lines(), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name}, line {line}: broken CSV ({error}): mend the row or its quotes.") from error
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
        elif len(cells) != len(header):
            raise UserError(
                f"{name}, line {line}: {len(cells)} cells under {len(header)} columns: "
                "put texts with commas in double quotes."
            )
        else:
            yield f"{name}, line {line}", dict(zip(header, cells))


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        # Streaming reads the file where it lies; otherwise each rank would first copy it into the cache.
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(table, start=1):
            yield f"{name}, row {number}", row
    except Exception as error:  # pyarrow and datasets have no common base class
        raise UserError(f"{name} cannot be read as Parquet ({first_line(error)}): check the file.") from error


def _hub_rows(source: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    say_fetching("data set", source)
    import datasets

    try:
        table = datasets.load_dataset(source, *([subset] if subset else []), split=split)
    except Exception as error:  # network, Hub, split and builder errors have no common base class
        raise UserError(
            f"{source} is no file here, and data set {source} (split {split}) cannot be loaded ({first_line(error)}): "
            f"give its Hub id and split, or a file that ends in {', '.join(SUFFIXES)}."
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{source}, row {number}", row


def _decode(raw: bytes, name: str, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(f"{name}, line {line}: not valid UTF-8: save the file as UTF-8.") from error
