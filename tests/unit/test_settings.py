"""Settings check themselves, by the same rules whoever makes them; what is said of them can be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.settings import (
    DataPart,
    DataSettings,
    EndpointSettings,
    FinetuneSettings,
    ModelSettings,
    PlanSettings,
    PromptSet,
    RepairSettings,
    ScoreSettings,
    Settings,
    SpectrumSettings,
    rate_for,
    to_dict,
    write,
)
from oneshot.settings.names import ANY, all_names, close_names, described, kind_at

SECTIONS: dict[str, Any] = {
    "": Settings,
    "model": ModelSettings,
    "data": DataSettings,
    "finetune": FinetuneSettings,
    "repair": RepairSettings,
    "score": ScoreSettings,
    "spectrum": SpectrumSettings,
    "plan": PlanSettings,
}
# setting, value, what is said of it: as text where the command line and YAML read the same
WRONG = [
    ("seed", "many", "a whole number"),
    ("seed", 1.5, "a whole number"),
    ("seed", True, "a whole number"),
    ("shortlist", 0, "a whole number above 0"),
    ("hang_minutes", -1, "a number of 0 or more"),
    ("hang_minutes", float("inf"), "a number of 0 or more"),
    ("hang_minutes", "soon", "a number of 0 or more"),
    ("preflight", "sometimes", "one of auto, always, never"),
    ("log_with", "tensorbord", "one of tensorboard, wandb, trackio, or null; did you mean tensorboard?"),
    ("resume", 3, "true or false"),
    ("finetune_first", "perhaps", "true or false"),
    ("model.dtype", "bf16", "one of auto, float32, bfloat16, float16; did you mean bfloat16?"),
    ("model.quantize", "int8", "nf4, or null"),
    ("model.max_length", 0, "a whole number above 0, or null"),
    ("data.harmful_count", -1, "a whole number of 0 or more"),
    ("data.parts", 3, "settings by name, such as {NAME: {source: TEXT}}, or null"),
    ("finetune.epochs", 0, "a number above 0"),
    ("finetune.epochs", [1], "a number above 0"),
    ("finetune.learning_rate", "fast", "a number above 0 or one by method, such as {lora: 1.0e-3}, or null"),
    ("repair.rank", "many", "a whole number above 0"),
    ("repair.rank", None, "a whole number above 0"),
    ("repair.guard_weight", float("nan"), "a number of 0 or more, or null"),
    ("repair.max_divergence", 0, "a number above 0"),
    ("score.endpoint.timeout", -2, "a number above 0"),
    ("score.rubric.concurrency", 0.5, "a whole number above 0"),
    ("score.sets", ["a"], "settings by name, such as {NAME: {path: TEXT}}"),
    ("spectrum.ranks", [1, 0], "a list such as [1, 2], each a whole number above 0, or null"),
    ("spectrum.ranks", [], "a list such as [1, 2], each a whole number above 0, or null"),
    ("spectrum.alphas", 1, "a list such as [1, 2], each a number above 0"),
    ("plan.sharding", "zero1", "one of none, zero2, zero3, zero3 offload, or null; did you mean zero3?"),
]
FOREIGN = ("typing.", "Union", "Optional", "NoneType", "<class", "Traceback", "jsonargparse", "Literal")


def nested(name: str, value: Any) -> dict[str, Any]:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def said(error: pytest.ExceptionInfo[UserError], name: str, value: Any, wanted: str) -> str:
    text = str(error.value)
    assert text.startswith(f"Setting {name} is ")
    assert text.endswith(f": give {wanted}" if wanted.endswith("?") else f": give {wanted}.")
    assert not [word for word in FOREIGN if word in text]
    shown = {"None": "null", "True": "true"}.get(str(value), repr(value))
    assert f"is {shown}" in text
    return text


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG)
def test_a_wrong_value_is_named_wherever_it_comes_from(name: str, value: Any, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Settings(**nested(name, value))
    assert "(" not in said(error, name, value, wanted).partition(": give")[0]

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(nested(name, value)))
    with pytest.raises(UserError) as error:
        parse(["--config", str(path)], "repair")
    assert f"(in {path})" in said(error, name, value, wanted)

    section, text = name.partition(".")[0], yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    with pytest.raises(UserError) as error:
        parse(
            [f"--{name}={text}"], section if (section := name.partition(".")[0]) in ("spectrum", "plan") else "repair"
        )
    assert "(on the command line)" in said(error, name, value, wanted)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RepairSettings(rank="x"), "repair.rank"),  # type: ignore[arg-type]
        (lambda: RepairSettings(learning_rate={"sft": 0}), "repair.learning_rate.sft"),
        (lambda: Settings(repair={"rank": 0}), "repair.rank"),  # type: ignore[arg-type]
        (lambda: Settings(repair=3), "repair"),  # type: ignore[arg-type]
        (lambda: Settings(model=DataSettings()), "model"),  # type: ignore[arg-type]
        (lambda: ModelSettings(path=3), "model.path"),  # type: ignore[arg-type]
        (lambda: DataPart("a", repeat=0), "data.parts.NAME.repeat"),
        (lambda: FinetuneSettings(epochs=10**400), "finetune.epochs"),
        (lambda: DataSettings(parts={"a": {"source": "x", "count": -1}}), "data.parts.a.count"),  # type: ignore[dict-item]
        (lambda: PromptSet("a", kinds={"x": 1}), "score.sets.NAME.kinds.x"),  # type: ignore[dict-item]
        (lambda: EndpointSettings(retries=-1), "endpoint.retries"),
        (lambda: dataclasses.replace(Settings(), seed="x"), "seed"),  # type: ignore[type-var]
    ],
)
def test_settings_made_in_python_check_themselves(make: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"^Setting {name} is .*: give "):
        make()


def test_values_are_brought_into_their_form() -> None:
    settings = Settings(
        hang_minutes=3,
        repair={"rank": 4, "learning_rate": {"sft": 1}},  # type: ignore[arg-type]
        model=ModelSettings(path=Path("folder") / "model"),  # type: ignore[arg-type]
        data={"parts": {"a": {"source": "x"}}},  # type: ignore[arg-type]
    )
    assert type(settings.hang_minutes) is float
    assert settings.repair == RepairSettings(rank=4, learning_rate={"sft": 1.0})
    assert settings.model.path == "folder/model"
    assert settings.data.parts == {"a": DataPart("x")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(resume=True), "resume needs --out"),
        (lambda: Settings(out=""), "Setting out is empty: "),
        (lambda: Settings(reference=" "), "Setting reference is empty: "),
        (lambda: ModelSettings(path=""), r"Setting model\.path is empty: "),
        (lambda: ModelSettings(base=""), r"Setting model\.base is empty: "),
        (lambda: ModelSettings(quantize="nf4", stock_io=True), r"model\.stock_io forbids"),
        (lambda: DataSettings(task="x", parts={}), r"data\.task is replaced by data\.parts"),
        (lambda: RepairSettings(targets="("), r"repair\.targets '\(' is no regular expression"),
        (lambda: FinetuneSettings(learning_rate={"sft": 1e-3}), r"names 'sft', which is no method: name full or lora"),
        (lambda: Settings(data={"parts": {"a": {}}}), r"data\.parts\.a\.source is missing"),  # type: ignore[arg-type]
        (lambda: Settings(repair={"rnk": 3}), r"no setting repair\.rnk: did you mean repair\.rank\?"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_go_together(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_learning_rate_may_be_given_by_method() -> None:
    assert rate_for(None, "sft") is None
    assert rate_for(0.5, "sft") == 0.5
    assert rate_for({"lora": 0.5}, "lora") == 0.5
    assert rate_for({"lora": 0.5}, "sft") is None


def test_written_settings_are_read_back(tmp_path: Path) -> None:
    settings = Settings(
        name="mine",
        repair=RepairSettings(learning_rate={"sft": 2e-5}),
        data=DataSettings(parts={"a": DataPart("toy:task", count=3)}),
        score=ScoreSettings(sets={"s": PromptSet("p.csv", kinds={"safe": "lookalike"})}),
        spectrum=SpectrumSettings(ranks=[1, 2]),
    )
    write(settings, tmp_path / "settings.yaml")
    for stage in ("repair", "finetune", "score", "spectrum", "plan"):
        assert parse(["--config", str(tmp_path / "settings.yaml")], stage) == settings
    assert Settings(**to_dict(settings)) == settings


def test_every_setting_is_described() -> None:
    for name, section in SECTIONS.items():
        assert {field.name for field in dataclasses.fields(section)} == set(_documented(section)), name
    assert all(one.doc and one.wanted for one in described())
    assert len(set(all_names())) == len(all_names()) > 120
    assert all(kind_at(one) is not None for one in all_names() if ANY not in one)
    assert kind_at("data.parts.any.count") is not None
    assert kind_at("data.parts.any.nothing") is kind_at("seed.x") is kind_at("nothing") is None


def _documented(section: Any) -> dict[str, str]:
    from oneshot.settings.kinds import docs

    return docs(section)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("repair.gaurd_weight", "repair.guard_weight"),
        ("guard_weight", "repair.guard_weight"),
        ("repiar.rank", "repair.rank"),
        ("finetune.rank", "finetune.lora_rank"),
        ("score.endpoint.urll", "score.endpoint.url"),
        ("data.parts.mine.cuont", "data.parts.mine.count"),
        ("sede", "seed"),
        ("watch_promts", "watch_prompts"),
    ],
)
def test_a_misspelt_name_is_understood(name: str, meant: str) -> None:
    assert meant in close_names(name)


def test_a_name_like_no_other_is_not() -> None:
    assert close_names("zzzz") == []


def test_a_run_folder_may_be_below_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert Settings(out="~/runs/a").out == "/somewhere/runs/a"
    assert Settings(out="a~b").out == "a~b"
