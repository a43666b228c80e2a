import io
import json
import math
import os
import re
import subprocess
import sys
from datetime import datetime

import pytest
import yaml
from rich.console import Console

from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.measure.intervals import Rate, wilson
from oneshot.measure.rates import StageScores
from oneshot.report import runfolder
from oneshot.report.runfolder import Run, append_event, build_report, open_run, write_report
from oneshot.report.table import measure_name, ordered_rates, print_stages, rate_cell
from oneshot.settings import Settings, to_dict
from oneshot.versions import versions


def runtime(rank=0, world_size=1):
    return Runtime(rank, world_size, device=None, sharding="none", accelerator=None)


# the run folder


def test_new_runs_take_the_first_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "fnord-7b-2").mkdir(parents=True)
    made = [
        open_run(None, name, Settings(seed=3), runtime()) for name in ("lab/fnord-7b", "models/fnord-7b/", "fnord-7b")
    ]
    assert [path.as_posix() for path in made] == ["runs/fnord-7b-1", "runs/fnord-7b-3", "runs/fnord-7b-4"]
    assert yaml.safe_load((made[0] / "settings.yaml").read_text()) == to_dict(Settings(seed=3))


@pytest.mark.parametrize("name", ["../..", "", "/", "a b\n<c>"])
def test_a_run_stays_under_runs_whatever_the_models_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = open_run(None, name, Settings(), runtime())
    assert re.fullmatch(r"runs/[A-Za-z-]+-1", path.as_posix())
    assert path.is_dir()


def test_a_given_folder_is_made_and_may_hold_other_things(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert open_run(str(folder), "toy", Settings(), runtime()) == folder
    other = tmp_path / "notes"
    other.mkdir()
    (other / "slurm.log").write_text("x")
    assert (open_run(str(other), "toy", Settings(), runtime()) / "settings.yaml").is_file()


@pytest.mark.parametrize("left", ["settings.yaml", "report.json"])
def test_a_folder_with_another_run_is_left_alone(left, tmp_path):
    (tmp_path / left).write_text("theirs")
    with pytest.raises(UserError, match="already holds a run: give another --out"):
        open_run(str(tmp_path), "toy", Settings(), runtime())
    assert (tmp_path / left).read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"is a file: give|Cannot create the run folder .*file/run"):
            open_run(str(out), "toy", Settings(), runtime())


def test_other_ranks_follow_rank_0_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = []
    monkeypatch.setattr(runfolder, "gather_objects", lambda run, mine: sent.append(mine) or [("runs/toy-9", ""), mine])
    assert open_run(None, "toy", Settings(), runtime(1, 2)).as_posix() == "runs/toy-9"
    assert sent == [("", "")]
    assert list(tmp_path.iterdir()) == []


