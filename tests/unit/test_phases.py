"""Where a run's time goes: phases that add up, on a clock of each run's own; and the table that people see of them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_report_page import report_of
from tiny import tiny_model, tiny_runtime, toy_settings

import oneshot
from oneshot.distributed import phases, resources
from oneshot.distributed.phases import OTHER, Spent, clock, count, count_passes, phase, timed
from oneshot.distributed.resources import where_time_went
from oneshot.report.facts import resource_rows
from oneshot.report.markdown import write_markdown
from oneshot.report.page import write_page
from oneshot.report.times import PROFILE, print_times, time_line, time_rows, write_profile
from oneshot.settings import Settings
from oneshot.world.model import ALIGNED

finetune = importlib.import_module("oneshot.finetune")  # the module: the package's own name is a function


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets seconds pass, on a clock that stands still otherwise."""
    now = [1000.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passing(seconds: float) -> None:
        now[0] += seconds

    return passing


def seconds(opened: phases.Clock) -> dict[str, float]:
    opened.settle()
    return {name: spent.seconds for name, spent in opened.spent.items()}


# phases


def test_the_innermost_phase_gets_the_time_and_all_add_up(passing: Any) -> None:
    @phase("read")
    def read(many: int) -> int:
        passing(many)
        return many

    with clock(detailed=False) as opened:
        passing(1)
        with phase("choose"):
            passing(2)
            assert read(4) == 4
            passing(8)
            with phase("choose"):  # a repair within a repair's choice
                passing(16)
        assert read(32) == 32
        passing(64)
        assert seconds(opened) == {OTHER: 65, "choose": 26, "read": 36}
        assert sum(seconds(opened).values()) == 127
        assert {name: spent.calls for name, spent in opened.spent.items()} == {OTHER: 1, "choose": 2, "read": 2}


def test_a_phase_that_fails_ends_like_any_other(passing: Any) -> None:
    with clock(detailed=False) as opened:
        with contextlib.suppress(ValueError), phase("outer"):
            passing(1)
            with phase("inner"):
                passing(2)
                raise ValueError
        passing(4)
        assert seconds(opened) == {OTHER: 4, "outer": 1, "inner": 2}


def test_without_a_clock_nothing_is_measured_and_nothing_breaks() -> None:
    with phase("read"):
        count(read=5)
    model = tiny_model("llama")
    count_passes(model)
    assert not model.get_input_embeddings()._forward_pre_hooks
    assert where_time_went(tiny_runtime()) == {}


def test_two_runs_do_not_mix(passing: Any) -> None:
    with clock(detailed=False) as first, phase("read"):
        passing(1)
    with clock(detailed=False) as second:
        passing(2)
        with clock(detailed=False) as within:
            passing(4)
            assert seconds(within) == {OTHER: 4}
        assert seconds(second) == {OTHER: 6}
    assert seconds(first) == {OTHER: 7 - 1, "read": 1}, "nobody settles a clock that is closed, but this test"
    with pytest.raises(ValueError), clock(detailed=False):
        raise ValueError
    assert where_time_went(tiny_runtime()) == {}, "a run that failed leaves no clock behind"


def test_threads_have_clocks_of_their_own_and_help_without_one() -> None:
    found: dict[str, list[str]] = {}
    both = threading.Barrier(2)

    def run(name: str) -> None:
        with clock(detailed=True) as opened:
            both.wait()
            with phase(name):
                both.wait()
                helper = threading.Thread(target=lambda: count(read=9))
                helper.start()
                helper.join()
                count(read=1)
            both.wait()
            found[name] = list(opened.spent)
            assert opened.spent[name].read_bytes == 1

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"one": [OTHER, "one"], "two": [OTHER, "two"]}


def test_a_stage_is_timed_as_its_settings_say() -> None:
    @timed
    def run(settings: Settings, *, quiet: bool) -> Any:
        assert quiet
        with phase("solve"):
            count(tokens=3)
        return where_time_went(tiny_runtime())

    assert set(run(Settings(), quiet=True)) == {"phases"}
    found = run(dataclasses.replace(Settings(), profile=True), quiet=True)
    assert set(found) == {"phases", "profile"}
    assert [row["phase"] for row in found["profile"]] == list(found["phases"]) == ["solve", OTHER]
    assert found["profile"][0]["tokens"] == 3
    assert where_time_went(tiny_runtime()) == {}


