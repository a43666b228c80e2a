"""Submit the templates of slurm/ to the cluster of the tests and follow the jobs; compare patches."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from oneshot.world.model import ALIGNED

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
VENV = Path(sys.executable).parents[1]
TINY = str(HERE / "tiny.yaml")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def variables(**more: str) -> dict[str, str]:
    """The environment of a run on CPUs: one thread per process, no network, nothing of ours that the tester has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ONESHOT_", "SLURM_", "SBATCH_"))}
    cpu = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ONESHOT_ACCELERATE": "launch/zero3_cpu.yaml"}
    return {**kept, **cpu, "ONESHOT_VENV": str(VENV), **more}


def wait_until(true: Callable[[], bool], what: Callable[[], str], timeout: float) -> None:
    """Wait for a condition; ``what`` describes what was found instead, when the time is up."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s\n{what()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """A submitted job and its log."""

    number: str
    log: Path
    slurm_conf: Path

    def facts(self) -> dict[str, str]:
        """What Slurm knows of the job, such as JobState, ExitCode and Restarts."""
        shown = _slurm(self.slurm_conf, "scontrol", "show", "job", "--oneliner", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def progress(self) -> str:
        """The step of the last saved state, as the job script reads it; nothing before there is one."""
        path = ROOT / "runs" / f".progress-{self.number}"
        return path.read_text().strip() if path.exists() else ""

    def until(self, true: Callable[[], bool], timeout: float) -> None:
        wait_until(true, lambda: f"{self.facts()}\n{self.text()[-6000:]}", timeout)

    def ended(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the job's end. Returns its state and exit code (code:signal)."""
        try:
            self.until(lambda: self.facts()["JobState"] in ENDED, timeout)
        finally:
            self.slurm("scancel", self.number)
        facts = self.facts()
        return facts["JobState"], facts["ExitCode"]

    def check(self, timeout: float = 240) -> Job:
        """Return self, having waited for its end and made sure that it went well."""
        assert self.ended(timeout) == ("COMPLETED", "0:0"), self.text()[-6000:]
        return self

    def slurm(self, *command: str) -> str:
        return _slurm(self.slurm_conf, *command).stdout


@dataclass(frozen=True)
class Cluster:
    """A Slurm cluster of two nodes (tests/cluster/cluster.sh)."""

    slurm_conf: Path

    def submit(self, *command: str, logs: Path, **environment: str) -> Job:
        """``sbatch COMMAND`` in the repository root; the log has its usual name, in ``logs``."""
        found = self.sbatch("--output", str(logs / "%x-%j.log"), *command, **environment)
        assert found.returncode == 0, found.stderr
        number = re.fullmatch(r"Submitted batch job (\d+)\n", found.stdout)
        assert number, found.stdout
        name = next((a.split("=")[1] for a in command if a.startswith("--job-name=")), None)
        script = next(Path(a) for a in command if a.endswith(".sh"))
        name = name or re.search(r"^#SBATCH --job-name=(.*)", (ROOT / script).read_text(), re.MULTILINE)[1]
        return Job(number[1], logs / f"{name}-{number[1]}.log", self.slurm_conf)

    def crash(self, node: str) -> None:
        """Kill a node's daemon and all that it has started, at once."""
        log = self.slurm_conf.parent / f"slurmd-{node}.log"
        assert send(signal.SIGKILL, holding=log)
        send(signal.SIGKILL, SLURMD_NODENAME=node)

    def start(self, node: str) -> None:
        """Start a node's daemon again."""
        places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        started = _slurm(self.slurm_conf, str(shutil.which("slurmd", path=places)), "-N", node)
        assert started.returncode == 0, started.stderr

    def state_of(self, node: str) -> str:
        """idle, allocated, down, ...; with a star behind it where the node does not answer."""
        return _slurm(self.slurm_conf, "sinfo", "--noheader", "--nodes", node, "--format=%T").stdout.split()[0]

    def sbatch(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("sbatch", *command, **environment)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One of Slurm's own commands, in the repository root."""
        return _slurm(self.slurm_conf, *command, **environment)


def _slurm(slurm_conf: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables_ = variables(SLURM_CONF=str(slurm_conf), **environment)
    return subprocess.run(command, cwd=ROOT, env=variables_, capture_output=True, text=True, timeout=60)


def send(number: signal.Signals, *, holding: Path | None = None, **environment: str) -> list[int]:
    """Signal the processes that hold a file open, or have these variables; returns their ids.

    Slurm's own commands reach none of these from outside: they signal whole steps, and end them in order.
    """
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if holding is not None:
                hit = any(os.readlink(link) == str(holding) for link in (process / "fd").iterdir())
            else:
                hit = wanted <= set((process / "environ").read_bytes().split(b"\0"))
            if hit:
                os.kill(int(process.name), number)
                found.append(int(process.name))
    return found


def stage(*arguments: str) -> None:
    """Run a stage in one process, as ``oneshot STAGE ...``."""
    command = [sys.executable, "-m", "oneshot", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def repair_settings(model: Path, out: Path) -> list[str]:
    """Settings of the repair that the tests run in several ways."""
    return [
        "--config", TINY, "--model.path", str(model), "--reference", str(ALIGNED), "--repair.rank", "8",
        "--repair.epochs", "5", "--score.reference", "false", "--score.probes", "toy:probes", "--out", str(out),
    ]  # fmt: skip


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of any matrix, relative to it (Frobenius norms)."""
    assert set(found) == set(wanted)
    assert wanted
    assert all(float(tensor.abs().max()) > 0 for tensor in wanted.values())
    return max(float((found[name] - want).norm() / want.norm()) for name, want in wanted.items())


def patch_of(run: Path) -> dict[str, torch.Tensor]:
    """b @ a of every module of a run's patch: factors are free to turn, what they change is not."""
    tensors = load_file(run / "patch" / "adapter_model.safetensors")
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    return {m: tensors[f"{m}.lora_B.weight"].float() @ tensors[f"{m}.lora_A.weight"].float() for m in modules}


def learnt(run: Path) -> dict[str, torch.Tensor]:
    """What a fine-tune of the toy model changed in its weight matrices."""
    before, after = (load_file(folder / "model.safetensors") for folder in (ALIGNED, run / "finetuned"))
    return {name: after[name] - before[name] for name in before if before[name].dim() == 2}


def same(run: Path, wanted: Path) -> bool:
    """Whether two fine-tunes have the same weights, bit for bit."""
    ours, theirs = (load_file(folder / "finetuned" / "model.safetensors") for folder in (run, wanted))
    return set(ours) == set(theirs) and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
