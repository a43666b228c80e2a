"""Kill commands with SIGKILL at random moments, all their processes at once, and look at what they leave.

``python tests/faults/kills.py --count 60 --seed 0`` (``make kills N=60``) prints a table, and what repeats each bad
outcome. Whatever the moment: no folder with weights that come from a degraded model is without its marker, unless a
good verdict on it is published; ``verify`` passes no folder that is not whole; nothing stands in the way of the rerun
(with ``--resume`` where the run had begun), which comes to what the run comes to that nobody kills; and nothing else
stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "unit"), str(TESTS / "faults")]

import fuzz  # noqa: E402
import kills_world as world  # noqa: E402

from oneshot.checkpoint.disk.files import MARKER, is_adapter, is_degraded  # noqa: E402
from oneshot.checkpoint.disk.folders import PARTIAL  # noqa: E402
from oneshot.checkpoint.writing.standing import GOOD, VERDICT, read_standing, why_not_as_measured  # noqa: E402
from oneshot.measure.cache import RESPONSES  # noqa: E402
from oneshot.reading import sha256_of  # noqa: E402

# share of a command's time, or of its changes of the disk, that goes before
MOMENTS = {
    "any time": 0.0, "last third": 2 / 3, "after a new name": 0.0, "after a late new name": 2 / 3,
    "before a change": 0.0, "before a late change": 2 / 3, "before one of the last changes": 0.9,
}  # fmt: skip
SETTLED = (VERDICT, MARKER, "README.md")  # what changes in a folder once there is a verdict
# hold seconds, dates, or --resume
TIMES = ("report.json", "report.html", "report.md", "events.jsonl", "profile.json", "settings.yaml")
RERUN = 3.0  # a rerun may take so many times as long as the first run, and SLACK seconds: this machine has others
SLACK = 30.0


@dataclass
class Whole:
    """What an uninterrupted run of a kind comes to.

    Attributes:
        seconds: that it takes
        changes: how often its first process changes the disk
        names: how many names appear in its place, as seen from outside
        files: its files, and their hashes where these are the same each time
        outcome: its verdict, or rates
    """

    seconds: float
    changes: int
    names: int
    files: dict[str, str]
    outcome: Any


HEADS = ["nothing", "answers", "half a folder", "marked", "unmarked, good", "finished", "BAD"]


def reference(kind: world.Kind, place: Path) -> Whole:
    """Run a kind to its end."""
    counted = place.with_name(f"{place.name}.changes")
    running = world.start(kind, place, counted=counted)
    names: set[tuple[str, int]] = set()
    while not running.ended():
        names |= set(entries(place))
        time.sleep(world.LATENCY)
    ended = running.wait()
    assert ended.code == 0, ended.said
    assert not kind.goes_on or has_ended(kind, place), ended.said
    changes = int(counted.read_text()) if counted.exists() else 0
    return Whole(ended.seconds, changes, len(names), hashes(place), outcome_of(kind, place))


def entries(place: Path) -> Iterator[tuple[str, int]]:
    """Every name in a place, with the number of what bears it: something that is renamed over another is new."""
    with contextlib.suppress(OSError), os.scandir(place) as found:
        for entry in found:
            with contextlib.suppress(OSError):
                yield entry.path, entry.inode()
                if entry.is_dir(follow_symlinks=False):
                    yield from entries(Path(entry.path))


def hashes(place: Path) -> dict[str, str]:
    """The files in a place with their hashes; "" of those that hold times."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): "" if path.name in TIMES else sha256_of(path) for path in files}


def outcome_of(kind: world.Kind, place: Path) -> Any:
    """What a finished run comes to: verdict, doubts and rates."""
    if not kind.goes_on:
        return None
    report = json.loads((place / kind.out / "report.json").read_text())
    return [report.get("outcome", {}).get("headline"), report["stages"]]


# --- killing


def killed(draw: random.Random, kind: world.Kind, whole: Whole, place: Path, *, resume: bool) -> str:
    """Start a kind, kill it at a moment that is drawn, and return which moment that was."""
    moments = [moment for moment in MOMENTS if whole.changes or not moment.startswith("before")]
    moment = draw.choice(moments)
    share = draw.uniform(MOMENTS[moment], 1.0)
    change = math.ceil(share * whole.changes) if moment.startswith("before") else 0
    name = math.ceil(share * whole.names) if moment.startswith("after") else 0
    after = share * whole.seconds
    running = world.start(kind, place, resume=resume, at_change=change)
    seen: set[tuple[str, int]] = set(entries(place))
    appeared, began = 0, time.monotonic()
    while not running.ended():
        if name:
            found = set(entries(place)) - seen
            appeared, seen = appeared + len(found), seen | found
            if appeared >= name:
                break
        elif not change and time.monotonic() - began >= after:
            break
        time.sleep(world.LATENCY if name else 0.002)
    running.kill()
    return f"{moment} ({change or name or round(after, 3)}, of {whole.changes} changes, {whole.names} names)"


