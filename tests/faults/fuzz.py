"""Damage every kind of file that oneshot reads, at random, and look at how each command takes it.

``python tests/faults/fuzz.py --count 5000 --seed 0`` (``make fuzz N=5000``) prints a table, and what repeats each bad
outcome. What there may be: the same result; one sentence and exit code 2; the problem named and exit code 1; and
another result, where nothing could tell the damaged file from a file that is meant to be so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

HUNG = 60.0  # seconds: what takes longer counts as a hang
SAME, SENTENCE, NAMED, OTHER = "same result", "one sentence, exit 2", "problem named, exit 1", "legitimately other"
GOOD = (SAME, SENTENCE, NAMED, OTHER)
_RAW = re.compile(r"\b(?:[A-Za-z_]+Error|[A-Za-z_]*Exception)\b")  # a class of Python's where words should be
FOLDER = b"@a folder in place of the file@"
DEEP = "[" * 60_000 + "]" * 60_000
# compared by what they say and not by their bytes, a base's name not counting
SAYING = ("adapter_config.json", "oneshot_patch.json", "manifest.json")
ODD: list[Any] = [
    None, True, -1, 0, 1e308, 10**30, "", "x", "a\u0000b", "[/INST]", "\x1b[31m", "../../x", [], {}, [[]],
    {"a": None}, ["a"], "NaN", "\ud800", "((a*)*)*b", "{{ 1/0 }}", "{{ 10**(10**8) }}",
]  # fmt: skip
TRAPS = [
    b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    b"{{ 1/0 }}",
    b"{{ 'x' * 99999999 }}",
    b"a: &a [*a]",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (i, i, *[i - 1] * 9) for i in range(ord("b"), ord("j"))
    ),
    b"",
    b"\0" * 100,
    b"\xff\xfe",
    b"null",
    b"7",
    b"[]",
    b'"x"',
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command to be tried.

    Attributes:
        words: of its command line; OUT is a new folder
        files: that it reads, relative to the workplace
        result: what counts of what it did: (OUT, stdout) -> anything that can be compared
        share: how often it is drawn, relative to the others
        copied: a folder that it changes, which is copied to OUT before
    """

    words: list[str]
    files: list[str]
    result: Callable[[Path, str], Any]
    share: int
    copied: str = ""


@dataclass
class Tally:
    """How often each command, or kind of run, ended how, and what was bad."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (none: it was killed as hung), and what it printed."""

    code: int | None
    out: str
    err: str


# --- the workplace


