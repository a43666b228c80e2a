"""Revisions of Hub ids (peft#1567): what an adapter or a setting names is taken, and the commit is on record."""

import json

import pytest
from hub import serving
from test_effective import save_rich
from test_merged_first import QUICK

import oneshot
from oneshot.checkpoint.disk.files import resolve
from oneshot.checkpoint.loading.pinned import pinned
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.online import go_offline
from oneshot.world.model import ALIGNED


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(monkeypatch, tmp_path / "cache") as found:
        yield found


def files_of(folder, **changed):
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return found | {name.replace("_json", ".json"): value for name, value in changed.items()}


def two_versions(hub, name="lab/model"):
    """The toy's model as the tag v1, and something broken as main."""
    old = hub.repository(name).add("v1", files_of(ALIGNED))
    new = hub.repository(name).add("main", {"config.json": b"{}", "README.md": b"# newer"})
    return old, new


def test_settings_name_the_commit_of_every_hub_id(hub, tmp_path):
    old, new = two_versions(hub)
    words = ["--model.path", "lab/model", "--model.revision", "v1", "--reference", "lab/model"]
    found = pinned(parse(words, "repair"))
    assert (found.model.revision, found.reference_revision) == (old, new)
    asked = len(hub.asked)
    assert resolve("lab/model", revision=old).name == old
    assert len(hub.asked) == asked, "a commit that was fetched is not asked for again"
    go_offline(True)
    again = pinned(parse([*words, "--offline", "true"], "repair"))
    assert again == parse([*words, "--offline", "true", "--model.revision", old, "--reference_revision", new], "repair")


def test_the_revision_that_an_adapter_names_is_taken_and_is_in_settings_card_and_report(hub, tmp_path):
    old, _ = two_versions(hub)
    adapter = save_rich(tmp_path / "adapter", ALIGNED, target_modules=["q_proj", "down_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "lab/model", "revision": "v1"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    options = {**QUICK, "repair": {**QUICK["repair"], "method": "lowrank"}}
    found = oneshot.repair(model=str(adapter), out=str(tmp_path / "run"), **options)
    assert list(found.report["stages"]) == ["aligned", "finetuned", "repaired"], "the base is what it came from"
    assert found.report["settings"]["model"]["base_revision"] == old
    assert f"base_revision: {old}" in (tmp_path / "run" / "settings.yaml").read_text()
    assert old in (tmp_path / "run" / "report.md").read_text()
    card = (found.patch_folder / "README.md").read_text()
    assert f'from_pretrained("lab/model", revision="{old}")' in card
    assert f"repair of lab/model at commit {old}" in card
    assert json.loads((found.patch_folder / "adapter_config.json").read_text())["revision"] == old


def test_a_run_that_goes_on_after_its_branch_moved_is_refused(hub, tmp_path):
    old, _ = two_versions(hub)
    hub.repository("lab/model").refs["main"] = old
    before = pinned(parse(["--model.path", "lab/model"], "repair"))
    hub.repository("lab/model").add("main", {**files_of(ALIGNED), "README.md": b"# newer"})
    after = pinned(parse(["--model.path", "lab/model"], "repair"))
    from oneshot.settings import differences, to_dict

    assert [said.split(" was ")[0] for said in differences(to_dict(before), after)] == ["model.revision"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--model.path", "toy:aligned", "--model.revision", "v1"],
            "model.revision is given, but toy:aligned is a folder",
        ),
        (["--model.path", "toy:aligned", "--model.base_revision", "v1"], "toy:aligned is no adapter"),
        (["--model.path", "toy:aligned", "--reference_revision", "v1"], "no reference: give it with --reference"),
        (
            ["--model.path", "lab/model", "--model.revision", "v9"],
            "lab/model at revision v9 is neither a folder here nor",
        ),
        (["--model.path", "lab/gone"], "lab/gone is neither a folder here nor"),
    ],
)
def test_a_revision_of_nothing_is_refused(words, says, hub):
    two_versions(hub)
    with pytest.raises(UserError, match=says):
        pinned(parse(words, "repair"))