# --- what was left


def problems_of(kind: world.Kind, whole: Whole, place: Path) -> tuple[str, list[str]]:
    """Look at every folder with weights in a place; return in a word what there was, and what is wrong."""
    state, bad = "nothing", []
    folders = sorted({path.parent for path in place.rglob("*.safetensors")})
    for folder in folders:
        name = folder.name.split(".")[0]
        if name not in kind.made:  # a training state, which no command takes for a model
            continue
        half, marked = folder.name.endswith(PARTIAL), is_degraded(folder)
        state = "half a folder" if half else "marked" if marked and state != "half a folder" else state
        if not marked and (why := _why_unsafe(kind, whole, folder, half)):
            bad.append(f"{folder.relative_to(place)} has no marker: {why}")
        if state == "nothing":
            state = "unmarked, good"
        bad += _verified(whole, place, folder, half)
    if any(path.stat().st_size for path in place.rglob(RESPONSES)):
        state = "answers"
    if kind.goes_on and (place / kind.out / "report.json").exists():
        state = "finished"
    return state, bad


def _why_unsafe(kind: world.Kind, whole: Whole, folder: Path, half: bool) -> str:
    """Why a folder without a marker should have one; "" for none."""
    if kind.made[folder.name.split(".")[0]]:
        return "what it holds is not safe"
    if not kind.goes_on:  # an export that lifts the marker of what a repair has measured
        return "it is half written" if half and not _has_all(folder, whole) else ""
    standing = read_standing(folder) if (folder / VERDICT).is_file() else None
    if standing is None or standing.outcome not in GOOD or standing.partly:
        return f"its verdict is {standing}"
    if is_adapter(folder) and kind.model is not None and not half:
        return why_not_as_measured(folder, folder.parents[1] / kind.model, "original")
    return ""


def _has_all(folder: Path, whole: Whole) -> bool:
    """Whether an export's half folder holds the weights as they come to be: its marker goes before its name does."""
    wanted = {found for path, found in whole.files.items() if path.endswith(".safetensors")}
    return {sha256_of(path) for path in folder.glob("*.safetensors")} == wanted


def _verified(whole: Whole, place: Path, folder: Path, half: bool) -> list[str]:
    """What is wrong with what ``oneshot verify`` says of a folder."""
    said = fuzz.run(["verify", str(folder)])
    name = str(folder.relative_to(place))
    if said.code not in (0, 1):
        return [f"verify {name} ended with {said.code}: {said.err[-300:]}"]
    if said.code == 1:
        return [] if half else [f"{name} has its name and is not whole: {(said.out + said.err)[-500:]}"]
    final = str(folder.relative_to(place).with_name(folder.name.split(".")[0]))
    wanted = {
        path.removeprefix(f"{final}/"): found
        for path, found in whole.files.items()
        if path.startswith(f"{final}/") and path.removeprefix(f"{final}/") not in SETTLED
    }
    found = {path: one for path, one in hashes(folder).items() if path not in SETTLED and not path.startswith(".")}
    differ = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    return [f"verify passes {name}, in which {differ} are not as they should be"] if differ else []


def cut(draw: random.Random, place: Path) -> bool:
    """Cut the last row of the answers at random, as a machine that goes down may; whether there was one."""
    path = next(iter(place.rglob(RESPONSES)), None)
    raw = path.read_bytes() if path else b""
    if path is None or not raw or draw.random() < 0.5:
        return False
    last = raw.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(raw[: draw.randint(last, len(raw) - 1)])
    return True


# --- going on


def gone_on(kind: world.Kind, whole: Whole, place: Path) -> list[str]:
    """Run a killed kind again, unless it had ended, and return what is wrong with what it comes to."""
    bad = []
    if not has_ended(kind, place):
        ended = world.run(kind, place, resume=goes_on(kind, place))
        if ended.code != 0:
            return [f"the rerun ended with {ended.code}: {ended.said[-600:]}"]
        if "waiting up to" in ended.said or ended.seconds > RERUN * whole.seconds + SLACK:
            bad.append(f"the rerun had to wait ({ended.seconds:.0f} s for {whole.seconds:.0f}): {ended.said[-600:]}")
        left = sorted(hashes(place).keys() - whole.files.keys())
        bad += [f"the rerun leaves {left} behind"] if left else []
    if outcome_of(kind, place) != whole.outcome:
        bad.append(f"the rerun's outcome is {outcome_of(kind, place)} and should be {whole.outcome}")
    found = hashes(place)
    if kind.words[0] == "score":
        bad += _rows(place, whole, found)
    differ = [path for path, one in whole.files.items() if found.get(path) != one and Path(path).name != RESPONSES]
    return [*bad, *([f"the rerun's {differ} are not as they should be"] if differ else [])]


