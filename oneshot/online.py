"""Going online: it is said before it is done, and ``--offline`` forbids it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from oneshot.shown import one_line

# what huggingface_hub, transformers and datasets look at
_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "ONESHOT_OFFLINE")


def go_offline(asked: bool) -> None:
    """Have nothing be fetched by this process, where that is asked: what is in the Hub's cache and ours is used."""
    for name in _VARIABLES if asked else ():
        os.environ[name] = "1"
    for module, constant in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_DATASETS_OFFLINE"),
    ):
        if asked and module in sys.modules:  # it has looked at the environment already
            setattr(sys.modules[module], constant, True)


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
