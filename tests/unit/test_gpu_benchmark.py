"""benchmarks/gpu.py as the one who has the time and the GPU only once: nothing that one part does costs another."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

import gpu
import gpu_parts
from gpu import Part, Run

SCRIPTS = {
    "works": "open(ANSWER, 'w').write('{\"x\": 3}')",
    "breaks": "raise ValueError('of no use')",
    "hangs": "import time; time.sleep(60)",
    "leaves ranks": (
        "import subprocess, sys, time; "
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); "
        "open(ANSWER, 'w').write('{\"pid\": %d}' % rank.pid); time.sleep(60)"
    ),
    "away": "open(ANSWER, 'w').write('{\"not_here\": \"no such package\"}')",
    "takes along": "import carried; open(ANSWER, 'w').write('{\"x\": %d}' % carried.X)",
    "slow to leave": "open(ANSWER, 'w').write('{\"x\": 4}'); import time; time.sleep(60)",
}


class Tried(Run):
    """A run whose parts are a line of Python each."""

    def _command(self, part: Part, answer: Path) -> list[str]:
        return ["-c", SCRIPTS[part.name].replace("ANSWER", repr(str(answer)))]


@pytest.fixture
def run(tmp_path: Path) -> Tried:
    return Tried(tmp_path, tmp_path, time.monotonic() + 600, 1.0)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {record["part"]: record for record in found}


def test_a_part_that_fails_or_hangs_is_recorded_and_the_next_one_runs(run: Tried) -> None:
    for name in ("breaks", "hangs", "slow to leave", "away", "works"):
        run.do(Part(name, 5.0, None))
    found = records(run.out)
    assert {name: record["status"] for name, record in found.items()} == {
        "breaks": "failed", "hangs": "out of time", "slow to leave": "ok", "away": "not here", "works": "ok",
    }  # fmt: skip
    assert "ValueError: of no use" in found["breaks"]["said"]
    assert found["works"]["x"] == 3
    assert found["hangs"]["wall_seconds"] < 30
    assert "of no use" in (run.out / "log.txt").read_text()


def test_of_a_part_that_takes_too_long_nothing_is_left_running(run: Tried) -> None:
    run.do(Part("leaves ranks", 5.0, None))
    status = Path(f"/proc/{run.figures['leaves ranks']['pid']}/status")
    until = time.monotonic() + 20.0  # the kernel takes a moment
    while (alive := _alive(status)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def _alive(status: Path) -> bool:
    """Whether a process is there by its status file; one that nobody buries is not."""
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_whose_ground_is_missing_is_not_begun(run: Tried) -> None:
    run.do(Part("breaks", 5.0, None))
    run.do(Part("works", 5.0, "breaks"))
    assert run.statuses["works"] == "not run: breaks did not work"


def test_no_part_is_begun_at_the_very_end_nor_goes_beyond_it(run: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST", 2.0)
    run.ends = time.monotonic() + 4.0
    run.do(Part("hangs", 600.0, None))
    assert run.figures["hangs"]["wall_seconds"] < 30
    run.do(Part("works", 5.0, None))
    assert run.statuses == {"hangs": "out of time", "works": "no time left"}


def test_wheels_are_installed_for_the_parts_and_from_nowhere_else(run: Tried, tmp_path: Path) -> None:
    info = "carried-1.0.dist-info"
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "X = 5\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"carried.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    run.install(tmp_path / "wheels")
    run.do(Part("takes along", 20.0, None))
    assert run.figures["takes along"]["x"] == 5
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    with pytest.raises(SystemExit, match="cannot be installed"):
        run.install(tmp_path / "wheels")


def test_every_part_that_is_planned_is_there_and_every_ratio_is_of_two_of_them() -> None:
    planned = [part.name for part in gpu.PLAN]
    assert sorted(planned) == sorted([*gpu_parts.PARTS, *gpu.TESTS])
    folder = Path(__file__).parents[1] / "gpu"
    assert {path.name for path in folder.glob("test_*.py")} == {name for files in gpu.TESTS.values() for name in files}
    for place, part in enumerate(gpu.PLAN):
        assert part.needs is None or part.needs in planned[:place]
    assert {name for ratio in gpu.RATIOS.values() for name in (ratio[0], ratio[2])} <= set(planned)
    assert gpu.needed(["load"]) == {"load", "build"}


def test_ratios_are_of_what_was_measured() -> None:
    found = {"rollback-bf16": {"seconds_per_step": 0.5, "peak_bytes": 10}, "stock-adamw-bf16": {"seconds_per_step": 2}}
    assert gpu.ratios(found) == {"step_speedup_rollback_over_adamw": 4.0}


def test_what_pytest_found_is_counted_and_its_failures_are_named(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="3 bytes differ">x</failure>'
        '</testcase><testcase name="c"><skipped message="flash-attn is not installed"/></testcase>'
        '<testcase name="d"><error message="no memory"/></testcase></testsuite></testsuites>'
    )
    assert gpu.tests_of(tmp_path / "junit.xml") == {
        "passed": 1,
        "failed": {"b": "3 bytes differ", "d": "no memory"},
        "skipped": {"c": "flash-attn is not installed"},
    }
