"""The templates of slurm/ on a real Slurm cluster: same results as one process, requeue, signals, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurmjobs import HERE, TINY, Cluster, apart, learnt, patch_of, repair_settings, same

pytestmark = pytest.mark.cluster
RTOL = 1e-4


@pytest.mark.parametrize("processes", [1, 2])
def test_a_patch_made_on_two_nodes_is_that_of_one_process(
    processes: int, cluster: Cluster, degraded: Path, repaired: Path, tmp_path: Path
) -> None:
    """One process per node is asked for by a variable, as on CPUs; two by asking Slurm for GPUs."""
    out = tmp_path / "run"
    options = ["--gpus-per-node=0" if processes == 1 else "--gpus-per-node=2"]
    environment = {"ONESHOT_PROCS_PER_NODE": "1"} if processes == 1 else {}
    settings = repair_settings(degraded / "finetuned", out)
    cluster.submit(*options, "slurm/patch_70b.sh", *settings, logs=tmp_path, **environment).check()
    assert apart(patch_of(out), patch_of(repaired)) < RTOL
    report, one = (json.loads((folder / "report.json").read_text()) for folder in (out, repaired))
    assert (report["world_size"], one["world_size"]) == (2 * processes, 1)
    assert report["stages"] == one["stages"]


def test_a_finetune_warned_twice_is_that_of_one_never_interrupted(
    cluster: Cluster, degraded: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Warned, it saves and ends; the job requeues itself and goes on where it was, in the same folder and log."""
    out = tmp_path / "run"
    arguments = ["--config", TINY, "--out", str(out)]
    job = cluster.submit("--gpus-per-node=1", "slurm/finetune_70b.sh", *arguments, logs=tmp_path)
    steps = out / "events.jsonl"
    for restarts, least in enumerate((5, 20)):
        job.until(lambda least=least: steps.exists() and steps.read_text().count("\n") > least, 120)
        job.slurm("scancel", "--signal=USR1", job.number)  # to the step, as sbatch --signal=USR1@300 does in its time
        job.until(lambda number=restarts + 1: job.facts()["Restarts"] == str(number), 120)
    job.check()
    assert job.text().count("node 0 of 2") == 3
    said = " ".join(job.text().split())
    assert said.count("Told to stop after step") == 2
    assert said.count("Resumed at step") == 2
    assert [json.loads(line)["step"] for line in steps.read_text().splitlines()] == list(range(1, 61))
    assert same(out, uninterrupted)
    assert apart(learnt(out), learnt(degraded)) < RTOL


def test_the_warning_before_the_end_reaches_the_workers_alone(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nexec slurm/start.sh {HERE / "waits_for_usr1.py"} "$@"\n')
    options = ["--nodes=2", "--gpus-per-node=2", "--job-name=warned", "--time=10", "--signal=USR1@120"]
    job = cluster.submit(*options, str(script), str(tmp_path), logs=tmp_path)
    job.until(lambda: len(list(tmp_path.glob("*.ready"))) == 4, 120)
    job.slurm("scontrol", "update", f"jobid={job.number}", "endtime=now+100")  # which Slurm looks at twice a minute
    job.check()
    assert sorted(path.name for path in tmp_path.glob("*.heard")) == ["0.heard", "1.heard", "2.heard", "3.heard"]


def test_more_nodes_than_there_are_is_refused(cluster: Cluster) -> None:
    refused = cluster.sbatch("--nodes=3", "slurm/patch_70b.sh")
    assert refused.returncode != 0
    assert "Node count specification invalid" in refused.stderr


@pytest.mark.parametrize(
    ("gpus", "environment", "said"),
    [
        (0, {}, "how many processes per node is not known: set ONESHOT_PROCS_PER_NODE"),
        (1, {"ONESHOT_NODE_RANK": "0"}, "ONESHOT_NODE_RANK is set in a Slurm job"),
        (1, {"ONESHOT_CONTAINER": "image"}, "srun has no --container-image (Pyxis)"),
        (1, {"ONESHOT_ACCELERATE": "launch/no.yaml"}, "has no launch/no.yaml"),
        (1, {"ONESHOT_VENV": "/no"}, "ONESHOT_VENV is /no, which has no bin/accelerate"),
    ],
)
def test_what_is_wrong_is_said_in_the_log(
    gpus: int, environment: dict[str, str], said: str, cluster: Cluster, tmp_path: Path
) -> None:
    """And the job ends as by a user's mistake: on two nodes, of which the first to fail has the other one ended."""
    options = [f"--gpus-per-node={gpus}", "slurm/patch_70b.sh"]
    job = cluster.submit(*options, logs=tmp_path, **environment)
    assert job.ended(30) == ("FAILED", "2:0")
    assert said in job.text()
    assert "Traceback" not in job.text()


def test_a_job_from_another_folder_says_so(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--chdir=/", "slurm/patch_70b.sh", logs=tmp_path)
    assert job.ended(30) == ("FAILED", "2:0")
    assert "oneshot-patch: error: / is not the repository root" in job.text()
