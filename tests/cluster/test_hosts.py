"""Two hosts without a job manager: two network namespaces joined by a link, through launch/node.sh."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurmjobs import ROOT, apart, patch_of, repair_settings, variables, wait_until

pytestmark = pytest.mark.cluster
RTOL = 1e-4
GIVES_UP_AFTER = 20.0  # seconds that a rank waits for the other one
ENDS_WITHIN = 90.0  # seconds from the cut: the waiting, the last words, the launcher's end, a busy machine


@dataclass(frozen=True)
class Hosts:
    """The namespaces of two hosts, 10.77.0.1 and 10.77.0.2, and their ends of the link."""

    names: tuple[str, str]
    links: tuple[str, str]

    def start(self, rank: int, log: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start ``launch/node.sh ARGUMENTS`` on a host, with one process on each."""
        ours = {"ONESHOT_NODES": "2", "ONESHOT_NODE_RANK": str(rank), "ONESHOT_HEAD": "10.77.0.1"}
        ours |= {"ONESHOT_PORT": "29501", "ONESHOT_PROCS_PER_NODE": "1", "GLOO_SOCKET_IFNAME": self.links[rank]}
        # no name server is to be waited for
        settings = variables(**ours, RES_OPTIONS="timeout:1 attempts:1", **environment)
        command = ["ip", "netns", "exec", self.names[rank], "launch/node.sh", *arguments]
        with log.open("wb") as out:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", self.links[0], "down")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: ip (package iproute2) is not installed")
    names = (f"oneshot{os.getpid()}a", f"oneshot{os.getpid()}b")
    links = (f"os{os.getpid()}a", f"os{os.getpid()}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"no network namespaces can be made here: {error.stderr.decode().strip()}")
    for number, (name, link) in enumerate(zip(names, links), start=1):
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
        for device in ("lo", link):
            ip("-n", name, "link", "set", device, "up")
    yield Hosts(names, links)
    _remove(names)


def _remove(names: tuple[str, str]) -> None:
    for name in names:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
        for pid in listed.split():  # a launcher's workers have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_patch_made_on_two_hosts_is_that_of_one_process(
    hosts: Hosts, degraded: Path, repaired: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    settings = ["oneshot/repair.py", *repair_settings(degraded / "finetuned", out)]
    running = [hosts.start(rank, logs[rank], *settings) for rank in (0, 1)]
    codes = [host.wait(timeout=240) for host in running]
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    assert "--main_process_ip 10.77.0.1 --main_process_port 29501" in logs[1].read_text()
    assert apart(patch_of(out), patch_of(repaired)) < RTOL


def test_a_cut_link_ends_the_run_on_both_hosts(hosts: Hosts, degraded: Path, tmp_path: Path) -> None:
    out, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    endless = ["--repair.epochs", "100000", "--select", "random"]  # a choice by bilevel repairs with each candidate
    settings = ["oneshot/repair.py", *repair_settings(degraded / "finetuned", out), *endless]
    limit = {"ONESHOT_TIMEOUT_MINUTES": str(GIVES_UP_AFTER / 60)}
    running = [hosts.start(rank, logs[rank], *settings, **limit) for rank in (0, 1)]
    said = lambda: "\n".join(log.read_text()[-4000:] for log in logs)  # noqa: E731
    wait_until((out / "events.jsonl").exists, said, timeout=180)
    hosts.cut()
    until = time.monotonic() + ENDS_WITHIN
    codes = [host.wait(timeout=max(0.1, until - time.monotonic())) for host in running]
    assert 0 not in codes
    for rank, log in enumerate(logs):
        text = log.read_text()
        assert f"oneshot repair: error: rank {rank}: RuntimeError: " in text, text[-4000:]
        assert "another rank, its node or the network is gone" in text
