"""The cluster, the degraded toy model, and the repair in one process that others are compared with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurmjobs import HERE, TINY, Cluster, repair_settings, stage

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in DAEMONS if shutil.which(name, path=places) is None]
    if missing:
        pytest.skip(f"no Slurm cluster can be started: {', '.join(missing)} not installed")
    if os.geteuid() != 0:
        pytest.skip("no Slurm cluster can be started: only root may")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(HERE / "cluster.sh")
    started = subprocess.run([script, "start", str(folder)], stdin=subprocess.DEVNULL, timeout=60)
    assert started.returncode == 0
    yield Cluster(folder / "slurm.conf")
    subprocess.run([script, "stop", str(folder)], stdin=subprocess.DEVNULL, timeout=120, check=True)


@pytest.fixture(scope="session")
def degraded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a fine-tune of the toy world in one process."""
    out = tmp_path_factory.mktemp("degraded") / "run"
    stage("finetune", "--config", TINY, "--out", str(out))
    return out


@pytest.fixture(scope="session")
def repaired(degraded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of its repair in one process."""
    out = tmp_path_factory.mktemp("repaired") / "run"
    stage("repair", *repair_settings(degraded / "finetuned", out))
    return out


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same fine-tune on both nodes of the cluster, one process on each."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = ["slurm/finetune_70b.sh", "--config", TINY, "--out", str(folder / "run")]
    cluster.submit("--gpus-per-node=1", *arguments, logs=folder).check()
    return folder / "run"
