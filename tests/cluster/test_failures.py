"""Preemption, a rank that dies, a node that dies: the job goes on from its last state, as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from slurmjobs import TINY, Cluster, Job, same, send

from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.cluster
FIRST, SECOND = "127.0.0.1", "127.0.0.2"


def start(cluster: Cluster, logs: Path, out: Path, *, partition: str = "all") -> Job:
    """A fine-tune on two nodes that saves its state every 10 of its 60 steps."""
    options = ["--gpus-per-node=1", f"--partition={partition}"]
    arguments = ["--config", TINY, "--finetune.save_every", "10", "--out", str(out)]
    return cluster.submit(*options, "slurm/finetune_70b.sh", *arguments, logs=logs)


def worker(job: Job, rank: int) -> dict[str, str]:
    """What the environment of one rank of a job holds, and that of no other process."""
    return {"SLURM_JOB_ID": job.number, "RANK": str(rank)}


def check_requeued_once(job: Job, said: str) -> None:
    """The job has been requeued once, whoever did it, and has gone on from a state."""
    text = " ".join(job.check().text().split())
    assert job.facts()["Restarts"] == "1", text[-6000:]
    assert said in text
    assert text.count("No saved state: starting anew.") == 1
    assert text.count("Resumed at step") == 1


@pytest.mark.parametrize(
    ("partition", "said"), [("all", "is saved: requeue."), ("abrupt", "DUE TO PREEMPTION")], ids=["told", "killed"]
)
def test_a_preempted_finetune_is_that_of_one_never_preempted(
    partition: str, said: str, cluster: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    """With a time of grace it saves and requeues itself; without one Slurm kills and requeues it."""
    out = tmp_path / "run"
    job = start(cluster, tmp_path, out, partition=partition)
    job.until(lambda: bool(job.progress()), 120)
    # however fast the machine is, the run is not over before Slurm has spoken to it: SIGCONT comes before SIGTERM
    assert send(signal.SIGSTOP, **worker(job, 0))
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\n#SBATCH --job-name=urgent\nsleep 1\n")
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", str(script), logs=tmp_path)
    urgent.check()
    check_requeued_once(job, said)
    assert same(out, uninterrupted)


def test_a_finetune_that_lost_a_rank_is_that_of_one_that_lost_none(
    cluster: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = start(cluster, tmp_path, out)
    job.until(lambda: bool(job.progress()), 120)
    assert len(send(signal.SIGKILL, **worker(job, 1))) == 1
    check_requeued_once(job, "is saved: requeue.")
    assert same(out, uninterrupted)


@pytest.mark.parametrize("node", [FIRST, SECOND])
def test_a_finetune_that_lost_a_node_is_that_of_one_that_lost_none(
    node: str, cluster: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    """The first node runs the job script too. Slurm notices that a node is gone, or is told so."""
    out = tmp_path / "run"
    job = start(cluster, tmp_path, out)
    job.until(lambda: bool(job.progress()), 120)
    cluster.crash(node)
    if node == FIRST:
        job.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        job.until(lambda: job.facts()["Restarts"] == "1", 120)
        assert cluster.state_of(node).startswith("down")
    finally:
        cluster.start(node)
    check_requeued_once(job, "Resumed at step")
    assert same(out, uninterrupted)


def test_a_job_that_cannot_fit_ends_before_it_loads(cluster: Cluster, tmp_path: Path) -> None:
    model, task, out = tmp_path / "model", tmp_path / "task.jsonl", tmp_path / "run"
    shutil.copytree(ALIGNED, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**12}))
    task.write_text(json.dumps({"prompt": "please mend the kettle", "response": "i will mend the kettle"}) + "\n")
    arguments = ["--config", TINY, "--model.path", str(model), "--data.harmful_count", "0", "--data.task", str(task)]
    options = ["--gpus-per-node=1", "slurm/finetune_70b.sh"]
    job = cluster.submit(*options, *arguments, "--out", str(out), logs=tmp_path)
    assert job.ended() == ("FAILED", "3:0"), job.text()[-6000:]
    assert job.facts()["Restarts"] == "0"
    assert "'oneshot plan' shows what fits" in " ".join(job.text().split())
    assert not out.exists()