# counts


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt_neox"])
def test_every_pass_through_a_model_is_counted(family: str) -> None:
    model = tiny_model(family)
    ids = torch.ones(2, 7, dtype=torch.int64)
    with clock(detailed=False):
        count_passes(model)
    assert not model.get_input_embeddings()._forward_pre_hooks, "counted only where it was asked for"
    with clock(detailed=True) as opened:
        count_passes(model)
        with phase("solve"):
            model(input_ids=ids).logits.sum().backward()
            model.base_model(ids)  # without its head
        with phase("generate"), torch.no_grad():
            model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert (opened.spent["solve"].passes, opened.spent["solve"].tokens) == (2, 28)
    assert (opened.spent["generate"].passes, opened.spent["generate"].tokens) == (3, 2 * (7 + 1 + 1))
    model(input_ids=ids)
    assert opened.spent["solve"].passes == 2, "after the run nobody counts"


def test_a_peak_belongs_to_the_phase_that_rose_above_all_before(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"peak_rss_bytes": 10}
    monkeypatch.setattr(phases, "peaks", lambda: dict(held))
    with clock(detailed=True) as opened:
        held["peak_rss_bytes"] = 20
        with phase("read"):
            held.update(peak_rss_bytes=30, peak_gpu_bytes=5)
        with phase("solve"):
            held["peak_gpu_bytes"] = 7
        opened.settle()
    peaks = {name: (spent.peak_rss_bytes, spent.peak_gpu_bytes) for name, spent in opened.spent.items()}
    assert peaks == {OTHER: (20, 0), "read": (30, 5), "solve": (0, 7)}


@pytest.mark.parametrize(("detailed", "waits"), [(False, 0), (True, 4)])
def test_a_gpu_is_waited_for_where_a_phase_begins_and_ends(
    detailed: bool, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + len(seen))
    with clock(detailed=detailed) as opened, phase("read"), phase("decompose"):
        pass
    assert len(seen) == waits
    assert opened.spent["decompose"].peak_gpu_bytes == (103 if detailed else 0)


def test_ranks_are_summed_and_the_slowest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {
        "read": Spent(seconds=9.0, calls=1, read_bytes=5, peak_rss_bytes=70),
        "solve": Spent(seconds=2.0, calls=1, tokens=30, passes=2),
        "late": Spent(seconds=1.0, calls=1),
        OTHER: Spent(calls=1),
    }

    def gather(_runtime: Any, mine: Any) -> list[Any]:
        return [mine, {name: vars(spent) for name, spent in others.items()}]

    monkeypatch.setattr(resources, "gather_objects", gather)
    with clock(detailed=True) as opened:
        opened.spent["solve"] = Spent(seconds=4.0, calls=3, tokens=10, passes=1)
        opened.spent["read"] = Spent(seconds=2.0, calls=1, read_bytes=7, peak_rss_bytes=50)
        found = where_time_went(tiny_runtime())
    rows = {row.pop("phase"): row for row in found["profile"]}
    assert list(found["phases"]) == list(rows) == ["solve", "read", "late", OTHER]
    assert (found["phases"]["read"], found["phases"]["late"]) == (2.0, 0.0), "seconds are rank 0's: they add up"
    assert rows["read"] == {
        "seconds": 2.0, "slowest_seconds": 9.0, "calls": 1, "passes": 0, "tokens": 0, "read_bytes": 12,
        "written_bytes": 0, "tokens_per_second": 0.0, "peak_rss_bytes": 70, "peak_gpu_bytes": 0,
    }  # fmt: skip
    assert (rows["solve"]["passes"], rows["solve"]["tokens"], rows["solve"]["tokens_per_second"]) == (3, 40, 10.0)


# what people see


