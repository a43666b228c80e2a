"""The guide's table of what one may bring says what tests show, form by form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOWN = json.loads((ROOT / "tests" / "fixtures" / "bring.json").read_text(encoding="utf-8"))


def rows_of_the_guide() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = text.split("## What you may bring")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [(row[0], row[1]) for row in cells[1:]]


def test_every_form_of_the_guide_is_shown_and_every_one_shown_is_in_the_guide() -> None:
    assert rows_of_the_guide() == [(row["what"], row["form"]) for row in SHOWN]


@pytest.mark.parametrize("row", SHOWN, ids=lambda row: re.sub(r"\W+", " ", row["form"])[:40])
def test_the_tests_are_there(row: dict[str, object]) -> None:
    assert row["tests"]
    for name in row["tests"]:  # type: ignore[attr-defined]
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file(), name
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), name
