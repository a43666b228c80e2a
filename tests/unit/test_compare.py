import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from oneshot import compare
from oneshot.errors import UserError
from oneshot.measure.rates import Probe, score_answers
from oneshot.report.comparison import compared, print_comparison, write_comparison
from oneshot.report.exports import ExportRequest
from oneshot.report.finished import read_runs
from oneshot.report.outputs import write_outputs
from oneshot.report.runfolder import Run, build_report, new_folder

EVIL = "<script>alert('fnord')</script> [bold]x[/bold] |\x1b[31m`"
REFUSAL, ANSWER = "I can't help with that.", "Take the snib and turn it twice."


def make_run(
    folder,
    answers,
    *,
    prompts="zork",
    numbered=True,
    ids="p",
    kinds=("should_refuse", "harmless"),
    model="lab/toy",
    seed=0,
    **fields,
):
    """A finished run whose repaired model answered like this, one answer per probe, of the kinds in turn."""
    probes = [
        Probe(
            f"{ids}{i}",
            ({"role": "user", "content": f"{prompts} {i}?" if numbered else prompts},),
            kinds[i % len(kinds)],
        )
        for i in range(len(answers))
    ]
    stages = {"repaired": score_answers(probes, answers)}
    known = {"example": None, "repair": {"method": "rollback"}, "resources": {}}
    report = build_report(Run(model, 1, seed), **{"stages": stages, **known, **fields})
    folder.mkdir(parents=True)
    write_outputs(folder, report, stages)
    (folder / "settings.yaml").write_text(f"seed: {seed}\nrepair:\n  rank: 20\n")
    return folder


def printed(runs):
    stream = io.StringIO()
    print_comparison(compared(read_runs(runs)), Console(file=stream))
    return stream.getvalue()


def test_two_runs_side_by_side(tmp_path, capsys):
    one = make_run(tmp_path / "one", [ANSWER, ANSWER] * 4)
    two = make_run(tmp_path / "two", [REFUSAL, ANSWER] * 4, seed=7)
    compare.run([str(one), str(two / "report.json"), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert re.search(r"attack success \(keywords\) +1\.000 \[0\.51, 1\.00\] +0\.000 \[0\.00, 0\.49\] +4", text)
    assert re.search(r"attack success \(keywords\) +one: repaired → two: repaired +4 +4 +0 +-1\.000 +0\.125", text)
    assert re.search(r"over-refusal +one: repaired → two: repaired +4 +0 +0 +\+0\.000 +1\.000", text)
    assert re.search(r"setting seed +0 +7\b", text)
    assert "repair.rank" not in text, "the same in both"
    assert "Note:" not in text
    page, markdown = ((tmp_path / "out" / name).read_text() for name in ("compare.html", "compare.md"))
    assert "1.000 <small>[0.51, 1.00]</small> <small>n=4</small>" in page
    assert "| one | 1.000 \\[0.51, 1.00\\] n=4 |" in markdown
    assert "one: repaired → two: repaired" in html.unescape(page)


def test_without_a_folder_a_new_one_is_taken_under_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(make_run(tmp_path / name, [ANSWER])) for name in ("one", "two")]
    for number in (1, 2):
        compare.run(runs)
        assert (tmp_path / "runs" / f"compare-{number}" / "compare.html").is_file()


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / place / "run", [ANSWER]) for place in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == ["a/run", "b/run"]


def test_different_probes_are_said_and_only_shared_ones_paired(tmp_path):
    one = make_run(tmp_path / "one", [ANSWER] * 6)
    fewer = make_run(tmp_path / "fewer", [REFUSAL] * 4)
    others = make_run(tmp_path / "others", [REFUSAL] * 6, prompts="glorp")
    found = compared(read_runs([one, fewer, others]))
    assert "one and fewer were scored on different probes, of which they share 4 (6 and 4 in all)" in found.notes[0]
    assert "one and others were scored on different probes, of which they share 0" in found.notes[1]
    assert {(row["to"], row["measure"], row["n"]) for row in found.differences} == {
        ("fewer: repaired", "asr", 2),
        ("fewer: repaired", "over_refusal", 2),
    }


