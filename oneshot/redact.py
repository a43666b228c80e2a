"""Keys and tokens are struck out of every text that is written for people or programs to keep.

The settings hold none: a server's key is named by an environment variable. But users paste keys into addresses,
commands and names, and libraries put them into their messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

STRUCK = "[secret]"
SHORTEST = 12  # characters of a variable's value: shorter ones are switches and names, which occur in any text
_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKENS?|KEYS?|APIKEY|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?)(?:_|$)"
    r"|_(?:PAT|PWD|PW|AUTH)(?:_|$)",  # by itself PWD is where one is
    re.IGNORECASE,
)
# The forms in which well-known services hand out keys, which are told from other text by their prefix.
_FORMS = re.compile(
    r"""
    (?<![A-Za-z0-9_-])(?:
      hf_[A-Za-z0-9]{16,} | api_org_[A-Za-z0-9]{16,} | sk[-_](?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}
      | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,} | glpat-[A-Za-z0-9_-]{16,}
      | xox[abeprs]-[A-Za-z0-9-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[A-Za-z0-9_-]{30,} | gsk_[A-Za-z0-9]{20,}
      | nvapi-[A-Za-z0-9_-]{20,} | wandb_v\d_[A-Za-z0-9_]{16,}
      | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+
    )
    """,
    re.VERBOSE,
)
# Words around a secret that stay, so that one sees what was struck out, and the secret.
_PLACES = (
    # user:password@host, to the last @: people put slashes and @ into passwords. Without a colon, up to the path
    re.compile(r"(?P<kept>[a-z][a-z0-9+.-]{0,20}://)[^\s/@:\"]{0,256}:[^\s\"]{1,512}(?=@)", re.IGNORECASE),
    re.compile(r"(?P<kept>[a-z][a-z0-9+.-]{0,20}://)[^\s/@\"]{1,512}(?=@)", re.IGNORECASE),
    re.compile(
        r"(?P<kept>[?&](?:[a-z_-]{0,20}(?:key|token|secret|password|signature)|sig)=)[^\s&#\"'<>]{1,4096}",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<kept>\bbearer\s+)(?=[A-Za-z._~+/-]*\d)[A-Za-z0-9._~+/-]{16,}=*", re.IGNORECASE),
)


def redacted(text: str) -> str:
    """Return the text without keys and tokens: ``[secret]`` stands in their places.

    Struck out are the values of environment variables that are named like a secret (HF_TOKEN, OPENAI_API_KEY, ...),
    what looks like a key of a well-known service, passwords in addresses, and bearer tokens.
    """
    return _struck(text, _environment())


def without_secrets(value: Any) -> Any:
    """Return nested dicts and lists with every string in them, keys of dicts too, ``redacted``.

    The environment is looked at once for all of them.
    """
    secrets = _environment()

    def struck(value: Any) -> Any:
        if isinstance(value, str):
            return _struck(value, secrets)
        if isinstance(value, Mapping):
            return {struck(key) if isinstance(key, str) else key: struck(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [struck(item) for item in value]
        return value

    return struck(value)


def _struck(text: str, secrets: list[str]) -> str:
    for value in secrets:
        text = text.replace(value, STRUCK)
    if ":" in text or "=" in text or "earer" in text.lower():  # what every one of these places has
        for place in _PLACES:
            text = place.sub(lambda found: found["kept"] + STRUCK, text)
    return _FORMS.sub(STRUCK, text)


def _environment() -> list[str]:
    """Values of variables that hold a secret by their names, the longest first; paths to key files are none."""
    found = {os.environ.get(name, "") for name in os.environ if _secret_by_name(name)}
    secrets = (value for value in found if len(value) >= SHORTEST and not os.path.exists(value))
    return sorted(secrets, key=len, reverse=True)


@lru_cache(maxsize=4096)
def _secret_by_name(name: str) -> bool:
    return _VARIABLE.search(name) is not None