def has_ended(kind: world.Kind, place: Path) -> bool:
    """Whether a run was killed after its last act."""
    last = place / kind.out / ("report.json" if kind.goes_on else "put")
    return last.exists()


def goes_on(kind: world.Kind, place: Path) -> bool:
    """Whether the rerun is to be told to go on: of a folder that holds a begun run."""
    return kind.goes_on and (place / kind.out / "settings.yaml").exists()


def _rows(place: Path, whole: Whole, found: dict[str, str]) -> list[str]:
    """What is wrong with the answers of a server on disk."""
    (path,) = place.rglob(RESPONSES)
    lines = path.read_text().split("\n")
    bad, keys = [], []
    for line in lines[:-1]:
        try:
            keys.append(json.loads(line)["key"])
        except (ValueError, LookupError):
            bad.append(f"a row of {RESPONSES} is cut: {line[:80]!r}")
    bad += [f"{RESPONSES} has rows twice"] if len(keys) > len(set(keys)) else []
    bad += [f"{RESPONSES} does not end with a line"] if lines[-1] else []
    rows = json.loads((place / "run" / "report.json").read_text())["stages"]["model"]
    number = max(rate["n"] for rate in rows.values())
    return [*bad, *([f"{RESPONSES} has {len(keys)} rows"] if len(keys) < number else [])]


# --- all of it


def attempt(draw: random.Random, kind: world.Kind, whole: Whole, place: Path) -> tuple[str, list[str], str]:
    """Kill a kind once, and now and then its rerun, too; return what it left, what is bad, and how to say when."""
    said = [killed(draw, kind, whole, place, resume=False)]
    state, bad = problems_of(kind, whole, place)
    if draw.random() < 0.3 and not has_ended(kind, place):
        said.append(killed(draw, kind, whole, place, resume=goes_on(kind, place)))
        bad += problems_of(kind, whole, place)[1]
    if kind.words[0] == "score" and not has_ended(kind, place) and cut(draw, place):
        said.append("the last row cut")
    return state, bad + gone_on(kind, whole, place), ", then ".join(said)


def kill(root: Path, count: int, seed: int, only: str = "", first: int = 0) -> fuzz.Tally:
    """Kill so many runs, one after the other, and tally what was left; what is bad is printed at once."""
    tally, wholes = fuzz.Tally(), {}
    with world.served() as url:
        kinds = world.build(root, url, only)
        names = list(kinds)
        for number in range(first, first + count):
            draw = random.Random(f"{seed} {number}")
            name = names[number % len(names)]
            kind, place = kinds[name], root / "place"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            os.environ["XDG_CACHE_HOME"] = str(root / f"cache-{number}")
            if name not in wholes:
                wholes[name] = reference(kind, place)
                shutil.rmtree(place)
                place.mkdir()
            state, bad, when = attempt(draw, kind, wholes[name], place)
            tally.counts[name, "BAD" if bad else state] += 1
            tally.bad += [f"seed {seed} number {number}: {name}, {when}: {problem}" for problem in bad]
            for problem in bad:
                print(f"seed {seed} number {number}: {name}, {when}: {problem}", flush=True)
            if number % 20 == 19:  # a long run may be cut short
                print(fuzz.table(tally, HEADS), flush=True)
    return tally


def main() -> None:
    """Kill as the command line says; exit code 1 if anything was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first, to go on or to repeat one")
    parser.add_argument("--only", default="", help="kinds whose names match this pattern")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    # not TemporaryDirectory, which would be removed at the exit of every fork
    made = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    root = made / "root"  # logs are beside it
    root.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    began, starter = time.monotonic(), os.getpid()
    try:
        preload()
        tally = kill(root, options.count, options.seed, options.only, options.first)
    finally:
        if os.getpid() == starter:
            shutil.rmtree(made, ignore_errors=True)
    print(fuzz.table(tally, HEADS))
    print(f"{options.count} kills in {time.monotonic() - began:.0f} s, {len(tally.bad)} bad")
    sys.exit(bool(tally.bad))


def preload() -> None:
    """Import what the commands import, so that their forks need not."""
    import accelerate
    import httpx2
    import peft
    import torch
    import transformers

    from oneshot.patch import solve
    from oneshot.report import exports, show
    from oneshot.training import finetune

    assert all((accelerate, exports, finetune, httpx2, peft, show, solve, transformers))
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
