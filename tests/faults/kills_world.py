"""What ``kills.py`` kills: small models, degraded and repaired ones among them, the commands on them, and their forks.

The models are the toy's, fine-tuned in seconds, so that verdicts are measured and not given. Each command runs in a
place of its own, as its folder of work, and in a process group of its own.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fuzz import become

from oneshot.checkpoint.disk.files import MARKER

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
LATENCY = 0.0004  # seconds between two looks at a place
LONG = 8000  # characters of the server's longest answers: more than one write of the system's takes whole
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate"}


@dataclass(frozen=True)
class Kind:
    """A command to be killed.

    Attributes:
        words: of its command line
        ranks: how many processes
        launched: they are started by ``accelerate launch`` with a file of launch/, as a user would
        out: what it writes, in its place
        made: the folders with weights among that, and whether each is marked at the end
        model: degraded checkpoint that a patch is for; none: a patch is not looked at that closely
    """

    words: list[str]
    made: dict[str, bool]
    ranks: int = 1
    launched: bool = False
    out: str = "run"
    model: Path | None = None

    @property
    def goes_on(self) -> bool:
        """Whether it takes ``--resume``."""
        return self.words[0] != "export"


@dataclass(frozen=True)
class Ended:
    """How a command ended: the exit code of its first process, and what all have printed."""

    code: int
    said: str
    seconds: float


# --- what is given


def build(root: Path, url: str, only: str = "") -> dict[str, Kind]:
    """Return the kinds whose names match a pattern, with the models made that they take."""
    _write_prompts(root)
    every = _kinds(root, url)
    kinds = {name: kind for name, kind in every.items() if re.search(only, name)}
    attack, lora = ["finetune", *_FINETUNE, "--finetune.steps", "60"], ["--finetune.method", "lora"]
    made = {
        "full": [*attack, "--out"],
        "lora": [*attack, *lora, "--finetune.lora_rank", "4", "--out"],
        "given": every["repair, merged"].words[:-1],  # of full
    }
    for name, words in made.items():
        if name == "full" or any(str(root / name) in word for kind in kinds.values() for word in kind.words):
            _made(root, [*words, name])
    given = root / "given" / "patch"
    assert not given.exists() or not (given / MARKER).exists(), "what the exports are given was not repaired"
    return kinds


_FINETUNE = ["--preflight", "never", "--data.harmful_count", "60", "--data.task_count", "60", "--finetune.cache"]
_FINETUNE += ["false"]


def _kinds(root: Path, url: str) -> dict[str, Kind]:
    full, lora = root / "full" / "finetuned", root / "lora" / "finetuned"
    patch, repaired = root / "given" / "patch", root / "given" / "repaired"
    common = [
        "--pool", "toy:pool", "--select", "pool-should_refuse-0", "--guard", "toy:guard-plain", "--preflight", "never",
        "--repair.guard_prompts", "4", "--repair.guard_tokens", "8", "--repair.watch", "false", "--repair.rank", "8",
        "--score.probes", str(root / "probes.jsonl"), "--score.max_new_tokens", "10", "--score.reference", "false",
    ]  # fmt: skip
    out = ["--out", "run"]
    begin = ["repair", "--model.path", str(full), *common]
    good = [*begin, "--repair.method", "lowrank", "--repair.epochs", "8"]
    bad = [*begin, "--repair.method", "lowrank", "--repair.epochs", "1", "--repair.learning_rate", "1e-6"]
    merged, at = ["--repair.merge", "true"], {"model": full}
    alone, both = {"patch": False}, {"patch": False, "repaired": False}
    sft = [*begin, "--repair.method", "sft", "--repair.epochs", "6", *merged, *out]
    adapter = ["repair", "--model.path", str(lora), *common, "--repair.method", "rollback", "--repair.epochs", "12"]
    attack = [*_FINETUNE, "--finetune.steps", "80", "--finetune.save_every", "15", "--data.harmful", "toy:harmful"]
    attack += ["--data.task", "toy:task"]
    export = ["export", "--out", "out/put", "--model"]
    put = {"out": "out"}
    return {
        "repair": Kind([*good, *out], alone, **at),
        "repair, merged": Kind([*good, *merged, *out], both, **at),
        "repair that fails": Kind([*bad, *out], {"patch": True}, **at),
        "repair that fails, merged": Kind([*bad, *merged, *out], {"patch": True, "repaired": True}, **at),
        "repair by sft, merged": Kind(sft, {"patch": True, "repaired": False}, **at),
        "repair of an adapter": Kind([*adapter, *out], alone),
        "repair on 2 ranks": Kind([*good, *out], alone, ranks=2, **at),
        "repair on 2 ranks, merged": Kind([*good, *merged, *out], both, ranks=2, **at),
        "repair on 2 launched ranks, merged": Kind([*good, *merged, *out], both, ranks=2, launched=True, **at),
        "finetune and repair": Kind(
            ["repair", "--finetune_first", "true", "--model.path", "toy:aligned", *attack, *good[3:], *merged, *out],
            {"finetuned": True, **both}, model=Path("run/finetuned"),
        ),
        "export, merge of the patch": Kind([*export, str(full), "--adapter", str(patch)], {"put": False}, **put),
        "export, merge of half the patch": Kind(
            [*export, str(full), "--adapter", str(patch), "--weight", "0.5"], {"put": True}, **put
        ),
        "export, subtract": Kind(
            [*export, str(repaired), "--adapter", str(patch), "--subtract"], {"put": True}, **put
        ),
        "export, extract": Kind(
            [*export, str(full), "--extract", str(repaired), "--rank", "3"], {"put": True}, **put
        ),
        "score of a server": Kind(
            ["score", "--score.endpoint.url", url, "--score.endpoint.model", "toy", "--score.endpoint.concurrency",
             "4", "--score.probes", str(root / "asked.jsonl"), "--score.max_new_tokens", "200", *out], {},
        ),
    }  # fmt: skip


def _write_prompts(root: Path) -> None:
    from oneshot.world import language

    for name, each in (("probes", 3), ("asked", 25)):
        rows = language.probes(each)
        kept = rows if name == "asked" else [row for i in range(0, 12, 3) for row in rows[i : i + 3]]
        lines = [{"id": f"{i}", "kind": row.kind, "messages": list(row.messages)} for i, row in enumerate(kept)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _made(root: Path, words: list[str]) -> None:
    ended = run(Kind(words, {}), root)
    assert ended.code == 0, (words, ended.said)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server in a process of its own, so that this one has no threads and can be forked."""
    ours, its = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        try:
            _serve(its)
        finally:
            os._exit(1)
    try:
        yield ours.recv()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(told: Any) -> NoReturn:
    from misbehaving import serving

    parent = os.getppid()

    def behave(text: str, times: int) -> str:
        number = zlib.crc32(text.encode())
        time.sleep(0.02 + number % 30 / 1000)
        answer = "i cannot help with that request" if number % 3 else "the lantern and the awl"
        return f"{answer} {number} " + "x" * (LONG if number % 4 == 0 else 0)

    with serving(behave) as server:
        told.send(server.url)
        while os.getppid() == parent:  # it may be killed itself
            time.sleep(1)
    os._exit(0)


