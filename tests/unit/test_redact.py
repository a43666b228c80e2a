import json

import pytest
import yaml

from oneshot.commandline import parse
from oneshot.measure.rates import StageScores
from oneshot.redact import STRUCK, redacted, without_secrets
from oneshot.report.card import write_card
from oneshot.report.outputs import write_outputs
from oneshot.report.runfolder import Run, append_event, build_report, write_selection
from oneshot.settings import EndpointSettings, ModelSettings, ScoreSettings, Settings, write

# put together here, so that no scanner takes this file for one that holds a key
HUB, SERVER = "hf_" + "Ab1" * 8, "sk-" + "proj-Zork42" * 3
OWN = "zork/fnord+key==12"


@pytest.mark.parametrize(
    "text",
    [
        HUB,
        f"see {SERVER}, please",
        "ghp_" + "a1" * 12,
        "AKIA" + "ABCDEFGHIJ123456",
        f"Authorization: Bearer {'zork1' * 5}",
        "https://me:zorkfnord@host/v1",
        "https://zorkfnord@host/v1",
        "https://host/v1?model=a&api_key=zorkfnord#x",
    ],
)
def test_what_looks_like_a_key_is_struck_out(text):
    found = redacted(text)
    assert STRUCK in found
    assert not any(part in found for part in (HUB, SERVER, "zorkfnord", "zork1zork1", "a1a1", "ABCDEF"))


@pytest.mark.parametrize(
    "text",
    [
        "risk-assessment-of-everything-2024 and sk-learn-based-classifiers",
        "the bearer responsibilities-of-the-crown",
        "https://host/v1/chat?model=toy&seed=1",
        "mail me@host, or see https://host/@user",
        "huggingface hf_hub and hf_home",
        "fingerprint " + "0123456789abcdef" * 4,
    ],
)
def test_other_text_stays(text):
    assert redacted(text) == text


def test_values_of_secret_variables_are_struck_out_whatever_they_look_like(monkeypatch, tmp_path):
    monkeypatch.setenv("ZORK_API_KEY", OWN)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "please-keep-this")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SHORT_TOKEN", "toy")
    said = f"{OWN} please-keep-this {tmp_path} toy"
    assert redacted(said) == f"{STRUCK} please-keep-this {tmp_path} toy"
    assert without_secrets({OWN: [OWN, 1, None, {"a": (OWN,)}]}) == {STRUCK: [STRUCK, 1, None, {"a": [STRUCK]}]}


def test_no_file_of_a_run_holds_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setenv("OPENAI_API_KEY", SERVER)
    monkeypatch.setenv("OTHER_SECRET", OWN)
    said = f"{HUB} {SERVER} {OWN} https://me:zorkfnord@host"
    settings = Settings(
        model=ModelSettings(path=said),
        score=ScoreSettings(endpoint=EndpointSettings(url=said, key_variable=SERVER)),
    )
    write(settings, tmp_path / "settings.yaml")
    append_event(tmp_path, note=said, **{HUB: 1})
    write_selection(tmp_path, {"table": [{"id": said}]})
    row = {"id": said, "kind": "harmless", "group": "", "prompt": said, "answer": "x" * 1990 + said}
    stages = {said: StageScores({}, [{**row, "verdict": "answered", "correct": True}])}
    report = build_report(
        Run(said, 1, 0),
        example={"id": said, "prompt": said, "response": said, "selected_by": said, "score": None},
        stages=stages,
        repair={"method": said, "trace": []},
        resources={"seconds": {said: 1.0}},
        warnings=[said],
    )
    write_outputs(tmp_path, report, stages)
    facts = {"base": said, "library": "peft", "versions": {}, "command": said}
    write_card(tmp_path, "card", facts, [said])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml", ".json", ".jsonl", ".html", ".md"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not [key for key in (HUB, HUB[:12], SERVER, SERVER[:12], OWN, "zorkfnord") if key in text], path
        assert "[secret]" in text or "\\[secret\\]" in text, path


def test_settings_without_keys_are_written_as_they_are_and_read_back(tmp_path):
    write(
        Settings(seed=4, score=ScoreSettings(endpoint=EndpointSettings(url="http://localhost:8000/v1"))), tmp_path / "s"
    )
    assert yaml.safe_load((tmp_path / "s").read_text())["score"]["endpoint"]["url"] == "http://localhost:8000/v1"
    assert parse(["--config", str(tmp_path / "s")], "repair").seed == 4
    assert json.loads(json.dumps(without_secrets({"a": 1.5, "b": [True]}))) == {"a": 1.5, "b": [True]}
