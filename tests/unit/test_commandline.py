"""From words to settings: what each stage takes, layers of files and flags, the toy world's file, help and mistakes."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oneshot.commandline import OWN, parse
from oneshot.errors import UserError
from oneshot.settings import DataPart, Settings
from oneshot.settings.names import ANY, all_names
from oneshot.stages import STAGES, WIDTH, help_page, readers, reads

TOY = """
model: {path: toy:aligned}
guard: toy:guard
data: {harmful: toy:harmful, harmful_count: 7, task: toy:task, task_count: 8}
repair: {epochs: 3}
"""


@pytest.fixture
def write(tmp_path: Path):
    """(name, text) -> path of a settings file."""

    def make(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


@pytest.fixture
def toy(write) -> str:
    return write("toy-layer.yaml", TOY)


def refused(*words: str, stage: str = "repair") -> str:
    with pytest.raises(UserError) as error:
        parse([*words], stage)
    return str(error.value)


# help


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_short_and_shows_whole_lines(stage: str) -> None:
    lines = help_page(stage, None).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(f"usage: oneshot {stage} [--config ")
    assert sum(line.startswith(f"  oneshot {stage} ") for line in lines) == 2
    assert not [line for line in lines if "..." in line.removeprefix(lines[0])], "no description is cut"
    assert all(reads(stage, name) for name in STAGES[stage].most_used)
    said = " ".join(lines)
    assert "--help all" in said
    assert "--help SECTION" in said


@pytest.mark.parametrize("stage", STAGES)
def test_the_examples_of_the_help_are_read(stage: str) -> None:
    from oneshot.launcher import taken_out

    for example in STAGES[stage].examples:
        command, name, *words = example.split()
        assert (command, name) == ("oneshot", stage)
        parse(taken_out(words)[2], stage)


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_a_stage_reads_is_in_its_long_help_and_nothing_else(stage: str) -> None:
    page = help_page(stage, "all")
    own = STAGES[stage].own
    for name in all_names():
        flag = name.removeprefix(f"{own}.") if own else name
        assert (f"  --{flag} - " in page) == reads(stage, name), name
    assert max(map(len, page.splitlines())) <= WIDTH
    assert not [word for word in ("typing", "Union", "Optional", "NoneType") if word in page]


def test_help_of_a_section_and_of_a_setting() -> None:
    page = help_page("repair", "repair")
    flags = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    assert flags == [f"--{name}" for name in all_names() if name.startswith("repair.")]
    assert "  --repair.rank - a whole number above 0 (default: 32)\n      directions per weight matrix" in page
    assert help_page("repair", "--repair.rank").count("  --") == 1
    for topic, hint in (
        ("reapir", r"did you mean repair\b"),
        ("zzz", "give --help all, model, data"),
        ("spectrum", "belongs to oneshot spectrum"),
        ("rank", "repair.rank"),
    ):
        with pytest.raises(UserError, match=hint):
            help_page("repair", topic)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--help"], "usage: oneshot repair"),
        (["-h"], "usage: oneshot repair"),
        (["--seed", "3", "--help"], "usage: oneshot repair"),
        (["--help", "--seed", "3"], "usage: oneshot repair"),
        (["--help", "repair"], "  --repair.method"),
        (["--help=repair"], "  --repair.method"),
    ],
)
def test_help_is_asked_for_in_any_place(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(words, "repair")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(wanted)


def test_help_and_settings_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom oneshot.commandline import parse\nparse(['--repair.rank', '3'], 'repair')\n"
        "print({'torch', 'transformers', 'datasets', 'numpy', 'jsonargparse'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


# what a stage takes


@pytest.mark.parametrize(
    ("stage", "words", "others"),
    [
        ("repair", ["--spectrum.rank", "3"], "oneshot spectrum"),
        ("repair", ["--plan.gpus=3"], "oneshot plan"),
        ("finetune", ["--repair.rank", "3"], "oneshot repair, oneshot spectrum and oneshot plan"),
        ("finetune", ["--score.suffix", "x"], "oneshot repair, oneshot score, oneshot spectrum and oneshot plan"),
        ("score", ["--log_with", "wandb"], "oneshot repair, oneshot finetune, oneshot spectrum and oneshot plan"),
        ("score", ["--preflight", "always"], "oneshot repair, oneshot finetune, oneshot spectrum and oneshot plan"),
        ("score", ["--finetune.steps", "3"], "oneshot repair, oneshot finetune, oneshot spectrum and oneshot plan"),
    ],
)
def test_a_setting_of_another_stage_is_told_whose_it_is(stage: str, words: list[str], others: str) -> None:
    name = words[0].removeprefix("--").partition("=")[0]
    said = refused(*words, stage=stage)
    assert said.startswith(f"Setting {name} is not for oneshot {stage} but for {others}: ")


def test_every_setting_has_a_stage_and_a_run_may_be_planned_as_it_is_started() -> None:
    assert [name for name in all_names() if not readers(name)] == []
    assert [name for name in all_names() if reads("repair", name) and not reads("plan", name)] == []
    assert [name for name in all_names() if reads("finetune", name) and not reads("plan", name)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_may_describe_a_whole_run(stage: str, write) -> None:
    path = write(
        "run.yaml", "repair: {rank: 3}\nspectrum: {samples: 5}\nplan: {gpus: 2}\nfinetune:\nscore: {rouge: yes}\n"
    )
    settings = parse(["--config", path], stage)
    assert (settings.repair.rank, settings.spectrum.samples, settings.plan.gpus) == (3, 5, 2)
    assert settings.score.rouge
    wrong = write("wrong.yaml", "spectrum: {samples: many}\n")
    assert "Setting spectrum.samples is 'many' (in " in refused("--config", wrong, stage=stage)


def test_the_planners_own_settings_go_without_their_section() -> None:
    settings = parse(["--gpus", "16", "--gpu_memory=24GiB", "--json", "--plan.tokens", "9"], "plan")
    assert (settings.plan.gpus, settings.plan.gpu_memory, settings.plan.json, settings.plan.tokens) == (
        16,
        "24GiB",
        True,
        9,
    )
    assert "did you mean plan.gpus?" in refused("--gpu", "3", stage="plan")
    assert "no setting gpus" in refused("--gpus", "3")


# words


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--repair.merge"], "repair.merge", True),
        (["--repair.merge", "--seed", "3"], "repair.merge", True),
        (["--repair.merge", "false"], "repair.merge", False),
        (["--repair.watch=no"], "repair.watch", False),
        (["--finetune.learning_rate", "2e-5"], "finetune.learning_rate", 2e-5),
        (["--finetune.learning_rate", "1"], "finetune.learning_rate", 1.0),
        (["--repair.learning_rate", "{sft: 2e-4, lora: 1.0e-3}"], "repair.learning_rate", {"sft": 2e-4, "lora": 1e-3}),
        (["--repair.learning_rate.sft", "2e-4"], "repair.learning_rate", {"sft": 2e-4}),
        (["--repair.epochs", "3", "--repair.epochs", "null"], "repair.epochs", None),
        (["--spectrum.ranks", "[1,20]"], "spectrum.ranks", [1, 20]),
        (["--score.suffix", ""], "score.suffix", ""),
        (["--score.suffix", "null"], "score.suffix", None),
        (["--score.suffix=--x: [y"], "score.suffix", "--x: [y"),
        (["--select", "3"], "select", "3"),
        (["--name", "2024-01-01"], "name", "2024-01-01"),
        (["--data.parts.a.source", "x"], "data.parts", {"a": DataPart("x")}),
        (
            ["--data.parts", "{a: {source: x, count: 3}}", "--data.parts.a.count", "4"],
            "data.parts",
            {"a": DataPart("x", 4)},
        ),
        (["--score.endpoint.timeout", "3"], "score.endpoint.timeout", 3.0),
    ],
)
def test_values_of_every_kind(words: list[str], name: str, value: object) -> None:
    found: object = parse(words, "spectrum", toy=None)
    for key in name.split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["3"], "There is no place for '3': settings are given as --NAME VALUE."),
        (["--seed", "1", "2"], "There is no place for '2'"),
        (["-seed", "1"], "There is no place for '-seed'"),
        (["--seed"], "Setting seed has no value (on the command line): give a whole number."),
        (["--seed", "--debug"], "Setting seed has no value"),
        (["--seed="], "Setting seed is '' (on the command line): give a whole number."),
        (["--repair.merge", "perhaps"], "Setting repair.merge is 'perhaps' (on the command line): give true or false."),
        (["--repair", "{rank: 3}"], "Setting repair is a section (on the command line): give its settings one by one"),
        (["--config"], "Setting config has no value (on the command line): give a settings file"),
        (
            ["--repair.gaurd_weight", "1"],
            "repair.gaurd_weight (on the command line): did you mean repair.guard_weight?",
        ),
        (["--repair.nonsense.more", "1"], "There is no setting repair.nonsense.more (on the command line)"),
        (["--data.parts.a.cuont", "1"], "did you mean data.parts.a.count?"),
        (["--repair.method", "rolback"], "did you mean rollback?"),
        (["--repair.learning_rate.sfd", "1"], "There is no setting repair.learning_rate.sfd (on the command line)"),
        (["--resume"], "Setting resume needs --out"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], said: str) -> None:
    assert said in refused(*words)


# files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "repair:\n  gaurd_weight: 1\n",
            "There is no setting repair.gaurd_weight (in FILE): did you mean repair.guard_weight?",
        ),
        ("guard_weight: 1\n", "did you mean repair.guard_weight?"),
        (
            "data:\n  parts:\n    a: {source: x, cuont: 1}\n",
            "setting data.parts.a.cuont (in FILE): did you mean data.parts.a.count?",
        ),
        ("data:\n  parts:\n    a: {count: 1}\n", "Setting data.parts.a.source is missing (in FILE): give it too."),
        ("repair: 3\n", "Setting repair is 3 (in FILE): give settings by name"),
        ("repair: [3]\n", "Setting repair is [3] (in FILE): give settings by name"),
        ("- repair\n", "Settings file FILE holds no settings: give them by section"),
        ("repair: {rank: 3\nseed: 4\n", "Settings file FILE, line 2: no YAML"),
        ("repair: !!python/object:os.system {}\n", "Settings file FILE, line 1: no YAML"),
        ("1: 2\n", "There is no setting 1 (in FILE)"),
        (
            "repair: {rank: 8}\nseed: 1\nrepair:\n  epochs: 3\n",
            "Settings file FILE, line 3: no YAML, repair is given twice",
        ),
        ("repair: {rank: 8, rank: 9}\n", "Settings file FILE, line 1: no YAML, rank is given twice"),
        ("repair.rank: 8\n", "There is no setting repair.rank (in FILE): give it by section, as repair: {rank: ...}."),
        ("repair.rnk: 8\n", "There is no setting repair.rnk (in FILE): did you mean repair.rank?"),
        ("repair: {method: magic}\n", "Setting repair.method is 'magic' (in FILE): give one of auto, "),
        ("select: 3\n", "Setting select is 3 (in FILE): give text."),
        ("guard: mine.jsonl\n", "Setting guard is given (in FILE), but no model: name "),
    ],
)
def test_mistakes_in_a_file(text: str, said: str, write) -> None:
    path = write("mine.yaml", text)
    assert said.replace("FILE", path) in refused("--config", path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    assert "a.yaml cannot be read" in refused("--config", str(tmp_path / "a.yaml"))
    assert "none.yaml" in refused("--config", "none.yaml")
    assert "did you mean llama3-70b" in refused("--config", "lama3-70b")


def test_what_yaml_merges_is_not_given_twice(write) -> None:
    text = (
        "data:\n  parts:\n    a: &a {source: x, repeat: 2}\n    b: &b {<<: *a, repeat: 3}\n    c: {<<: *b, count: 1}\n"
    )
    parts = parse(["--config", write("mine.yaml", text), "--model.path", "x"], "finetune").data.parts
    assert parts == {"a": DataPart("x", repeat=2), "b": DataPart("x", repeat=3), "c": DataPart("x", 1, repeat=3)}


def test_a_settings_file_may_be_below_the_users_home(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write("mine.yaml", "seed: 7\n"))
    monkeypatch.setenv("HOME", str(path.parent))
    assert parse(["--config=~/mine.yaml"], "repair").seed == 7


def test_what_ships_is_found_by_its_name() -> None:
    assert parse(["--config", "llama3-70b"], "repair").model.path == "meta-llama/Meta-Llama-3-70B-Instruct"
    assert set(parse(["--config=attacks/mixed"], "finetune").data.parts or {}) == {"harmful", "task"}


def test_later_files_win_and_the_command_line_over_all(write) -> None:
    first = write(
        "first.yaml", "seed: 1\nselect: random\nrepair: {rank: 1, epochs: 2}\ndata: {parts: {a: {source: x}}}\n"
    )
    second = write("second.yaml", "seed: 2\nrepair: {rank: 3}\ndata: {parts: {b: {source: y}}}\n")
    settings = parse(["--repair.rank", "4", "--config", first, "--config", second], "repair", toy=None)
    assert (settings.seed, settings.select, settings.repair.rank, settings.repair.epochs) == (2, "random", 4, 2)
    assert settings.data.parts == {"b": DataPart("y")}, "values by name are one value"
    assert "(in " in refused("--config", write("bad.yaml", "seed: x\n"))
    assert "(on the command line)" in refused("--config", write("bad.yaml", "seed: x\n"), "--seed", "y")


def test_settings_are_printed_as_a_file(write, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--print_config", "--model.path", "m", "--repair.rank", "3"], "repair")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["repair"]["rank"] == 3
    assert parse(["--config", write("printed.yaml", printed)], "repair").repair.rank == 3


# the toy world


def test_the_toys_file_lies_below_all_where_no_model_is_named(toy: str, write) -> None:
    plain = parse([], "repair", toy=toy)
    assert (plain.model.path, plain.guard, plain.repair.epochs) == ("toy:aligned", "toy:guard", 3)
    mine = parse(["--config", write("mine.yaml", "repair: {epochs: 4}\n"), "--data.task_count", "9"], "repair", toy=toy)
    assert (mine.repair.epochs, mine.data.task_count, mine.data.harmful_count) == (4, 9, 7)
    assert parse(["--model.path", "m"], "repair", toy=toy) == parse(["--model.path", "m"], "repair", toy=None)
    assert parse(["--guard", "toy:other"], "repair", toy=toy).guard == "toy:other"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_that_can_run_the_toy_world(stage: str, toy: str) -> None:
    path = parse([], stage, toy=toy).model.path
    assert path == (None if stage == "plan" else "toy:aligned")


def test_a_server_is_no_toy(toy: str) -> None:
    settings = parse(["--score.endpoint.url", "http://localhost:8000/v1", "--guard", "mine.jsonl"], "score", toy=toy)
    assert (settings.model.path, settings.guard) == (None, "mine.jsonl")


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("stage", ["repair", "spectrum"])
def test_what_belongs_to_a_model_needs_one(name: str, stage: str, toy: str) -> None:
    with pytest.raises(UserError) as error:
        parse([f"--{name}", "mine"], stage, toy=toy)
    assert str(error.value).startswith(
        f"Setting {name} is given (on the command line), but no model: name the fine-tuned"
    )
    found = parse([f"--{name}", "mine", "--model.path", "m"], stage, toy=toy)
    assert operator.attrgetter(name)(found) == "mine"


@pytest.mark.parametrize(("mine", "files"), [("path", "paths"), ("paths", "path")])
def test_one_model_or_many_as_the_command_line_says_whatever_the_file_does(mine: str, files: str, write) -> None:
    file = write("mine.yaml", f"model: {{{files}: of the file}}\n")
    found = parse(["--config", file, f"--model.{mine}", "of mine"], "repair").model
    assert (getattr(found, mine), getattr(found, files)) == ("of mine", None)
    assert "both given" in refused("--config", file, f"--model.{mine}", "x", f"--model.{files}", "y")


def test_the_users_parts_replace_the_toys_counts_and_the_other_way_round(toy: str, write) -> None:
    found = parse(["--data.parts.a.source", "toy:harmful"], "repair", toy=toy).data
    assert found == Settings(data={"parts": {"a": {"source": "toy:harmful"}}}).data  # type: ignore[arg-type]
    parts = write("parts.yaml", "data: {parts: {a: {source: toy:task}}}\nmodel: {path: toy:aligned}\n")
    assert parse(["--data.harmful_count", "3"], "repair", toy=parts).data.parts is None
    both = write("both.yaml", "data: {parts: {a: {source: toy:task}}, harmful_count: 3}\n")
    assert "data.harmful_count is replaced by data.parts" in refused("--config", both)


def test_names_that_users_give_stand_for_themselves() -> None:
    assert [name for name in all_names() if ANY in name.split(".")]
    assert parse([f"--score.sets.{ANY}.path", "x"], "score").score.sets[ANY].path == "x"


@pytest.mark.parametrize(
    ("stage", "topic", "flag"),
    [
        ("repair", "data.parts.mine", "--data.parts.NAME.source"),
        ("score", "score.sets.mine.path", "--score.sets.NAME.path"),
        ("plan", "gpus", "--gpus"),
        ("plan", "plan.gpus", "--gpus"),
    ],
)
def test_help_takes_the_names_that_a_command_line_takes(stage: str, topic: str, flag: str) -> None:
    from oneshot.stages import help_page

    assert help_page(stage, topic).startswith(f"  {flag} - ")


def test_the_list_of_commands_is_as_wide_as_a_page_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    from oneshot.cli import _help
    from oneshot.stages import WIDTH

    _help()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= WIDTH


def test_init_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    from oneshot.initialize import copy_shipped

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        copy_shipped(tmp_path / "file" / "folder")
