"""Settings in layers: what several files and a command line say, one over the other, and where each value was given."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin

from oneshot.errors import UserError
from oneshot.reading import limited, load_yaml
from oneshot.settings.checks import joined, unknown, wrong
from oneshot.settings.kinds import bare, kinds, options, words
from oneshot.settings.names import close_names, kind_at
from oneshot.settings.run import Settings

if TYPE_CHECKING:
    import yaml


@dataclass
class Given:
    """Values that were given, nested as the settings are, and where: full name -> ``in FILE`` or the like."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """Tell where a setting was given; the place of a value is that of all in it."""
        while name and name not in self.places:
            name = name.rpartition(".")[0]
        return f" ({self.places[name]})" if name else ""

    def section(self, name: str) -> dict[str, Any]:
        """Return the values of a section, or of what stands by name in one, to be read or changed."""
        found = self.values
        for key in name.split(".") if name else ():
            if not isinstance(found.get(key), dict):
                found[key] = {}
            found = found[key]
        return found


def lay_file(given: Given, path: Path) -> None:
    """Lay what a settings file holds over the values given.

    Raises:
        UserError: it cannot be read, is no YAML, or names a setting that there is not
    """
    import yaml

    try:
        with limited(f"Settings file {path}"):
            loaded = load_yaml(path.read_text(encoding="utf-8"), _loader())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"Settings file {path} cannot be read: {' '.join(str(error).split())}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"Settings file {path}{line}: no YAML, {problem}; mend it.") from error
    if loaded is not None and not isinstance(loaded, Mapping):
        raise UserError(f"Settings file {path} holds no settings: give them by section, such as 'repair: {{rank: 8}}'.")
    _lay(given, loaded or {}, f"in {path}", Settings, "")


def _lay(given: Given, values: Mapping[Any, Any], place: str, section: Any, name: str) -> None:
    """Lay a section's values over those given: nested sections field by field, everything else as a whole."""
    target = given.section(name)
    for key, value in values.items():
        full, kind = joined(name, str(key)), kinds(section).get(key)
        if kind is None:
            raise _unknown(full, place)
        if not dataclasses.is_dataclass(kind):
            target[key] = value
            given.places[full] = place
        elif value is None or isinstance(value, Mapping):
            _lay(given, value or {}, place, kind, full)
        else:
            raise wrong(full, value, words(kind), [], lambda _: f" ({place})")


def _unknown(name: str, place: str) -> UserError:
    """The error for a name that a settings file cannot have: there is none, or the command line alone writes it so."""
    if kind_at(name) is None:
        return unknown(name, close_names(name), lambda _: f" ({place})")
    section, _, last = name.rpartition(".")
    nested = ": {".join([*section.split("."), last]) + ": ..." + "}" * name.count(".")
    return UserError(f"There is no setting {name} ({place}): give it by section, as {nested}.")


def from_text(kind: Any, text: str) -> Any:
    """Return what a word of the command line stands for: a text where the setting may be one, else YAML."""
    bases = [bare(option)[0] for option in options(kind)]
    is_text = any(base is str or get_origin(base) is Literal for base in bases)
    if not text.strip() or (is_text and not (text == "null" and type(None) in bases)):
        return text
    import yaml

    try:
        return load_yaml(text, _loader())
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


@lru_cache
def _loader() -> Any:
    """YAML as its version 1.2 has numbers: 2e-5 is one. Builds plain values only, no objects, and loses none."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_document(self, node: yaml.Node) -> Any:
            _refuse_twice(node, set())  # before merges are written out, which a mapping's own keys go over
            return super().construct_document(node)

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{number.pattern})$"), list("-+.0123456789")
    )
    return Loader


def _refuse_twice(node: yaml.Node, seen: set[int]) -> None:
    """Raise YAMLError where a name stands twice in one mapping: yaml itself takes the last, and drops the others.

    Args:
        seen: nodes that were looked at, by another alias
    """
    import yaml

    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, seen)
        return
    names = set[str]()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in names:
            raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
        names |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        _refuse_twice(value, seen)


def over(section: Any, value: Any) -> Any:
    """A value over the one that is there: of a section, and of one in it, what is not given stays."""
    if not (dataclasses.is_dataclass(section) and isinstance(value, Mapping)):
        return value
    there = dict(fields_of(section))
    return {**there, **{name: over(there.get(name), given) for name, given in value.items()}}


def named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings in a section by their full names; of an instance those that differ from its defaults."""
    kind = kind_at(name)
    if kind is None or not dataclasses.is_dataclass(kind) or value is None:
        yield name, value
        return
    section: Any = kind
    if dataclasses.is_dataclass(value) and not isinstance(value, section):
        raise UserError(f"Setting {name} is {type(value).__name__}(...): give a dict, or an instance of its class.")
    default = dict(fields_of(section()))
    for key, given in fields_of(value):
        if isinstance(value, Mapping) or given != default[key]:
            yield from named(f"{name}.{key}", given)


def fields_of(section: Any) -> Iterator[tuple[str, Any]]:
    """Yield (field, value) of a section, given as a dict or an instance; UserError for anything else."""
    if isinstance(section, Mapping):
        yield from section.items()
    elif dataclasses.is_dataclass(section):
        yield from ((field.name, getattr(section, field.name)) for field in dataclasses.fields(section))
    else:
        raise UserError(f"{section!r} is no section of settings: give a dict, or an instance of its class.")