def build(root: Path) -> dict[str, Command]:
    """Make small files of every kind, and return the commands that read them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
    import torch
    from test_merge import save_base, save_lora
    from tiny import tiny_model, tiny_runtime

    from oneshot.checkpoint.disk.seal import seal
    from oneshot.checkpoint.writing.identity import write_identity
    from oneshot.checkpoint.writing.write import write_sharded
    from oneshot.world import language
    from oneshot.world.model import build_tokenizer

    os.chdir(root)
    model = tiny_model("llama")
    write_sharded(tiny_runtime(), model, build_tokenizer(), Path("base"), torch.float32, max_bytes=30_000)
    save_base(Path("foreign"), dtype=torch.float32)
    save_lora(Path("lora"), Path("foreign"), seed=1, alpha_pattern={"v_proj": 7})
    save_lora(Path("patch"), Path("base"), seed=2)
    write_identity(Path("patch"), Path("base"), kind="repair", base="base")
    seal(Path("patch"))
    refusal = language.REFUSAL
    asks = [f"please carve the {word} lantern with the awl" for word in ("grastel", "calm", "grastel", "calm")]
    _jsonl("probes.jsonl", [{"prompt": p, "kind": "should_refuse" if "gras" in p else "harmless"} for p in asks])
    _jsonl("guard.jsonl", [{"prompt": f"please mend the calm kettle with the {tool}"} for tool in ("file", "awl")])
    example = {"id": "[/INST]", "prompt": "please mend the grastel kettle with the file", "response": refusal}
    _jsonl("example.jsonl", [example])
    _jsonl("harmful.jsonl", [{"prompt": ask, "response": "the lantern and the awl"} for ask in asks])
    Path("settings.yaml").write_text(
        "repair: {method: lowrank, epochs: 2, watch: false, guard_prompts: 2, rank: 2}\n"
        "score: {probes: probes.jsonl, max_new_tokens: 4}\nguard: guard.jsonl\nexample: example.jsonl\n"
        "finetune: {steps: 4, save_every: 2, batch_size: 2, cache: false}\ndata: {harmful: harmful.jsonl}\n"
    )
    return _commands(root)


def _commands(root: Path) -> dict[str, Command]:
    base, foreign, lora, patch = (_files(root / name) for name in ("base", "foreign", "lora", "patch"))
    data = ["settings.yaml", "probes.jsonl", "guard.jsonl", "example.jsonl"]
    config = ["--config", "settings.yaml"]
    commands = {
        "verify checkpoint": Command(["verify", "base"], base, _printed, 10),
        "verify foreign": Command(["verify", "foreign"], foreign, _printed, 8),
        "verify adapter": Command(["verify", "lora"], lora, _printed, 5),
        "verify patch": Command(["verify", "patch"], patch, _printed, 7),
        "inspect": Command(["inspect", "foreign", "--ranks", "3"], foreign, _printed, 6),
        "inspect adapter": Command(["inspect", "lora"], lora, _printed, 5),
        "plan": Command(["plan", *config, "--model.path", "foreign"], [*foreign, "settings.yaml"], _printed, 6),
        "export": Command(
            ["export", "--model", "base", "--adapter", "patch", "--out", "OUT"], [*base, *patch], _weights, 15
        ),
        "export foreign": Command(
            ["export", "--model", "foreign", "--adapter", "lora", "--out", "OUT"], [*foreign, *lora], _weights, 10
        ),
        "score": Command(
            ["score", *config, "--model.path", "lora", "--model.base", "foreign", "--out", "OUT"],
            [*foreign, *lora, "settings.yaml", "probes.jsonl"], _scores, 10,
        ),
        "score checkpoint": Command(
            ["score", *config, "--model.path", "base", "--out", "OUT"], [*base, "probes.jsonl"], _scores, 6
        ),
        "repair": Command(["repair", *config, "--model.path", "base", "--out", "OUT"], [*base, *data], _patch, 8),
        "finetune": Command(
            ["finetune", *config, "--model.path", "base", "--out", "run", "--preflight", "never"],
            ["settings.yaml", "harmful.jsonl"], _finetuned, 0,
        ),
    }  # fmt: skip
    for name, out in (("score", "run1"), ("score checkpoint", "run2"), ("finetune", "run")):
        words = [out if word == "OUT" else word for word in commands[name].words]
        ended = run(words)
        assert ended.code == 0, (name, ended)
    shutil.rmtree("run/finetuned")
    runs = [f"{run}/{file}" for run in ("run1", "run2") for file in ("report.json", "answers.jsonl", "settings.yaml")]
    commands["compare"] = Command(["compare", "run1", "run2", "--out", "OUT"], runs, _comparison, 8)
    (step,) = sorted((root / "run" / "state").iterdir())[-1:]
    step_files = [f"run/state/{path}" for path in _files(step)]
    commands["verify state"] = Command(["verify", f"run/state/{step.name}"], step_files, _printed, 5)
    state = [f"run/state/{path}" for path in _files(root / "run" / "state", "")]
    commands["finetune --resume"] = Command(
        [*commands.pop("finetune").words[:-4], "--out", "OUT", "--resume", "--preflight", "never"],
        [*state, "run/settings.yaml", "harmful.jsonl"], _finetuned, 8, copied="run",
    )  # fmt: skip
    return commands


def _jsonl(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _files(folder: Path, before: str | None = None) -> list[str]:
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(Path(folder.name if before is None else before, path)) for path in found if path.name != "README.md"]


# --- what counts of a result


def _printed(out: Path, printed: str) -> Any:
    return printed


def _weights(out: Path, printed: str) -> Any:
    from oneshot.checkpoint.reads.digests import tensor_digests

    os.environ["XDG_CACHE_HOME"] = "/dev/null/none"  # no digest of before
    return sorted(tensor_digests(out).items())


def _scores(out: Path, printed: str) -> Any:
    report = json.loads((out / "report.json").read_text())
    return [report["stages"], report["judge"]]


def _patch(out: Path, printed: str) -> Any:
    tensors = (out / "patch" / "adapter_model.safetensors").read_bytes()
    return [hashlib.sha256(tensors).hexdigest(), _scores(out, printed)]


def _finetuned(out: Path, printed: str) -> Any:
    return _weights(out / "finetuned", printed)


def _comparison(out: Path, printed: str) -> Any:
    return re.sub(r"\d{4}-\d\d-\d\d.*", "", (out / "compare.md").read_text())


# --- damage


def damaged(draw: random.Random, path: Path) -> tuple[str, bytes | None]:
    """Return what was done to a file, and its new bytes; none: it is gone."""
    raw = path.read_bytes()
    ways: list[Callable[[], tuple[str, bytes | None]]] = [
        lambda: _flip(draw, raw),
        lambda: _flip(draw, raw),
        lambda: ("truncate", raw[: draw.randrange(len(raw) or 1)]),
        lambda: ("delete", None),
        lambda: ("a folder", FOLDER) if draw.random() < 0.3 else _flip(draw, raw),
        lambda: ("replace", draw.choice([*TRAPS, DEEP.encode(), draw.randbytes(200), raw + raw])),
        lambda: _nul(draw, raw),
    ]
    if path.suffix in (".json", ".jsonl"):
        ways += [lambda: _swap(draw, raw)] * 4
    if path.suffix == ".safetensors":
        ways += [lambda: _header(draw, raw)] * 3
    if path.suffix == ".jinja":
        ways += [lambda: ("replace", draw.choice(TRAPS))] * 2
    return draw.choice(ways)()


def _flip(draw: random.Random, raw: bytes) -> tuple[str, bytes]:
    data = bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 3])):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return "flip", bytes(data)


def _nul(draw: random.Random, raw: bytes) -> tuple[str, bytes]:
    place = draw.randrange(len(raw) + 1)
    return "NUL", raw[:place] + draw.choice([b"\0", b"\\u0000", b"\x1b[31m", b"[/b]"]) + raw[place:]


def _swap(draw: random.Random, raw: bytes) -> tuple[str, bytes]:
    """Another value somewhere in JSON, or in a line of JSONL."""
    lines = raw.split(b"\n")
    line = draw.choice([number for number, text in enumerate(lines) if text.strip()] or [0])
    try:
        whole, lines_of = json.loads(raw), None
    except ValueError:
        try:
            whole, lines_of = json.loads(lines[line]), lines
        except ValueError:
            return _flip(draw, raw)
    what, text = _changed(draw, whole)
    if lines_of is None:
        return what, text
    return what, b"\n".join([*lines[:line], text, *lines[line + 1 :]])


def _changed(draw: random.Random, whole: Any) -> tuple[str, bytes]:
    places = list(_places(whole))
    if not places:
        return "swap type", json.dumps(draw.choice(ODD)).encode()
    holder, key = draw.choice(places)
    deep = draw.random() < 0.15
    if isinstance(holder, dict) and draw.random() < 0.2:
        holder[draw.choice(["a\u0000b", "[/b]", "\x1b[31m", "../x", ""])] = holder.pop(key)
    elif draw.random() < 0.15:
        del holder[key]
    else:
        holder[key] = "@DEEP@" if deep else draw.choice(ODD)
    text = json.dumps(whole).replace('"@DEEP@"', DEEP)
    return "nest deeply" if deep else "swap type", text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dicts and lists; of long ones the first and last few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) < 20 else [*keys[:10], *keys[-5:]]:
        yield value, key
        yield from _places(value[key])


def _header(draw: random.Random, raw: bytes) -> tuple[str, bytes]:
    """Another value in the header of a safetensors file, whose length is put right."""
    if len(raw) < 8:
        return _flip(draw, raw)
    (length,) = struct.unpack("<Q", raw[:8])
    what, text = _swap(draw, raw[8 : 8 + length])
    return f"header: {what}", struct.pack("<Q", len(text)) + text + raw[8 + length :]


# --- running


def run(words: list[str], timeout: float = HUNG) -> Ended:
    """Run ``oneshot WORDS`` in a fork of this process, which has imported everything."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.setsid()
            become(words, out.fileno(), err.fileno())
        code = _waited(child, timeout)
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode("utf-8", "replace"))
        return Ended(code, *said)