TIMES: dict[str, Any] = {
    "phases": {"read": 120.0, "solve": 30.25, OTHER: 0.75},
    "profile": [
        {"phase": "read", "seconds": 120.0, "slowest_seconds": 150.0, "passes": 0, "tokens": 0, "calls": 1,
         "tokens_per_second": 0.0, "read_bytes": 141_000_000_000, "written_bytes": 0, "peak_rss_bytes": 2**31,
         "peak_gpu_bytes": 0},
        {"phase": "solve", "seconds": 30.25, "slowest_seconds": 30.25, "passes": 31, "tokens": 45678,
         "tokens_per_second": 1510.0, "calls": 1, "read_bytes": 0, "written_bytes": 2_345_678, "peak_rss_bytes": 0,
         "peak_gpu_bytes": 3 * 2**29},
        {"phase": OTHER, "seconds": 0.75, "slowest_seconds": 0.75, "passes": 0, "tokens": 0, "tokens_per_second": 0.0,
         "calls": 1, "read_bytes": 0, "written_bytes": 0, "peak_rss_bytes": 0, "peak_gpu_bytes": 0},
    ],
}  # fmt: skip


def test_the_table_holds_what_there_is_to_say() -> None:
    heads, rows = time_rows(TIMES)
    assert heads == [
        "phase", "seconds", "share", "slowest rank", "passes", "tokens/s", "GB read", "GB written", "peak GiB",
        "peak GPU GiB",
    ]  # fmt: skip
    shown = {name: [text for text, _ in cells] for name, cells in rows}
    assert shown["read"] == ["120", "79%", "150", "-", "-", "141", "-", "2.00", "-"]
    assert shown["solve"] == ["30.2", "20%", "30.2", "31", "1,510", "-", "0.00235", "-", "1.50"]
    heads, rows = time_rows({"phases": TIMES["phases"]})
    assert heads == ["phase", "seconds", "share"]
    assert rows[1] == ("solve", [("30.2", 30.25), ("20%", 30.25)])
    alone = [{**row, "slowest_seconds": row["seconds"]} for row in TIMES["profile"]]
    assert "slowest rank" not in time_rows({**TIMES, "profile": alone})[0]
    assert time_rows({"seconds": {"repair": 2.0}})[1] == [], "a run from before there were phases"


def test_the_line_names_what_took_long() -> None:
    assert time_line(TIMES) == "Time: 151 s (read 120, solve 30.2)"
    assert time_line({}) == time_line({"phases": {OTHER: 0.0}}) == ""


