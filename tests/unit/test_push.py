"""A finished repair to the Hub: private, without answers, without a token in any text, and nothing that is marked."""

import importlib
import json
import shutil

import pytest
from hub import serving
from test_merged_first import QUICK

import oneshot
from oneshot.checkpoint.disk.files import write_marker
from oneshot.errors import UserError
from oneshot.world.model import ALIGNED

command = importlib.import_module("oneshot.push")
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder as a repair leaves it, with a merged checkpoint; tests copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    (run / "patch").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", ".hidden"):
        (run / "patch" / name).write_text("{}" if name.endswith("json") else name)
    shutil.copytree(ALIGNED, run / "repaired")
    (run / "report.json").write_text(json.dumps({"schema": 1}))
    (run / "report.md").write_text("# Report\n")
    for name in ("answers.jsonl", "report.html"):
        (run / name).write_text("an answer")
    return run


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        command.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_finished_repair_is_pushed_private_and_without_answers(hub, finished, capsys):
    command.main([str(finished), "lab/patch"])
    said = capsys.readouterr()
    patch, whole = hub.repositories["lab/patch"], hub.repositories["lab/patch-repaired"]
    assert patch.private
    assert whole.private
    report = {"report/report.json", "report/report.md"}
    named = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    (files,) = patch.commits.values()
    assert set(files) == named | report
    assert files["adapter_model.safetensors"] == b"adapter_model.safetensors"
    (files,) = whole.commits.values()
    assert set(files) == {path.name for path in ALIGNED.iterdir() if path.is_file()} | report
    assert files["model.safetensors"] == (ALIGNED / "model.safetensors").read_bytes()
    assert f"Pushed: {hub.endpoint}/lab/patch" in said.out
    assert TOKEN not in said.out + said.err


def test_a_dry_run_lists_what_would_be_sent_and_asks_nothing(hub, finished, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    command.main([str(finished), "lab/patch", "--dry_run", "--offline"])
    said = capsys.readouterr().out
    assert "lab/patch (private): 5 files" in said
    assert "  adapter_model.safetensors (25 bytes)" in said
    assert "answers.jsonl" not in said
    assert hub.asked == []


@pytest.mark.parametrize("name", ["a", "lab/patch/more"])
def test_a_dry_run_refuses_what_a_push_refuses(hub, finished, capsys, monkeypatch, name):
    monkeypatch.delenv("HF_TOKEN")
    assert "is no name of a repository" in refused(capsys, finished, name, "--dry_run", "--offline")


def test_what_is_marked_is_pushed_only_by_its_name_and_never_public(hub, finished, capsys, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    write_marker(run / "patch", {})
    assert "patch is marked as safety-degraded (SAFETY_DEGRADED.json), so it is not" in refused(capsys, run, "lab/p")
    assert "never made public" in refused(capsys, run, "lab/p", "--push_public")
    assert "never made public" in refused(capsys, run, "lab/p", "--push_public", "--push_degraded")
    assert hub.repositories == {}
    command.main([str(run), "lab/p", "--push_degraded"])
    assert hub.repositories["lab/p"].private
    (files,) = hub.repositories["lab/p"].commits.values()
    assert {"SAFETY_DEGRADED.json", "README.md"} <= set(files), "the marker goes along"


def test_a_public_repository_gets_nothing_that_is_to_be_private(hub, finished, capsys):
    hub.repository("lab/patch").private = False
    assert "lab/patch exists and is public" in refused(capsys, finished, "lab/patch")
    assert hub.repositories["lab/patch"].commits == {}
    command.main([str(finished), "lab/patch", "--push_public"])
    assert len(hub.repositories["lab/patch"].commits) == 1


def test_what_cannot_be_pushed_is_said_and_no_token_with_it(hub, finished, capsys, tmp_path, monkeypatch):
    assert "no name of a repository" in refused(capsys, finished, "patch")
    assert "is not the folder of a finished repair" in refused(capsys, tmp_path, "lab/patch")
    assert "forbids" in refused(capsys, finished, "lab/patch", "--offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{TOKEN}:x@127.0.0.1:1")
    line = refused(capsys, finished, "lab/patch")
    assert "could not be pushed" in line
    assert TOKEN not in line
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token to push with" in refused(capsys, finished, "lab/patch")


def test_a_repair_looks_before_it_begins_whether_it_can_be_pushed_and_is_pushed_in_the_end(hub, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ALIGNED)
    with torch.no_grad():
        model.lm_head.weight += 0.01 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(ALIGNED).save_pretrained(tmp_path / "model")
    options = {**QUICK, "repair": {**QUICK["repair"], "method": "lowrank"}, "model": str(tmp_path / "model")}
    with pytest.raises(UserError, match="'mine' is no name of a repository"):
        oneshot.repair(out=str(tmp_path / "run"), push_to_hub="mine", **options)
    with pytest.raises(UserError, match=r"--offline .* forbids"):
        oneshot.repair(out=str(tmp_path / "run"), push_to_hub="lab/mine", offline=True, **options)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = oneshot.repair(out=str(tmp_path / "run"), push_to_hub="lab/mine", **options)
    (files,) = hub.repositories["lab/mine"].commits.values()
    assert files["adapter_model.safetensors"] == (found.patch_folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["report/report.json"])["schema"] == 1


def test_a_second_push_leaves_no_weights_and_no_marker_of_the_first(hub, finished):
    hub.repository("lab/patch-repaired").private = True
    old = {
        "model-00001-of-00002.safetensors": b"x",
        "model.safetensors.index.json": b"{}",
        "SAFETY_DEGRADED.json": b"{}",
    }
    hub.repository("lab/patch-repaired").add("main", {**old, "notes.txt": b"mine"})
    command.main([str(finished), "lab/patch"])
    whole = hub.repositories["lab/patch-repaired"]
    files = whole.commits[whole.refs["main"]]
    assert not old.keys() & files.keys()
    assert files["notes.txt"] == b"mine"
