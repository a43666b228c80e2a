"""Going online is said before it is done, to the revision that the adapter names, and ``--offline`` forbids it."""

from __future__ import annotations

import importlib
import json
import os
import sys

import datasets.config
import huggingface_hub
import huggingface_hub.constants
import pytest
from tiny import tiny_runtime

from oneshot import api, online
from oneshot.api import settings_for
from oneshot.checkpoint.disk.files import resolve
from oneshot.checkpoint.loading.load import find_source
from oneshot.commandline import parse, run_stage
from oneshot.errors import UserError
from oneshot.settings import ModelSettings
from oneshot.world.model import ALIGNED


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for name in online._VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch, capsys):
    """What was fetched, each with what had been said before."""
    fetched = []

    def fetch(name, revision=None, **_):
        fetched.append((name, revision, capsys.readouterr().err))
        return str(ALIGNED)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return fetched


@pytest.fixture
def lora(tmp_path):
    def write(**fields):
        config = {"peft_type": "LORA", "base_model_name_or_path": "someone/model", **fields}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def test_the_base_that_an_adapter_names_is_said_before_it_is_fetched_at_its_revision(hub, lora):
    path = lora(revision="v1.2")
    find_source(ModelSettings(path=path), tiny_runtime())
    ((name, revision, said),) = hub
    assert (name, revision) == ("someone/model", "v1.2")
    assert "Fetching the base model someone/model at revision v1.2, which" in said
    assert f"{path}/adapter_config.json names, from https://huggingface.co with your token" in said
    assert "--offline" in said


def test_a_base_that_the_user_gives_is_fetched_at_its_newest(hub, lora):
    find_source(ModelSettings(path=lora(revision="v1.2"), base="other/model"), tiny_runtime())
    ((name, revision, said),) = hub
    assert (name, revision) == ("other/model", None)
    assert "Fetching the base model other/model, from" in said


@pytest.mark.parametrize("fields", [{"revision": 3}, {"base_model_name_or_path": ["a"]}, {"revision": "a\u0000b"}])
def test_names_of_wrong_types_go_nowhere(fields, hub, lora):
    with pytest.raises(UserError):
        find_source(ModelSettings(path=lora(**fields)), tiny_runtime())
    assert hub == []


def test_offline_nothing_is_said_or_fetched(monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    online.go_offline(True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    assert datasets.config.HF_HUB_OFFLINE is True, "where datasets 3 and later look"
    with pytest.raises(UserError, match="fetching is forbidden"):
        resolve("someone/model-that-is-not-here")
    assert capsys.readouterr().err == ""


def test_the_setting_forbids_it_on_the_command_line_and_in_python(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "exit", lambda code: None)
    run_stage(["--offline", "--model.path", "x", "--seed", "3"], "score", lambda s: seen.append(online.is_offline()))
    assert seen == [True]
    assert parse(["--offline"], "plan").offline
    assert settings_for("score", model="x", offline=True).offline
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("stage", ["repair", "finetune", "score", "plan"])
def test_in_python_it_is_forbidden_for_the_call_alone(stage, monkeypatch):
    seen = []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for module in ("oneshot.repair", "oneshot.finetune", "oneshot.score"):
        monkeypatch.setattr(importlib.import_module(module), "run", lambda *_, **__: ends(seen))
    monkeypatch.setattr(importlib.import_module("oneshot.planning.plan"), "make_plan", lambda _: ends(seen))
    for offline in (True, False):
        with pytest.raises(UserError, match="the end"):
            getattr(api, stage)(model="x", offline=offline)
    assert seen == [(True, True), (False, False)]
    assert "HF_HUB_OFFLINE" not in os.environ


def ends(seen):
    seen.append((online.is_offline(), huggingface_hub.constants.HF_HUB_OFFLINE))
    raise UserError("the end")
