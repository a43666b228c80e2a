"""``--profile`` as a user gives it: every phase of a repair, in the report, in a file of its own and on the console."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
COUNTED = ("train", "generate", "choose", "solve")
PHASES = ("start", "check", "read", "write", "judge", "decompose", "other", *COUNTED)


def test_a_repair_shows_where_its_time_went(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--config", "tiny", "--shortlist", "2", "--repair.merge", "true", "--profile", "--out", str(out)]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "oneshot.repair", *words], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    wall = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    resources = json.loads((out / "report.json").read_text())["resources"]
    assert set(resources["phases"]) == set(PHASES)
    assert sum(resources["seconds"].values()) - 0.1 <= sum(resources["phases"].values()) <= wall
    assert json.loads((out / "profile.json").read_text()) == {of: resources[of] for of in ("phases", "profile")}
    rows = {row["phase"]: row for row in resources["profile"]}
    assert {name: row["seconds"] for name, row in rows.items()} == resources["phases"]
    assert min(row["seconds"] for row in rows.values()) > 0
    for name in COUNTED:
        assert rows[name]["tokens_per_second"] > 0, name
        assert rows[name]["passes"] > 0, name
    folders = [out / "finetuned", out / "patch", out / "repaired"]
    cards = 20_000  # written after the folders stand
    on_disk = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    assert on_disk - cards <= rows["write"]["written_bytes"] <= on_disk
    # the aligned model to fine-tune and as the reference, the fine-tuned one, both for what was changed; and to merge
    checkpoint = (out / "finetuned" / "model.safetensors").stat().st_size
    assert 4 < (rows["read"]["read_bytes"] + rows["write"]["read_bytes"]) / checkpoint <= 6
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.strip() and line.split()[0] in PHASES] == list(rows)
    (said,) = [line for line in lines if line.startswith("Time: ")]
    assert "choose" in said
    assert "tokens/s" in (out / "report.html").read_text()
