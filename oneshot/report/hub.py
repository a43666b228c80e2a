"""A finished run to the Hub: the patch, the repaired checkpoint, and the report without anybody's answers.

The patch becomes the root of the repository, where PEFT looks for it; the checkpoint one of its own, ``REPO-repaired``.
Private unless asked otherwise, and what is marked as safety-degraded stays here unless that is asked for by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, MARKER, is_degraded
from oneshot.checkpoint.disk.seal import check_sealed
from oneshot.checkpoint.writing.identity import read_identity
from oneshot.checkpoint.writing.standing import changed_since
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError, first_line
from oneshot.online import is_offline
from oneshot.redact import redacted
from oneshot.report.markdown import MARKDOWN
from oneshot.report.runfolder import PATCH, REPAIRED, REPORT
from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

BESIDE = "report"  # folder in the repository; the page and answers.jsonl hold answers to attacks, and stay here


_OF_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", MARKER)


@dataclass(frozen=True)
class Push:
    """Where a run is sent, and what is allowed: public for everybody to see; what is marked as degraded, too."""

    repo: str
    public: bool = False
    degraded: bool = False


@dataclass(frozen=True)
class Parcel:
    """What goes into a repository: name in it -> file here."""

    repo: str
    files: dict[str, Path]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def check_push(push: Push, *, dry: bool = False) -> None:
    """Raise UserError where nothing could be sent; nothing is asked of the Hub.

    Args:
        dry: nothing is to be sent, which takes neither a network nor a token
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(push.repo)
        named = push.repo.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UserError(f"{push.repo!r} is no name of a repository on the Hub: give OWNER/NAME.")
    if push.public and push.degraded:
        raise UserError("What is marked as safety-degraded is never made public: leave one of the two out.")
    if dry:
        return
    if is_offline():
        raise UserError(
            "Pushing sends files to the Hub, which --offline (HF_HUB_OFFLINE) forbids: leave one of them out."
        )
    if not get_token():
        raise UserError("There is no token to push with: log in with hf auth login, or set HF_TOKEN.")


def look_ahead(runtime: Runtime, settings: Settings) -> None:
    """Raise UserError before a run begins where its end could not be pushed. Collective."""
    with agree(runtime, "looking where the repair is to be pushed"):
        if runtime.is_main and settings.push_to_hub is not None:
            check_push(Push(settings.push_to_hub, settings.push_public, settings.push_degraded))


def push_finished(runtime: Runtime, settings: Settings, run_dir: Path, console: Console | None) -> None:
    """Push the finished repair, where the settings say so. Collective."""
    with agree(runtime, f"pushing {run_dir}"):
        if runtime.is_main and settings.push_to_hub is not None:
            push = Push(settings.push_to_hub, settings.push_public, settings.push_degraded)
            sent = parcels(run_dir, push)
            addresses = send(sent, push)
            if console:
                text = "\n".join([*listed(sent, push), *(f"Pushed: {address}" for address in addresses)])
                console.print(text, highlight=False, markup=False, soft_wrap=True)


def parcels(run_dir: Path, push: Push) -> list[Parcel]:
    """Return what is to be sent of a finished repair; nothing is sent.

    Raises:
        UserError: it is no finished repair, a folder is not what was written, or is marked and not to be sent so
    """
    if not (run_dir / REPORT).is_file() or not (run_dir / PATCH).is_dir():
        raise UserError(f"{run_dir} is not the folder of a finished repair: give one with {REPORT} and {PATCH}/.")
    found = []
    report = {f"{BESIDE}/{name}": run_dir / name for name in (REPORT, MARKDOWN) if (run_dir / name).is_file()}
    for name, repo in ((PATCH, push.repo), (REPAIRED, f"{push.repo}-{REPAIRED}")):
        folder = run_dir / name
        if not folder.is_dir():
            continue
        if is_degraded(folder) and (push.public or not push.degraded):
            never = "and is never made public" if push.public else "so it is not pushed: add --push_degraded to do it"
            raise UserError(f"{folder} is marked as safety-degraded ({MARKER}), {never}.")
        check_sealed(folder)
        if other := changed_since(folder):
            raise UserError(f"{other}: restore it, or repair again.")
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if _is_sent(p, folder)}
        found.append(Parcel(repo, {**files, **report}))
    return found


def _is_sent(path: Path, folder: Path) -> bool:
    """Whether a file goes along: no hidden one, and no link, which may lead anywhere."""
    inside = path.relative_to(folder).parts
    return path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in inside)


def listed(sent: list[Parcel], push: Push) -> list[str]:
    """Return in sentences what is sent where."""
    who = "public" if push.public else "private"
    lines = []
    for parcel in sent:
        lines.append(f"{parcel.repo} ({who}): {len(parcel.files)} files, {parcel.nbytes / 1e6:.1f} MB")
        lines += [f"  {name} ({path.stat().st_size:,} bytes)" for name, path in parcel.files.items()]
        identity = read_identity(parcel.files[ADAPTER_CONFIG].parent) if ADAPTER_CONFIG in parcel.files else None
        if identity is not None and Path(identity.base).is_absolute():
            lines.append(f"  (its card and config name the base {identity.base}, a folder of this machine)")
    return lines


def send(sent: list[Parcel], push: Push) -> list[str]:
    """Send the parcels, each in one commit; return the addresses of the repositories.

    Raises:
        UserError: the Hub refuses, cannot be reached, or has a public repository where it is to be private
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="oneshot")
    try:
        for parcel in sent:  # all of them before anything is sent
            _made(api, parcel.repo, push)
        return [_sent(api, parcel) for parcel in sent]
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{push.repo} could not be pushed to {api.endpoint} ({redacted(first_line(error))}): check the name, your "
            "token's rights and the network, and push the run folder again with oneshot push."
        ) from error


def _made(api: Any, repo: str, push: Push) -> None:
    """Make the repository; one that is there must be no more public than asked."""
    api.create_repo(repo, private=not push.public, exist_ok=True)
    if not push.public and not api.model_info(repo).private:
        raise UserError(
            f"The repository {repo} exists and is public: make it private, give another name, or ask for a public one "
            "(--push_public)."
        )


def _sent(api: Any, parcel: Parcel) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = [sibling.rfilename for sibling in api.model_info(parcel.repo).siblings or ()]
    # of an earlier push: shards or an index beside other weights, a marker beside a good verdict
    stale = [name for name in there if name not in parcel.files and any(fnmatch(name, kind) for kind in _OF_WEIGHTS)]
    changes: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
    changes += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in parcel.files.items()]
    api.create_commit(parcel.repo, changes, commit_message="A safety repair by oneshot")
    return f"{api.endpoint}/{parcel.repo}"
