"""From a command line to settings, and to a stage that runs with them.

Settings come in layers: what the dataclasses say, for the toy world its file, the files of ``--config`` in their order,
and the command line. All are checked by the settings' own rules (``oneshot.settings.checks``); what is added here is
where a wrong value was given.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from oneshot.errors import EXIT_USER, UserError
from oneshot.online import go_offline
from oneshot.settings import Settings, to_dict
from oneshot.settings.checks import built, joined, listed, unknown
from oneshot.settings.data import REPLACED
from oneshot.settings.kinds import kinds, options, words
from oneshot.settings.layers import Given, from_text, lay_file
from oneshot.settings.names import close_names, kind_at
from oneshot.shipped import settings_file
from oneshot.stages import STAGES, help_page, readers, reads

TOY = "toy"  # settings that ship for the toy world
OWN = (  # the user's, for a model of the user's
    "model.base", "model.revision", "model.base_revision", "reference", "reference_revision", "guard", "watch_prompts",
    "example", "pool",
)  # fmt: skip
_COMMAND_LINE = "on the command line"


@dataclass(frozen=True)
class _Read:
    """What a command line says: files, settings (full name -> value), and what is asked in place of a run."""

    files: list[str]
    values: dict[str, Any]
    help: bool
    topic: str | None
    print_config: bool


def parse(argv: list[str] | None, stage: str, toy: str | Path | None = TOY) -> Settings:
    """Return the settings that a command line gives to a stage.

    ``--help`` and ``--print_config`` print and leave the process with exit code 0.

    Args:
        argv: the words after the stage's name; none: those of this process
        stage: one of ``oneshot.stages.STAGES``
        toy: settings file of the toy world, or the name of one that ships, below all others where a stage can run
            without a model and none is named; none: no such file

    Raises:
        UserError: an unknown setting, a wrong value or a missing file, named in the message; a setting on the command
            line that this stage does not read (a file, which describes a whole run, may hold it)
    """
    read = _read(sys.argv[1:] if argv is None else argv, stage)
    if read.help:
        print(help_page(stage, read.topic), end="")
        sys.exit(0)
    settings = layered(stage, read.files, read.values, _COMMAND_LINE, toy)
    if read.print_config:
        import yaml

        print(yaml.safe_dump(to_dict(settings), sort_keys=False), end="")
        sys.exit(0)
    return settings


def layered(
    stage: str, files: Sequence[str], values: Mapping[str, Any], place: str, toy: str | Path | None = TOY
) -> Settings:
    """Return the settings that files and values over them give to a stage.

    Args:
        stage, toy: as in ``parse``
        files: settings files, or names of ones that ship; the later wins
        values: full name -> value, over all files
        place: where the values were given, for messages

    Raises:
        UserError: as ``parse``
    """
    for one, other in (("model.paths", "model.path"), ("model.path", "model.paths")):
        if values.get(one) is not None and other not in values:
            values = {**values, other: None}  # a file's
    given = _laid(files, values, place)
    paths = given.section("model").get("paths")
    if paths is not None and stage != "repair":
        raise UserError(f"Setting model.paths is for oneshot repair, not {stage}: name one model with --model.path.")
    if lacks_model(stage, given.section("model").get("path") or paths, given.section("score.endpoint").get("url")):
        _refuse_own(given)
        if toy is not None:
            given = _laid(files, values, place, settings_file(str(toy)), _replaced(given))
    from oneshot.patch.recipe import check_names

    settings = built(Settings, given.values, "", given.where)
    check_names(settings.repair.method, settings.repair.learning_rate, given.where)
    return settings


def run_stage(argv: list[str] | None, stage: str, run: Callable[[Settings], object]) -> None:
    """Run a stage with the settings of its command line, and leave the process with the right exit code.

    Args:
        argv: as in ``parse``
        stage: as in ``parse``
        run: the stage
    """
    from oneshot.distributed.stage import end_with, fail

    prog = f"oneshot {stage}"
    try:
        settings = parse(argv, stage)
    except UserError as error:
        fail(prog, str(error), EXIT_USER, debug=False)
    go_offline(settings.offline)
    end_with(prog, lambda: run(settings), hang_minutes=settings.hang_minutes, debug=settings.debug)


def spoken(stage: str, argv: list[str] | None) -> str:
    """Return a stage's command as it was given, for its report.

    Args:
        argv: as in ``parse``
    """
    return shlex.join(["oneshot", stage, *(sys.argv[1:] if argv is None else argv)])


class CommandParser(argparse.ArgumentParser):
    """The parser of a command with arguments of its own: what is wrong with them is a user's mistake like any other.

    All have ``--debug``, which ``run_command`` heeds.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="full tracebacks")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(argv: list[str] | None, prog: str, run: Callable[[list[str]], None]) -> None:
    """Run a command that parses its own arguments as a stage is run; ``--debug`` among them shows tracebacks."""
    from oneshot.distributed.stage import end_with

    given = sys.argv[1:] if argv is None else argv
    end_with(prog, lambda: run(given), hang_minutes=Settings().hang_minutes, debug="--debug" in given)


