"""The files about the repository itself: read by programs, so that a slip in them shows late."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import oneshot

ROOT = Path(__file__).resolve().parents[2]
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
