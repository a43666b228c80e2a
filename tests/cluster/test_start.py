"""slurm/start.sh on a real Slurm cluster: what is requeued and what not; in the launcher's place a few lines."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from slurmjobs import Cluster

pytestmark = pytest.mark.cluster


def environment(folder: Path, script: str) -> Path:
    """A folder for ONESHOT_VENV whose ``accelerate`` is this script."""
    (folder / "venv" / "bin").mkdir(parents=True)
    accelerate = folder / "venv" / "bin" / "accelerate"
    accelerate.write_text(f"#!/usr/bin/env bash\n{script}\n")
    accelerate.chmod(0o755)
    return folder / "venv"


def test_of_an_array_one_task_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """The last task, whose number is that of the whole array; the others are left alone."""
    done = shlex.quote(str(tmp_path / "done"))
    venv = environment(
        tmp_path,
        f"if [[ $SLURM_ARRAY_TASK_ID == 1 ]]; then until [[ -e {done} ]]; do sleep 0.1; done; exit 0; fi\n"
        f"if [[ -n ${{SLURM_RESTART_COUNT:-}} ]]; then touch {done}; exit 0; fi\n"
        'echo 7 >"$ONESHOT_PROGRESS_FILE"; exit 1',
    )
    options = ["--array=1-2", "--nodes=1", "--gpus-per-node=1"]
    array = cluster.submit(*options, "slurm/finetune_70b.sh", logs=tmp_path, ONESHOT_VENV=str(venv))
    tasks = [dataclasses.replace(array, number=f"{array.number}_{task}") for task in (1, 2)]
    for task in tasks:
        task.check(60)
    assert [task.facts()["Restarts"] for task in tasks] == ["0", "1"]
    assert tasks[1].facts()["JobId"] == array.number


def test_variables_named_to_sbatch_are_not_all_that_nodes_get(cluster: Cluster, tmp_path: Path) -> None:
    """Else a fine-tune could not say that a state is saved, nor a failing rank its code."""
    venv = environment(
        tmp_path,
        '[[ -z ${SLURM_RESTART_COUNT:-} ]] || { echo 3 >"$ONESHOT_CODE_FILE"; exit 1; }\n'
        'echo 7 >"$ONESHOT_PROGRESS_FILE"; exit 1',
    )
    options = ["--nodes=1", "--gpus-per-node=1", f"--export=ONESHOT_VENV={venv}"]
    job = cluster.submit(*options, "slurm/finetune_70b.sh", logs=tmp_path)
    assert job.ended(60) == ("FAILED", "3:0"), job.text()
    assert job.facts()["Restarts"] == "1"


def test_a_job_that_must_not_be_requeued_says_how_to_go_on(cluster: Cluster, tmp_path: Path) -> None:
    venv = environment(tmp_path, 'echo 7 >"$ONESHOT_PROGRESS_FILE"; exit 75')
    options = ["--nodes=1", "--gpus-per-node=1", "--no-requeue", "slurm/finetune_70b.sh"]
    job = cluster.submit(*options, logs=tmp_path, ONESHOT_VENV=str(venv))
    assert job.ended(60) == ("FAILED", "75:0"), job.text()
    assert "go on with --resume and the same --out" in job.text()


def test_a_preempted_job_that_has_saved_nothing_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """With a time of grace it is told to end, which Slurm takes for its end: a repair, a fine-tune that still loads."""
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\n#SBATCH --job-name=urgent\nsleep 1\n")
    venv = environment(tmp_path, "[[ -n ${SLURM_RESTART_COUNT:-} ]] || exec sleep 60")
    options = ["--gpus-per-node=1", "slurm/patch_70b.sh"]
    job = cluster.submit(*options, logs=tmp_path, ONESHOT_VENV=str(venv))
    job.until(lambda: job.text().count("accelerate launch") == 2, 60)
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", str(script), logs=tmp_path).check(60)
    job.check(60)
    assert job.facts()["Restarts"] == "1"
    assert "it makes room for another job: requeue" in job.text()


def test_a_shell_that_srun_started_can_start_a_run(cluster: Cluster, tmp_path: Path) -> None:
    """It is a step that holds all of its allocation."""
    venv = environment(tmp_path, "exit 5")
    options = ["srun", "--nodes=1", "--gpus-per-node=2", "--time=1", "timeout", "20"]
    ran = cluster.run(*options, "slurm/start.sh", "-m", "oneshot.repair", ONESHOT_VENV=str(venv))
    assert "accelerate launch" in ran.stdout
    assert ran.returncode == 5, ran.stderr