def _read(argv: list[str], stage: str) -> _Read:
    files: list[str] = []
    values: dict[str, Any] = {}
    asked: dict[str, Any] = {"help": False, "topic": None, "print_config": False}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("--help", "-h"):
            topic = rest.pop(0) if not equals and rest and not rest[0].startswith("--") else value
            asked |= {"help": True, "topic": topic or None}
        elif flag == "--print_config":
            asked["print_config"] = True
        elif not flag.startswith("--") or flag == "--":
            raise UserError(f"There is no place for {word!r}: settings are given as --NAME VALUE.")
        elif flag == "--config":
            files.append(value if equals else _following(rest, flag, "a settings file, or the name of one that ships"))
        else:
            name = _own_name(flag.removeprefix("--"), stage)
            kind = known_kind(name, stage)
            if not equals and bool in options(kind) and (not rest or rest[0].startswith("--")):
                values[name] = True
            else:
                values[name] = from_text(kind, value if equals else _following(rest, flag, words(kind)))
    return _Read(files, values, **asked)


def _own_name(name: str, stage: str) -> str:
    own = STAGES[stage].own
    return joined(own, name) if own is not None and name in kinds(kind_at(own)) else name


def known_kind(name: str, stage: str, place: str = _COMMAND_LINE) -> Any:
    """Return the kind of a setting.

    Args:
        name: in full
        place: where it was given, for messages

    Raises:
        UserError: there is no such setting, the stage does not read it, or it is a whole section
    """
    kind = kind_at(name)
    if kind is None:
        own = STAGES[stage].own
        close = (close_names(joined(own, name)) if own else []) or close_names(name)
        mine = [one for one in close if reads(stage, one)]
        raise unknown(name, mine or close, lambda _: f" ({place})")
    if not reads(stage, name):
        others = listed([f"oneshot {other}" for other in readers(name)], "and")
        raise UserError(
            f"Setting {name} is not for oneshot {stage} but for {others}: leave it out, or keep it in a --config file, "
            "which may describe a whole run."
        )
    if dataclasses.is_dataclass(kind):
        first = joined(name, next(iter(kinds(kind))))
        raise UserError(f"Setting {name} is a section ({place}): give its settings one by one, as --{first}.")
    return kind


def _following(rest: list[str], flag: str, wanted: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise UserError(f"Setting {flag.removeprefix('--')} has no value ({_COMMAND_LINE}): give {wanted}.")
    return rest.pop(0)


def _laid(
    files: Sequence[str], values: Mapping[str, Any], place: str, toy: Path | None = None, replaced: Sequence[str] = ()
) -> Given:
    """Lay files and values over each other.

    Args:
        toy: the file below all others
        replaced: settings in it that do not count
    """
    given = Given()
    if toy is not None:
        lay_file(given, toy)
        for name in replaced:
            given.section("data").pop(name, None)
    for file in files:
        lay_file(given, settings_file(file))
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        given.section(section)[last] = value
        given.places[name] = place
    return given


def lacks_model(stage: str, path: str | None, url: str | None) -> bool:
    """Whether a stage that can run the toy world is given neither a model nor, for score, a server."""
    return STAGES[stage].toy and path is None and not (stage == "score" and url is not None)


def _refuse_own(given: Given) -> None:
    from oneshot.world.sources import is_toy

    for name in OWN:
        section, _, last = name.rpartition(".")
        value = given.section(section).get(last)
        if value is not None and not is_toy(str(value)):
            raise UserError(
                f"Setting {name} is given{given.where(name)}, but no model: name the fine-tuned checkpoint or adapter "
                f"with --model.path, or leave {name} out to run the toy world."
            )


def _replaced(given: Given) -> Sequence[str]:
    """Return the data settings of the toy world that do not go with the user's."""
    data = given.section("data")
    if data.get("parts") is not None:
        return REPLACED
    return ("parts",) if any(data.get(name) is not None for name in REPLACED) else ()