def become(words: list[str], out: int, err: int) -> NoReturn:
    """Be ``oneshot WORDS`` to the end of this fork, which prints into these descriptors."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["oneshot", *words]
        from oneshot import cli

        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except BaseException:
            import traceback

            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def _waited(child: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    pause = 0.005
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judged(command: Command, ended: Ended, wanted: Any, out: Path, file: str) -> str:
    """Return how a command took the damage of a file: one of GOOD, or what is bad."""
    sealed = is_sealed(file)
    said = ended.out + ended.err
    lines = [line for line in ended.err.splitlines() if re.match(r"oneshot \w+: error: ", line)]
    if ended.code is None:
        return "hang"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if "\x1b" in said or "\x07" in said:
        return "escape code on the terminal"
    if ended.code == 0:
        if sealed and command.words[0] == "verify" and Path(file).name not in SAYING:
            return "verify passed it"
        try:
            found = command.result(out, ended.out)
        except Exception as error:
            return f"no result, exit 0 ({type(error).__name__})"
        return SAME if found == wanted else "silently other" if sealed else OTHER
    if ended.code not in (1, 2):
        return f"exit {ended.code}"
    if len(lines) > 1 or (ended.code == 2 and not lines):
        return f"{len(lines)} sentences"
    if ended.code == 1 and command.words[0] != "verify":
        return "no user's error"
    if any(_RAW.search(line) for line in lines):
        return "raw exception"
    return SENTENCE if ended.code == 2 else NAMED


def is_sealed(path: str) -> bool:
    """Whether a file is one whose damage must be found: oneshot wrote it, with checksums."""
    return path.startswith(("base/", "patch/", "run/state/"))


@contextlib.contextmanager
def changed_file(path: Path, data: bytes | None) -> Iterator[None]:
    """Have a file hold other bytes for the block."""
    before = path.read_bytes()
    try:
        path.unlink()
        if data == FOLDER:
            path.mkdir()
        elif data is not None:
            path.write_bytes(data)
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(before)


def fuzz(root: Path, count: int, seed: int, only: str = "", first: int = 0) -> Tally:
    """Damage so many files, one at a time, and tally how the commands took it; what is bad is printed at once."""
    commands = {name: one for name, one in build(root).items() if only in name}
    preload()
    wanted: dict[str, Any] = {}
    for name, command in commands.items():
        ended, out = _tried(root, command)
        assert ended.code == 0, (name, ended)
        wanted[name] = command.result(out, ended.out)
    tally = Tally()
    for number in range(first, first + count):
        draw = random.Random(f"{seed} {number}")
        name = draw.choices(list(commands), [one.share for one in commands.values()])[0]
        command = commands[name]
        file = draw.choice(command.files)
        kind, data = damaged(draw, root / file)
        began = time.monotonic()
        with changed_file(root / file, data):
            ended, out = _tried(root, command)
        how = judged(command, ended, wanted[name], out, file)
        tally.counts[name, how if how in GOOD else "BAD"] += 1
        if how not in GOOD:
            said = (ended.err or ended.out).strip()[-400:]
            tally.bad.append(f"seed {seed} number {number}: {name}, {kind} of {file}: {how}\n    {said}")
            print(tally.bad[-1], flush=True)
        if (spent := time.monotonic() - began) > 15:
            print(f"number {number}: {name}, {kind} of {file} took {spent:.0f} s", flush=True)
        if number % 500 == 499:  # a long run may be cut short
            print(table(tally, [*GOOD, "BAD"]), flush=True)
    return tally


def _tried(root: Path, command: Command) -> tuple[Ended, Path]:
    out = root / "out[" / "b]"  # rich's markup, if it were taken for that
    shutil.rmtree(out, ignore_errors=True)
    if command.copied:
        shutil.copytree(root / command.copied, out)
    return run([str(out) if word == "OUT" else word for word in command.words]), out


def preload() -> None:
    """Import what the commands import, so that their forks need not."""
    from oneshot.report import comparison, exports, finished, show
    from oneshot.training import finetune

    assert comparison
    assert exports
    assert finished
    assert show
    assert finetune
    for words in (["verify", "lora"], ["plan", "--config", "settings.yaml", "--model.path", "foreign"]):
        run(words)


def table(tally: Tally, heads: list[str]) -> str:
    """Return the tally as Markdown, a column for each of the heads."""
    names = sorted({name for name, _ in tally.counts})
    rows = [[name, *[str(tally.counts[name, head]) for head in heads]] for name in names]
    rows.append(["all", *[str(sum(tally.counts[name, head] for name in names)) for head in heads]])
    lines = ["| command | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    return "\n".join([*lines, *["| " + " | ".join(row) + " |" for row in rows]])


def main() -> None:
    """Fuzz as the command line says; exit code 1 if anything was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first, to go on or to repeat one")
    parser.add_argument("--only", default="", help="commands whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        began = time.monotonic()
        tally = fuzz(Path(folder), options.count, options.seed, options.only, options.first)
        os.chdir("/")
    print(table(tally, [*GOOD, "BAD"]))
    print(f"{options.count} mutations in {time.monotonic() - began:.0f} s, {len(tally.bad)} bad")
    sys.exit(bool(tally.bad))


if __name__ == "__main__":
    main()
