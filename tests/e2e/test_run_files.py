"""Every shipped run file that can run here ends as it should: the toy worlds are repaired, whatever the seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
RUNS = Path(__file__).parents[2] / "launch" / "runs"
HERE = ("tiny", "toy")
# a phase's end is told from 5 s on, which none of these takes: here it is told of all
ALL_PHASES = (
    "import sys; from oneshot.report import progress; progress.LONG = 0.0; from oneshot.repair import main; "
    "main(sys.argv[1:])"
)
SHOWN = [
    "fine-tune: 100 steps in", "weights hashed: ", "weights read: ", "answers of the aligned model: 600 prompts in",
    "aligned model read: ", "update decomposed: ", "answers of the fine-tuned model: ", "candidates screened: ",
    "candidates tried: ", "answers to the watch's prompts: ", "repair: ", "answers of the repaired model: ",
]  # fmt: skip


def test_the_others_name_models_that_are_not_here() -> None:
    for path in sorted(RUNS.glob("*.yaml")):
        named = (yaml.safe_load(path.read_text()).get("model") or {}).get("path", "toy:aligned")
        assert named.startswith("toy:") == (path.stem in HERE), f"{path.name}: add it to HERE, or name its model"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HERE)
def test_a_shipped_run_file_ends_repaired(name: str, seed: int, tmp_path: Path) -> None:
    """docs/cluster.md has tiny run to see that everything is in place: it says so, then, with any seed."""
    out = tmp_path / "run"
    words = ["--config", name, "--seed", str(seed), "--require", "repaired", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", ALL_PHASES, *words], capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "report.json").read_text())["outcome"]["word"] == "repaired"
    assert done.stderr == "", "warnings of the libraries"
    if (name, seed) == ("tiny", 0):
        for phase in SHOWN:
            assert any(line.startswith(phase) for line in done.stdout.splitlines()), f"{phase!r} in\n{done.stdout}"
