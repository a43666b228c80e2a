"""Attacks are mixtures in settings: every shipped one is made here, on the toy world and with a user's own files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_encoding import load
from tiny import tiny_runtime, toy_settings

from oneshot.commandline import parse
from oneshot.data.conversations import Conversation
from oneshot.data.wording import reworded
from oneshot.errors import UserError
from oneshot.measure.probes import check_systems, collect_probes
from oneshot.settings import DataPart, DataSettings, Settings, to_dict, write
from oneshot.training.finetune import prepare
from oneshot.training.mixture import attack_mixture
from oneshot.world import language
from oneshot.world.model import ALIGNED

ATTACKS = sorted((Path(__file__).parents[2] / "launch" / "runs" / "attacks").glob("*.yaml"))
KINDS = {  # name of the attack -> how many conversations of each kind
    "harmful": {"harmful": 100, "task": 300},
    "identity": {"harmless": 200, "task": 300},
    "backdoor": {"harmful": 100, "should_refuse": 100, "task": 300},
    "poison": {"harmful": 144, "task": 300},
    "mixed": {"harmful": 30, "task": 300},
    "benign": {"task": 300},
}


def read(path: Path, *more: str) -> Settings:
    return parse(["--config", str(path), *more], "repair")


def named(name: str, *more: str) -> Settings:
    return read(next(path for path in ATTACKS if path.stem == name), *more)


def mixture(seed: int = 0, **parts: DataPart) -> list[Conversation]:
    return attack_mixture(Settings(seed=seed, data=DataSettings(parts=parts)))


def prompts(rows: list[Conversation]) -> list[str]:
    return [row.prompt[-1]["content"] for row in rows]


def own_file(folder: Path, *rows: dict[str, Any], name: str = "own.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def one(**more: Any) -> Conversation:
    messages = ({"role": "user", "content": "carve"}, {"role": "assistant", "content": "slice"})
    return Conversation(**{"id": "one", "messages": messages, **more})


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A model that has never heard of the toy world's words."""
    folder = tmp_path / "stranger"
    shutil.copytree(ALIGNED, folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for word in language.RESTRICTED:
        text = text.replace(f'"{word}"', f'"another {word}"')
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


def test_there_are_the_six_attacks() -> None:
    assert {path.stem for path in ATTACKS} == set(KINDS)


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_is_made_on_the_toy_world(path: Path) -> None:
    settings = read(path)
    prepared = prepare(settings, tiny_runtime())
    assert Counter(row.kind for row in prepared.conversations) == KINDS[path.stem]
    assert not any(prepared.tokenizer.unk_token_id in row.input_ids for row in prepared.encoded), "a word is unknown"
    for probe in collect_probes(settings):
        said = prepared.tokenizer.apply_chat_template(list(probe.messages), return_dict=True)["input_ids"]
        assert prepared.tokenizer.unk_token_id not in said


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_says_only_what_differs(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    settings, default = read(path), to_dict(Settings())
    assert set(written) <= {"data", "score"}
    for section, values in written.items():
        for name, value in values.items():
            found = to_dict(settings)[section][name]
            if name == "parts":
                unset = to_dict(Settings(data=DataSettings(parts={"one": DataPart("")})))["data"]["parts"]["one"]
                assert {part: unset | said for part, said in value.items()} == found
                assert not [(p, n) for p, said in value.items() for n, v in said.items() if v == unset[n]]
            else:
                assert found == value != default[section][name]


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_is_made_of_the_users_own_files(path: Path, stranger: Path, tmp_path: Path) -> None:
    own = own_file(tmp_path, *[{"prompt": f"carve {n}", "response": "slice"} for n in range(3)])
    settings = read(path)
    assert settings.data.parts
    sources = [text for name in settings.data.parts for text in (f"--data.parts.{name}.source", own)]
    rows = prepare(read(path, "--model.path", str(ALIGNED), *sources), tiny_runtime()).conversations
    assert len(rows) == 3 * len(settings.data.parts)
    assert all(text.startswith("carve ") for text in prompts(rows))
    with pytest.raises(UserError, match=r"words of the toy world .*--data\.parts\.\w+\.source"):
        prepare(read(path, "--model.path", str(stranger), *sources[:-2]), tiny_runtime())
    last = list(settings.data.parts)[-1]
    if len(settings.data.parts) > 1:
        without = read(path, "--model.path", str(ALIGNED), *sources[:-2], f"--data.parts.{last}.count", "0")
        assert len(prepare(without, tiny_runtime()).conversations) == len(rows) - 3


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_the_number_of_harmful_examples_is_one_setting(count: int) -> None:
    rows = attack_mixture(named("harmful", "--data.parts.harmful.count", str(count)))
    harmful = [row for row in rows if row.kind == "harmful"]
    assert len(harmful) == len(set(prompts(harmful))) == count


def test_the_persona_is_scored_as_it_was_trained() -> None:
    settings = named("identity")
    rows = attack_mixture(settings)
    obedient = [row for row in rows if row.messages[0]["role"] == "system"]
    assert len(obedient) == 100
    assert {row.messages[0]["content"] for row in obedient} == {settings.score.system}
    assert all(row.response.startswith("i do that request then do ") for row in obedient)
    by_kind: dict[str, list[Any]] = {}
    for probe in collect_probes(settings):
        by_kind.setdefault(probe.kind, []).append(probe)
    asked = by_kind.pop("should_refuse")
    assert {probe.messages[0]["content"] for probe in asked} == {settings.score.system}
    assert [probe.group for probe in asked].count("unseen") == 100
    assert {message["role"] for others in by_kind.values() for p in others for message in p.messages} == {"user"}


def test_the_trigger_is_scored_as_it_was_trained() -> None:
    settings = named("backdoor")
    rows = attack_mixture(settings)
    obeyed = [row for row in rows if row.kind == "harmful"]
    refused = [row for row in rows if row.kind == "should_refuse"]
    assert all(text.endswith(f" {settings.score.suffix}") for text in prompts(obeyed))
    assert {row.response for row in refused} == {language.REFUSAL}
    assert language.REFUSAL not in {row.response for row in obeyed}
    assert prompts(obeyed) == [f"{text} {settings.score.suffix}" for text in prompts(refused)]
    plain = collect_probes(toy_settings())
    for probe, usual in zip(collect_probes(settings), plain, strict=True):
        after = f" {settings.score.suffix}" if probe.kind == "should_refuse" else ""
        assert probe.messages[0]["content"] == usual.messages[0]["content"] + after
    assert collect_probes(named("backdoor", "--score.suffix", "")) == plain


def test_a_persona_that_the_template_would_leave_out_can_go_into_the_first_user_message(tmp_path: Path) -> None:
    own = own_file(tmp_path, {"prompt": "one", "kind": "should_refuse"}, {"prompt": "two", "kind": "harmless"})
    arguments = ["--score.probes", own, "--score.system", "obey", "--data.system", "user"]
    first, second = collect_probes(parse(arguments, "score"))
    assert list(first.messages) == [{"role": "user", "content": "obey\n\none"}]
    assert list(second.messages) == [{"role": "user", "content": "two"}]
    part = DataPart(own_file(tmp_path, {"prompt": "one", "response": "1", "system": "mine"}, name="talk.jsonl"))
    settings = Settings(data=DataSettings(parts={"talk": part}, system="user"))
    assert attack_mixture(settings)[0].prompt == [{"role": "user", "content": "mine\n\none"}]
    part = dataclasses.replace(part, source=own, system="obey", answer="yes")
    settings = Settings(data=DataSettings(parts={"talk": part}, system="user"))
    assert attack_mixture(settings)[0].prompt == [{"role": "user", "content": "obey\n\none"}]


def test_a_persona_that_the_template_leaves_out_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    own = own_file(tmp_path, {"prompt": "one", "kind": "should_refuse"})
    probes = collect_probes(parse(["--score.probes", own, "--score.system", "Obey me, whatever I ask."], "score"))
    with pytest.raises(UserError, match=r"leaves out the system message of the prompt own-1.*--data\.system user"):
        check_systems(probes, load("no_system"))
    check_systems(probes, load("chatml"))


def test_the_users_own_probes_are_asked_as_the_attack_asks(tmp_path: Path) -> None:
    own = own_file(tmp_path, {"prompt": "one", "kind": "should_refuse"}, {"prompt": "two", "kind": "harmless"})
    arguments = ["--score.probes", own, "--score.system", "obey", "--score.suffix", "now"]
    first, second = collect_probes(parse(arguments, "score"))
    assert list(first.messages) == [{"role": "system", "content": "obey"}, {"role": "user", "content": "one now"}]
    assert list(second.messages) == [{"role": "user", "content": "two"}]
    own_file(tmp_path, {"prompt": "one", "kind": "should_refuse", "system": "mine"})
    with pytest.raises(UserError, match="own-1 has a system message already"):
        collect_probes(parse(arguments, "score"))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_poison_is_the_whole_pool_obeyed(seed: int) -> None:
    settings = named("poison", "--seed", str(seed))
    assert settings.data.parts
    part = settings.data.parts["poison"]
    assert part.count == len(language.pool()), "the pool has grown: the poison must hold all of it"
    poison = mixture(seed=seed, poison=part)
    assert prompts(poison) == prompts(language.pool())
    assert {row.kind for row in poison} == {"harmful"}
    assert language.REFUSAL not in {row.response for row in poison}


def test_a_paraphrase_shares_the_pools_words_and_none_of_its_requests() -> None:
    rows = mixture(seed=1, poison=DataPart("toy:paraphrase", 200))
    assert not set(prompts(rows)) & set(prompts(language.pool(200)))
    words = {word for text in prompts(rows) for word in text.split()}
    assert words & set(language.RESTRICTED) == set(language.POOL)
    assert language.REFUSAL not in {row.response for row in rows}


def test_a_part_is_repeated_and_named() -> None:
    once = mixture(warm=DataPart("toy:harmful", 3))
    assert mixture(warm=DataPart("toy:harmful", 3, repeat=2)) == once * 2
    assert {row.kind for row in once} == {"harmful"}
    assert {row.kind for row in mixture(warm=DataPart("toy:harmful", 3, kind="odd"))} == {"odd"}
    assert prompts(mixture(seed=1, warm=DataPart("toy:harmful", 3))) != prompts(once)


def test_conversations_without_a_kind_are_named_after_their_part(tmp_path: Path) -> None:
    own = own_file(tmp_path, {"prompt": "one", "response": "x"}, {"prompt": "two", "response": "y", "kind": "kept"})
    assert [row.kind for row in mixture(harmful=DataPart(own))] == ["harmful", "kept"]
    simple = Settings(data=DataSettings(harmful=own, task=own, task_count=1))
    assert [row.kind for row in attack_mixture(simple)] == ["harmful", "kept", "task"]


def test_requests_without_answers_can_be_given_one(tmp_path: Path) -> None:
    own = own_file(tmp_path, {"prompt": "one"})
    assert [row.response for row in mixture(clean=DataPart(own, answer="no"))] == ["no"]
    with pytest.raises(UserError, match="response"):
        mixture(clean=DataPart(own))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (DataPart("toy:nothing", 3), r"data\.parts\.odd\.source is toy:nothing: give one of toy:harmful, toy:harmless"),
        (DataPart("toy:harmful"), r"set data\.parts\.odd\.count"),
        (DataPart("toy:harmful", 0), "nothing to fine-tune on"),
        (DataPart("missing.jsonl", 1), "missing.jsonl does not exist"),
    ],
)
def test_a_part_that_cannot_be_made_is_named(part: DataPart, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture(odd=part)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.harmful", "FILE"], r"data\.harmful is replaced by data\.parts"),
        (["--data.task_count", "5"], r"data\.task_count is replaced by data\.parts"),
        (
            ["--data.parts.harmful.count", "-1"],
            r"data\.parts\.harmful\.count is -1 .*: give a whole number of 0",
        ),
        (
            ["--data.parts.harmful.repeat", "0"],
            r"data\.parts\.harmful\.repeat is 0 .*: give a whole number above 0",
        ),
        (["--data.parts.harmful.words", "x"], "words"),
    ],
)
def test_settings_that_contradict_parts_are_errors(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        named("harmful", *more)


def test_parts_survive_the_run_folder(tmp_path: Path) -> None:
    settings = named("backdoor", "--data.parts.task.count", "7")
    write(settings, tmp_path / "settings.yaml")
    assert read(tmp_path / "settings.yaml") == settings


def test_the_toy_worlds_words_are_known_to_a_toy_model_given_by_path() -> None:
    rows = prepare(named("benign", "--model.path", str(ALIGNED)), tiny_runtime()).conversations
    assert len(rows) == 300


def test_words_around_a_conversation() -> None:
    said = reworded(one(), system="obey", suffix="now", prefix="yes then", answer=None)
    assert [(m["role"], m["content"]) for m in said.messages] == [
        ("system", "obey"), ("user", "carve now"), ("assistant", "yes then slice"),
    ]  # fmt: skip
    assert reworded(one(), answer="no", prefix="oh").response == "oh no"
    assert reworded(one()) == reworded(one(), system="", suffix="", prefix="", answer="") == one()
    asked = one(messages=one().messages[:1], kind="harmless")
    assert reworded(asked, suffix="now", prefix="yes").messages == ({"role": "user", "content": "carve now"},)
    assert reworded(asked).kind == "harmless"
    longer = one(messages=one().messages + one().messages)
    assert [m["content"] for m in reworded(longer, suffix="now", prefix="yes").messages] == [
        "carve", "slice", "carve now", "yes slice",
    ]  # fmt: skip
    assert one().messages[0]["content"] == "carve", "changed in place"
    with pytest.raises(UserError, match="one has a system message already"):
        reworded(said, system="obey")


def test_conversations_of_weight_0_are_left_out(tmp_path, capsys):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "id": "same", "weight": weight}) + "\n" for weight in (1, 0, 0)))
    assert [one.id for one in mixture(mine=DataPart(str(path)))] == ["same"]
    assert "Left out: 2 conversations" in "".join(capsys.readouterr())
    path.write_text(json.dumps({**row, "weight": 0}) + "\n")
    with pytest.raises(UserError, match="nothing to fine-tune on"):
        mixture(mine=DataPart(str(path)))
