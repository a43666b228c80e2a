"""The files about the repository itself: read by programs, so that a slip in them shows late."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import oneshot
from oneshot.commandline import parse
from oneshot.launcher import command, taken_out
from oneshot.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_version_has_one_owner() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^version = .*$", project, re.MULTILINE) == ['version = { attr = "oneshot.__version__" }']
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    versions = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == oneshot.__version__, "a version has its section in CHANGELOG.md"


def test_the_citation_names_software_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["title"] == "oneshot"
    assert citation["references"][0]["url"].endswith("2601.01887")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms_and_ask_for_the_environment(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    asked = {part.get("id"): part for part in form["body"] if part["type"] != "markdown"}
    assert None not in asked
    assert all("label" in part["attributes"] for part in asked.values())
    assert "oneshot env" in asked["environment"]["attributes"]["label"]
    assert asked["environment"]["validations"]["required"] is True


def test_hooks_run_what_the_gate_runs_and_fetch_nothing() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert [hook["entry"] for hook in repos[0]["hooks"]] == ["make check"]
    assert all(hook["language"] == "system" for hook in repos[0]["hooks"])


def test_files_that_are_started_by_path_take_their_folder_off_the_path() -> None:
    """Elsewhere nobody needs it; a module with a standard one's name would be taken for it before they can."""
    guarded = {path.stem for path in (ROOT / "oneshot").glob("*.py") if "del sys.path[0]" in path.read_text()}
    assert guarded == {"repair", "finetune", "score", "spectrum"}
    for folder in ("oneshot", "benchmarks"):
        named = {path.stem for path in (ROOT / folder).iterdir()}
        assert not named & sys.stdlib_module_names, folder


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in (one for one in found if "://" not in one):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_texts_are_ones_that_there_are(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, words in _commands(page.read_text()):
        name, options, rest = taken_out(words)
        if name:
            command(stage, name, options, rest)
        with contextlib.suppress(SystemExit):  # --help, --print_config; a mistake is a UserError
            parse(rest, stage)
    capsys.readouterr()


def test_commands_are_found_in_texts() -> None:
    block = "```\noneshot plan \\\n  --gpus 8   # all\nsrun -m oneshot.score --x 2\n```\n"
    text = f"Say `oneshot repair --seed\n1`.\n{block}"
    assert sorted(_commands(text)) == [("plan", ["--gpus", "8"]), ("repair", ["--seed", "1"]), ("score", ["--x", "2"])]


def _anchors(text: str) -> set[str]:
    """A page's headings, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every stage with its words, in blocks of code and between backticks; what ends in dots is a part of one."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = r"^```\w*\n(.*?)^```"
    lines = [line for block in re.findall(blocks, text, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    rest = re.sub(blocks, "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    for line in lines:
        shown = re.search(rf"oneshot[ ./]({'|'.join(STAGES)})(?:\.py)?((?: [^#(]+)?)(?:#.*)?$", line)
        if shown and "..." not in line:
            yield shown[1], shlex.split(shown[2])
