"""Going online: it is said before it is done, and ``--offline`` forbids it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from oneshot.shown import one_line

# what huggingface_hub, transformers and datasets look at
_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "ONESHOT_OFFLINE")
# and what they have made of it once they are loaded: module and name
_CONSTANTS = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),  # until datasets 2
)


def go_offline(asked: bool) -> None:
    """Have nothing be fetched by this process, where that is asked: what is in the Hub's cache and ours is used."""
    for name in _VARIABLES if asked else ():
        os.environ[name] = "1"
    for module, constant in _CONSTANTS if asked else ():
        if module in sys.modules:  # it has looked at the environment already
            setattr(sys.modules[module], constant, True)


@contextlib.contextmanager
def going_offline(asked: bool) -> Iterator[None]:
    """``go_offline`` for the block alone: after a call from Python another one may fetch."""
    if not asked:
        yield
        return
    from huggingface_hub import constants

    variables = {name: os.environ.get(name) for name in _VARIABLES}
    # what is loaded within the block looks at the environment there
    otherwise = constants.HF_HUB_OFFLINE
    before = {place: getattr(sys.modules.get(place[0]), place[1], otherwise) for place in _CONSTANTS}
    go_offline(True)
    try:
        yield
    finally:
        for name in _VARIABLES:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in variables.items() if value is not None})
        for (module, constant), value in before.items():
            if module in sys.modules:
                setattr(sys.modules[module], constant, value)


def is_offline(variable: str = "HF_HUB_OFFLINE") -> bool:
    """Return whether fetching is forbidden, by ``--offline`` or by huggingface_hub's own variable.

    Args:
        variable: ONESHOT_OFFLINE for what is not on the Hub, of which ``--offline`` alone speaks
    """
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def say_fetching(what: str, name: str, *, revision: str | None = None, named_by: Path | None = None) -> None:
    """Say on stderr, of rank 0, what is about to be fetched from where, unless nothing may be.

    Args:
        what: such as base model
        name: its Hub id
        revision: of it, where one is asked for
        named_by: the file that asks for it, where the user did not
    """
    if is_offline() or os.environ.get("RANK", "0") != "0":
        return
    from huggingface_hub import constants, get_token

    at = f" at revision {revision}" if revision else ""
    by = f", which {named_by} names" if named_by else ""
    token = "with your token" if get_token() else "without a token"
    print(
        one_line(f"Fetching the {what} {name}{at}{by}, from {constants.ENDPOINT} {token} (--offline forbids it)."),
        file=sys.stderr,
        flush=True,
    )