def test_the_same_prompts_are_paired_whatever_their_file_is_called(tmp_path):
    one = make_run(tmp_path / "one", [ANSWER] * 6)
    two = make_run(tmp_path / "two", [REFUSAL] * 6, ids="copy-")
    found = compared(read_runs([one, two]))
    assert found.notes == []
    assert [row["n"] for row in found.differences] == [3, 3]


def test_a_prompt_that_occurs_twice_is_paired_twice(tmp_path):
    one = make_run(tmp_path / "one", [ANSWER, ANSWER, REFUSAL, ANSWER], numbered=False)
    two = make_run(tmp_path / "two", [REFUSAL, ANSWER, REFUSAL, ANSWER, ANSWER, ANSWER], numbered=False)
    found = compared(read_runs([one, two]))
    assert "share 4 (4 and 6 in all)" in found.notes[0]
    assert [(row["n"], row["only_from"], row["only_to"]) for row in found.differences] == [(2, 1, 0), (2, 0, 0)]


def test_without_answers_the_unequal_numbers_are_said(tmp_path):
    one, two = make_run(tmp_path / "one", [ANSWER] * 6), make_run(tmp_path / "two", [ANSWER] * 4)
    (two / "answers.jsonl").unlink()
    (note,) = compared(read_runs([one, two])).notes
    assert "answers.jsonl is missing in one of them" in note
    assert "attack success (keywords) on 3 and 2" in note


def test_another_judge_is_said(tmp_path):
    one, two = make_run(tmp_path / "one", [ANSWER]), make_run(tmp_path / "two", [ANSWER])
    report = json.loads((two / "report.json").read_text())
    (two / "report.json").write_text(json.dumps({**report, "judge": "dice"}))
    assert "judged in different ways" in compared(read_runs([one, two])).notes[0]


def test_another_model_behind_a_judge_of_the_same_name_is_said(tmp_path):
    runs = [make_run(tmp_path / name, [ANSWER]) for name in ("one", "two", "three")]
    for run, model in zip(runs, ("big", "big", "small")):
        report = json.loads((run / "report.json").read_text())
        judges = [{"judge": "keywords", "model": None}, {"judge": "rubric", "model": model}]
        report["conditions"] = {"max_new_tokens": 48, "judges": judges}
        (run / "report.json").write_text(json.dumps(report))
    assert compared(read_runs(runs[:2])).notes == []
    (note,) = compared(read_runs(runs)).notes
    assert note.startswith("The judge rubric was not the same model in all runs (one: big, two: big, three: small)")


def test_lines_of_answers_that_are_none_are_passed_over(tmp_path):
    one, two = make_run(tmp_path / "one", [ANSWER] * 4), make_run(tmp_path / "two", [REFUSAL] * 4)
    with (one / "answers.jsonl").open("a") as lines:
        lines.write('{"stage": "repaired"}\n[1]\nnull\nhalf a li\n')
    found = compared(read_runs([one, two]))
    assert [row["n"] for row in found.differences] == [2, 2]


def test_what_runs_say_of_themselves_is_shown_as_text(tmp_path):
    runs = [make_run(tmp_path / name, [ANSWER] * 2, model=f"{name} {EVIL}") for name in ("one", "[bold]two[/bold]")]
    text = printed(runs)
    assert "\x1b" not in text
    assert "[bold]two[/bold]" in text
    found = compared(read_runs(runs))
    page, markdown = (path.read_text() for path in write_comparison(tmp_path, found))
    assert page.count("<script>") == 1
    assert "<script>alert" not in page
    assert "\\<script\\>alert" in markdown
    assert "\x1b" not in page + markdown
    assert "\\`" in markdown


