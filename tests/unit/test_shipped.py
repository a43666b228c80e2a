"""What ships beside the code is found by name, and a user's own file by path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oneshot import shipped
from oneshot.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["llama3-70b", "tiny", "attacks/mixed", "prompts/xstest", "tiny.yaml"])
def test_settings_that_ship_are_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.settings_file(name) == ROOT / "launch" / "runs" / f"{name.removesuffix('.yaml')}.yaml"


def test_a_users_own_file_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("seed: 1\n")
    assert shipped.settings_file("tiny.yaml") == Path("tiny.yaml")
    (tmp_path / "tiny").mkdir()  # a folder of that name is no settings file
    assert shipped.settings_file("tiny") == ROOT / "launch" / "runs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llama3-7b", "did you mean llama3-70b or "),
        ("mixed", r"did you mean attacks/mixed\?"),
        ("mine/of-no-kind", "has that name: oneshot list"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_names_that_are_close(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"^There is no settings file {name}, .*{hint}.*\.$"):
        shipped.settings_file(name)


def test_launch_files_are_found_by_name() -> None:
    assert shipped.launch_file("zero2_cpu") == ROOT / "launch" / "zero2_cpu.yaml"
    with pytest.raises(UserError, match=r"^There is no launch file zero4, .*zero3 or "):
        shipped.launch_file("zero4")


def test_in_a_wheel_they_are_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_IN_WHEEL", tmp_path)
    (tmp_path / "launch" / "runs").mkdir(parents=True)
    (tmp_path / "launch" / "runs" / "only.yaml").touch()
    assert shipped.root() == tmp_path
    assert shipped.settings_names() == ["only"]
    assert shipped.ds_configs() == tmp_path / "ds_configs"


def test_every_launch_file_names_a_deepspeed_file_that_ships() -> None:
    for name in shipped.launch_names():
        assert all(path.is_file() for path in _deepspeed_files(name)), name


def test_every_sharding_that_a_plan_advises_has_a_launch_file() -> None:
    """Without a twin for CPUs in its place: what a plan is made for are GPUs."""
    names = [name for name in shipped.launch_names() if not name.endswith("_cpu")]
    named = {path.name for name in names for path in _deepspeed_files(name)}
    assert named == {path.name for path in shipped.ds_configs().glob("*.json")}


def _deepspeed_files(name: str) -> list[Path]:
    return [ROOT / path for path in re.findall(r"deepspeed_config_file: (\S+)", shipped.launch_file(name).read_text())]