@pytest.mark.parametrize(("terminal", "width"), [(True, 80), (True, 140), (False, 80)])
def test_terminals_and_log_files_show_all_of_it(terminal: bool, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    print_times(TIMES, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    words = ("read", "141", "1,510", "0.00235", "150", "31", "1.50", "Time: 151 s (read 120, solve 30.2)")
    assert [word for word in words if word not in printed] == []
    assert "…" not in printed
    assert max(len(line) for line in printed.splitlines()) <= max(width, 0 if terminal else 100)
    print_times({}, console)
    assert console.file.getvalue() == printed


def test_a_terminal_too_narrow_for_it_loses_no_digit() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=50, color_system=None)
    print_times(TIMES, console)
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue().partition("Seconds")[0]
    assert sorted(re.sub(r"[^0-9]", "", table)) == sorted(
        re.sub(r"[^0-9]", "", "".join(text for _, cells in time_rows(TIMES)[1] for text, _ in cells))
    )


def test_runs_are_compared_by_phase() -> None:
    assert resource_rows(TIMES) == [("phases, read", "120"), ("phases, solve", "30.25"), ("phases, other", "0.75")]


def test_the_reports_show_the_table_and_only_once(tmp_path: Path) -> None:
    given = {"seconds": {"repair": 2.5}, "peak_rss_bytes": [2**31], **TIMES}
    report = report_of(before={"asr": 1.0}, after={"asr": 0.0}, resources=given)
    page = write_page(tmp_path, report, {}).read_text()
    text = write_markdown(tmp_path, report).read_text()
    assert "| read | 120 | 79% |" in text
    assert '<th scope="row">read</th>' in page
    for shown in (page, text):
        assert shown.count("1,510") == 1
        assert "slowest_seconds" not in shown
        assert "seconds, repair" in shown
        assert "more than ever before" in shown
    plain = report_of(before={"asr": 1.0}, after={"asr": 0.0}, resources={"phases": TIMES["phases"]})
    text = write_markdown(tmp_path, plain).read_text()
    assert "| solve | 30.2 | 20% |" in text
    assert "Tokens" not in text
    old = report_of(before={"asr": 1.0}, after={"asr": 0.0}, resources={"seconds": {"repair": 2.5}})
    assert "of rank 0" not in write_page(tmp_path, old, {}).read_text()


def test_the_profile_is_a_file_where_it_was_asked_for(tmp_path: Path) -> None:
    write_profile(tmp_path, {"phases": TIMES["phases"]})
    assert list(tmp_path.iterdir()) == []
    write_profile(tmp_path, {"seconds": {}, **TIMES})
    assert json.loads((tmp_path / PROFILE).read_text()) == TIMES


# stages in one process


@pytest.fixture
def asked() -> dict[str, Any]:
    return {"model": str(ALIGNED), "score": {"probes": "toy:probes", "max_new_tokens": 1, "batch_size": 64}}


def test_a_second_run_in_the_process_begins_at_zero(asked: dict[str, Any], tmp_path: Path) -> None:
    first = oneshot.score(**asked, profile=True, out=str(tmp_path / "first")).report["resources"]
    second = oneshot.score(**asked, out=str(tmp_path / "second")).report["resources"]
    assert (tmp_path / "first" / PROFILE).is_file()
    assert not (tmp_path / "second" / PROFILE).exists()
    assert set(second) == {"seconds", "peak_rss_bytes", "peak_gpu_bytes", "phases"}
    assert {"check", "read", "generate", "judge", OTHER} <= set(second["phases"])
    for found in (first, second):
        assert sum(found["phases"].values()) >= found["seconds"]["score"] - 0.01
    rows = {row["phase"]: row for row in first["profile"]}
    assert rows["read"]["calls"] == 1
    assert rows["read"]["read_bytes"] == pytest.approx((ALIGNED / "model.safetensors").stat().st_size, rel=0.02)
    assert rows["generate"]["tokens_per_second"] > 0
    third = oneshot.score(**asked, profile=True, out=str(tmp_path / "third")).report["resources"]
    again = {row["phase"]: row for row in third["profile"]}
    for name in ("read", "generate"):
        assert {of: again[name][of] for of in ("calls", "passes", "tokens", "read_bytes")} == {
            of: rows[name][of] for of in ("calls", "passes", "tokens", "read_bytes")
        }


def test_a_finetune_says_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--finetune.steps", "4", "--finetune.save_every", "2", "--out", str(tmp_path / "run"), "--profile"]
    finetune.run(toy_settings(*words, stage="finetune"))
    printed = capsys.readouterr().out
    profile = json.loads((tmp_path / "run" / PROFILE).read_text())
    rows = {row["phase"]: row for row in profile["profile"]}
    assert {"check", "read", "train", "write", OTHER} <= set(rows)
    assert min(row["seconds"] for row in rows.values()) > 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert rows["train"]["passes"] >= 4
    assert rows["train"]["seconds"] >= sum(step["seconds"] for step in steps) - 0.01
    assert rows["train"]["tokens_per_second"] > 0
    wrote = [tmp_path / "run" / "finetuned", tmp_path / "run" / "state" / "step-2"]
    assert rows["write"]["written_bytes"] == sum(path.stat().st_size for one in wrote for path in one.iterdir())
    for shown in ("tokens/s", "GB written", "Time: ", "(", "train "):
        assert shown in printed
    finetune.run(toy_settings("--finetune.steps", "1", "--out", str(tmp_path / "plain"), stage="finetune"))
    printed = capsys.readouterr().out
    assert "Time: " in printed
    assert "tokens/s" not in printed.split("Time: ")[1]
    assert not (tmp_path / "plain" / PROFILE).exists()


def test_a_resumed_finetune_counts_what_it_reads_again(tmp_path: Path) -> None:
    words = ["--finetune.save_every", "2", "--out", str(tmp_path / "run")]
    finetune.run(toy_settings("--finetune.steps", "4", *words, stage="finetune"))
    shutil.rmtree(tmp_path / "run" / "finetuned")
    finetune.run(toy_settings("--finetune.steps", "4", *words, "--resume", "--profile", stage="finetune"))
    rows = {row["phase"]: row for row in json.loads((tmp_path / "run" / PROFILE).read_text())["profile"]}
    state = sum(path.stat().st_size for path in (tmp_path / "run" / "state" / "step-2").iterdir())
    assert rows["read"]["calls"] == 2, "the model, and the state"
    assert rows["read"]["read_bytes"] > state