GOOD = {"schema": 1, "model": "m", "stages": {}, "seed": 0, "world_size": 1, "resources": {}, "versions": {}}
RATE = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing: give the folder of a run that has finished"),
        ("no json", "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("[1]", "has schema None where 1 is read"),
        (json.dumps({**GOOD, "schema": 9}), "has schema 9 where 1 is read"),
        (json.dumps({**GOOD, "stages": []}), "in stages"),
        (json.dumps({**GOOD, "seed": "x"}), "in seed"),
        (json.dumps({**GOOD, "stages": {"repaired": [1]}}), r"in stages\.repaired"),
        (json.dumps({**GOOD, "stages": {"repaired": {"asr": {**RATE, "n": "4"}}}}), r"in stages\.repaired"),
        (json.dumps({**GOOD, "stages": {"repaired": {"asr": {**RATE, "high": None}}}}), r"in stages\.repaired"),
        (json.dumps({**GOOD, "figures": {"repaired": {"ppl": {"value": "x"}}}}), r"in figures\.repaired"),
        (json.dumps({**GOOD, "repair": {"bounds": 3}}), r"in repair\.bounds"),
        (json.dumps({**GOOD, "example": "x"}), "in example"),
        (json.dumps({**GOOD, "judge": ["x"]}), "in judge"),
        (json.dumps({**GOOD, "agreement": {"repaired": ["x"]}}), "in agreement"),
        (json.dumps({**GOOD, "agreement": {"repaired": [{"agree": 0.5}]}}), "in agreement"),
        (json.dumps({**GOOD, "conditions": {"max_new_tokens": [1]}}), r"in conditions\.max_new_tokens"),
        (json.dumps({**GOOD, "conditions": {"judges": ["rubric"]}}), r"in conditions\.judges"),
        (json.dumps({**GOOD, "conditions": {"judges": [{"judge": "a", "model": [1]}]}}), r"in conditions\.judges"),
        (json.dumps({**GOOD, "repair": {"trace": ["x"]}}), r"in repair\.trace"),
        (json.dumps({**GOOD, "repair": {"coverage": "x"}}), r"in repair\.coverage"),
        (json.dumps({**GOOD, "repair": {"coverage": {"energy": "x"}}}), r"in repair\.coverage\.energy"),
        (json.dumps({**GOOD, "repair": {"coverage": {"energy": {"reached": 0.1}}}}), r"in repair\.coverage\.energy"),
        (json.dumps({**GOOD, "repair": {"coverage": {"energy": {"reached": 0.1, "kinds": {}}}}}), r"coverage\.energy"),
        (
            json.dumps(
                {**GOOD, "repair": {"coverage": {"parameters": {"reached": 1, "kinds": {"mlp": {"reached": 1}}}}}}
            ),
            r"in repair\.coverage\.parameters",
        ),
    ],
)
def test_what_is_no_report_is_a_users_mistake(content, said, tmp_path):
    good = make_run(tmp_path / "good", [ANSWER])
    (tmp_path / "bad").mkdir()
    if content is not None:
        (tmp_path / "bad" / "report.json").write_text(content)
    with pytest.raises(UserError, match=said):
        compare.run([str(good), str(tmp_path / "bad"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_report_without_stages_is_said(tmp_path):
    good = make_run(tmp_path / "good", [ANSWER])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "report.json").write_text(json.dumps(GOOD))
    assert "measured nothing" in compared(read_runs([good, tmp_path / "bare"])).notes[1]


def test_one_run_or_the_same_twice_is_nothing_to_compare(tmp_path):
    run = make_run(tmp_path / "one", [ANSWER])
    with pytest.raises(UserError, match="name two runs or more"):
        compare.run([str(run)])
    with pytest.raises(UserError, match="is given twice"):
        compare.run([str(run), str(run / "report.json")])
    with pytest.raises(UserError, match="--zork"):
        compare.run([str(run), "--zork"])


def test_further_figures_are_compared_too(tmp_path):
    runs = [make_run(tmp_path / name, [ANSWER] * 2) for name in ("one", "two")]
    report = json.loads((runs[0] / "report.json").read_text())
    report["figures"] = {"repaired": {"perplexity": {"value": 12.0, "low": 11.0, "high": None, "n": 3}}}
    (runs[0] / "report.json").write_text(json.dumps(report))
    assert re.search(r"perplexity +12 \[11, inf\] +- +3", printed(runs))


def test_stage_scores_without_pairs_have_no_differences(tmp_path):
    runs = [make_run(tmp_path / name, [ANSWER]) for name in ("one", "two")]
    (runs[0] / "answers.jsonl").write_text("")
    assert compared(read_runs(runs)).differences == []


def test_folders_may_be_below_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("~/compared", "x") == tmp_path / "compared"
    assert (tmp_path / "compared").is_dir()
    assert ExportRequest(Path("~/merged")).out == tmp_path / "merged"