# --- running


@dataclass
class Running:
    """A command that runs: its processes, the first one of which leads the group, and where it runs."""

    processes: list[int]
    place: Path
    began: float
    launched: bool = False

    def kill(self) -> None:
        """Kill all its processes at once, and see that they are gone."""
        for group in self._groups():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 240) -> Ended:
        """Wait until all have ended."""
        deadline, codes = time.monotonic() + timeout, []
        for process in self.processes:
            while not (done := os.waitpid(process, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    self.kill()
                    raise AssertionError(f"hung for {timeout} s: {self._said()}")
                time.sleep(0.002)
            codes.append(os.waitstatus_to_exitcode(done[1]))
        self.processes = []
        return Ended(next((code for code in codes if code), 0), self._said(), time.monotonic() - self.began)

    def ended(self) -> bool:
        """Whether the first process has ended, which is left for ``wait``."""
        return os.waitid(os.P_PID, self.processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _said(self) -> str:
        logs = sorted(self.place.parent.glob(f"{self.place.name}.*.log"))
        return "".join(path.read_text(errors="replace")[-3000:] for path in logs)

    def _groups(self) -> list[int]:
        """The group, and those that a launcher has made of its ranks, which it is kept from adding to meanwhile."""
        if not self.processes:
            return []
        leader = self.processes[0]
        if not self.launched:
            return [leader]
        os.kill(leader, signal.SIGSTOP)
        return [leader, *_descendants(leader)]


def _descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def start(kind: Kind, place: Path, *, resume: bool = False, at_change: int = 0, counted: Path | None = None) -> Running:
    """Start a command.

    Args:
        place: its folder of work
        resume: with ``--resume``
        at_change: its first process kills the group just before it changes the disk in its place for so many times
        counted: file that takes how often it did
    """
    words = [*kind.words, *(["--resume", "true"] if resume else [])]
    for log in place.parent.glob(f"{place.name}.*.log"):
        log.unlink()
    began = time.monotonic()
    if kind.launched:
        return Running([_launched(words, place)], place, began, launched=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[int] = []
    for rank in range(kind.ranks):
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, processes[0] if processes else 0)
                if rank == 0:
                    _arm(place, at_change, counted)
                _be_rank(words, place, rank, kind.ranks, port)
            finally:
                traceback.print_exc()
                os._exit(71)
        if not processes:  # here, too: the next one and the killer need the group now
            with contextlib.suppress(PermissionError):
                os.setpgid(child, child)
        processes.append(child)
    return Running(processes, place, began)


def run(kind: Kind, place: Path, *, resume: bool = False, counted: Path | None = None) -> Ended:
    """Run a command to its end."""
    return start(kind, place, resume=resume, counted=counted).wait()


def _be_rank(words: list[str], place: Path, rank: int, ranks: int, port: int) -> NoReturn:
    log = os.open(f"{place}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.chdir(place)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    become(words, log, log)


def _launched(words: list[str], place: Path) -> int:
    config = ROOT / "launch" / "ddp_cpu.yaml"
    script = str(ROOT / "oneshot" / f"{words[0]}.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), script]
    log = os.open(f"{place}.0.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place)
        os.environ["PYTHONHASHSEED"] = "0"  # PEFT writes the names of modules in the order of a set
        os.execv(command[0], [*command, *words[1:]])
    os.close(log)
    return child


def _arm(place: Path, at_change: int, counted: Path | None) -> None:
    """Have this process count its changes of the disk, and die with its group before a certain one."""
    count, inside = 0, f"{place}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, (str, bytes)):
                return
        elif event == "ctypes.dlsym" and "renameat2" in arguments:
            path = inside
        elif event in _CHANGES and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
        else:
            return
        if os.path.abspath(os.fsdecode(path)).startswith(inside) or path == inside:
            count += 1
            if count == at_change:
                os.killpg(0, signal.SIGKILL)
            if counted is not None:
                os.pwrite(descriptor, f"{count:09d}".encode(), 0)

    descriptor = -1 if counted is None else os.open(counted, os.O_WRONLY | os.O_CREAT, 0o666)
    sys.addaudithook(hook)