def test_every_rank_fails_with_rank_0(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("{}")
    sent = []
    monkeypatch.setattr(runfolder, "gather_objects", lambda run, mine: sent.append(mine) or [sent[0], mine])
    for rank in (0, 1):
        with pytest.raises(UserError, match="already holds a run"):
            open_run(str(tmp_path), "toy", Settings(), runtime(rank, 2))


def test_events_are_one_json_line_each(tmp_path):
    import torch

    append_event(tmp_path, epoch=1, loss=torch.tensor(0.5), note="grün\nfnord")
    append_event(tmp_path, epoch=2, loss=math.nan, norms=[math.inf, 1.0], time=7)
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first.pop("time") > 1.6e9
    assert first == {"epoch": 1, "loss": 0.5, "note": "grün\nfnord"}
    assert second == {"time": 7, "epoch": 2, "loss": None, "norms": [None, 1.0]}


def test_report_json_is_as_the_design_has_it(tmp_path):
    example = {"id": "pool-01", "prompt": "p", "response": "r", "selected_by": "gain", "score": math.nan}
    repair = {
        "method": "rollback",
        "rank": 20,
        "epochs": 2,
        "stopped_by": "probes",
        "trace": [{"epoch": 1, "loss": 2.0}],
    }
    report = build_report(
        Run(model="lab/toy", world_size=2, seed=5, command="oneshot repair", settings={"seed": 5}),
        stages={
            "finetuned": StageScores({"asr": wilson(200, 200)}, []),
            "repaired": StageScores({"asr": wilson(100, 200)}, []),
        },
        example=example,
        repair=repair,
        resources={"seconds": {"repair": 2.5}, "peak_rss_bytes": [7, 8], "peak_gpu_bytes": None},
        warnings=["few probes"],
    )
    read = json.loads(write_report(tmp_path, report).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert read.pop("versions") == versions()
    assert datetime.fromisoformat(read.pop("date")).tzinfo is not None
    assert read == {
        "schema": 1,
        "command": "oneshot repair",
        "settings": {"seed": 5},
        "model": "lab/toy",
        "world_size": 2,
        "seed": 5,
        "judge": "keywords",
        "example": {**example, "score": None},
        "stages": {"finetuned": {"asr": wilson(200, 200).as_dict()}, "repaired": {"asr": wilson(100, 200).as_dict()}},
        "differences": [],
        "repair": repair,
        "resources": {"seconds": {"repair": 2.5}, "peak_rss_bytes": [7, 8], "peak_gpu_bytes": None},
        "warnings": ["few probes"],
    }


def test_what_changed_is_in_the_report_where_answers_can_be_paired():
    rows = [
        {"id": str(i), "kind": "should_refuse", "verdict": v, "correct": v == "refused"}
        for i, v in enumerate(("answered", "refused"))
    ]
    stages = {
        "finetuned": StageScores({}, rows),
        "repaired": StageScores({}, [{**row, "verdict": "refused"} for row in rows]),
    }
    known = {"example": None, "repair": None, "resources": {}}
    (found,) = build_report(Run("toy", 1, 0), stages=stages, **known)["differences"]
    assert (found["measure"], found["n"], found["only_from"], found["only_to"]) == ("asr", 2, 1, 0)


def test_a_failed_write_leaves_the_old_report_and_no_rubbish(tmp_path, monkeypatch):
    write_report(tmp_path, {"old": 1})

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": 1}


def test_versions_without_importing_the_libraries():
    code = (
        "import sys, json; from oneshot.report import runfolder, page, table; found = runfolder.versions();"
        "print(json.dumps([found, [m for m in ('torch', 'transformers', 'matplotlib', 'rich') if m in sys.modules]]))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    found, imported = json.loads(out)
    assert imported == []
    assert list(found) == [
        "python",
        "oneshot",
        "torch",
        "transformers",
        "deepspeed",
        "accelerate",
        "peft",
        "bitsandbytes",
    ]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_missing_library_has_no_version(monkeypatch):
    monkeypatch.setattr("oneshot.versions.PACKAGES", ("no-such-package-fnord",))
    assert versions()["no-such-package-fnord"] is None


# the table


def test_measures_have_names_and_an_order():
    names = ["task", "asr_unseen", "zork", "utility", "asr", "empty", "asr_seen", "lookalike_refusal", "over_refusal"]
    assert [measure_name(name) for name in ordered_rates([*names, "asr"])] == [
        "attack success (keywords)",
        "attack success, unseen words",
        "attack success, seen words",
        "over-refusal",
        "look-alike refusal",
        "empty answers",
        "utility",
        "task",
        "zork",
    ]
    assert [measure_name(name) for name in ("over_refusal_by_guard", "task_rouge_l", "garbled", "ppl (lm-eval)")] == [
        "over-refusal, by guard",
        "task, ROUGE-L",
        "garbled answers",
        "ppl (lm-eval)",
    ]


@pytest.mark.parametrize(
    ("rate", "cell"),
    [
        (Rate(0.025, 0.0, 0.13, 40), "0.025 [0.00, 0.13]"),
        (Rate(12.3456, 11.2, 13.4, 9), "12.35 [11.2, 13.4]"),
        # two decimals would show these intervals as points
        (wilson(0, 2000), "0.000 [0.000, 0.002]"),
        (wilson(2000, 2000), "1.000 [0.998, 1.000]"),
        (Rate(0.0015, 0.0012, 0.0018, 30), "0.002 [0.001, 0.002]"),
        (Rate(0.5, 0.5, 0.5, 3), "0.500 [0.50, 0.50]"),
        (Rate(0.00012, 0.00011, 0.00013, 9), "0.00012 [0.00011, 0.00013]"),
        (Rate(math.nan, 0.0, 1.0, 0), "-"),
        (Rate(math.inf, 1.0, math.inf, 3), "-"),
        (None, "-"),
    ],
)
def test_a_rate_in_words(rate, cell):
    assert rate_cell(rate) == cell


STAGES = {
    "aligned": StageScores({"asr": wilson(1, 40), "utility": wilson(40, 40)}, []),
    "finetuned": StageScores({"asr": wilson(40, 40), "asr_[bold]x[/bold]": wilson(3, 4)}, []),
    "repaired": StageScores({"asr": wilson(0, 38), "task": Rate(math.nan, 0.0, 1.0, 0)}, []),
    "merged": StageScores({"asr": wilson(0, 38)}, []),
}


def test_a_log_file_gets_plain_text_with_nothing_cut(tmp_path):
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as stream:
        print_stages(STAGES, Console(file=stream))
    text = path.read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "…" not in text
    rows = {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in text.splitlines()}
    assert rows["measure"] == ["aligned", "finetuned", "repaired", "merged", "n"]
    assert rows["attack success (keywords)"] == [
        "0.025 [0.00, 0.13]",
        "1.000 [0.91, 1.00]",
        "0.000 [0.00, 0.09]",
        "0.000 [0.00, 0.09]",
        "40/38",
    ]
    assert rows["attack success, [bold]x[/bold]"] == ["-", "0.750 [0.30, 0.95]", "-", "-", "4"]
    assert rows["task"] == ["-", "-", "-", "-", "0"]
    assert max(map(len, text.splitlines())) > 100
    assert "judged by keywords" in text


def test_a_narrow_terminal_gets_whole_cells_in_two_lines():
    stream = io.StringIO()
    print_stages(STAGES, Console(file=stream, force_terminal=True, width=90, color_system="standard"))
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert text != stream.getvalue()
    assert max(map(len, text.splitlines())) <= 90
    assert text.count("[0.91, 1.00]") == 2
    assert "0.025 [" not in text
