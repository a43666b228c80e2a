"""What launch/node.sh and slurm/ start, with stand-ins for accelerate and srun; the run settings that ship."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from oneshot.commandline import parse
from oneshot.distributed.runtime import _timeout
from oneshot.distributed.signals import CODE_FILE, tell_code
from oneshot.errors import UserError
from oneshot.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("*_70b.sh"))
SCRIPTS = [ROOT / "launch" / "node.sh", *sorted((ROOT / "slurm").glob("*.sh"))]
RUNS = sorted((ROOT / "launch" / "runs").glob("*.yaml"))

STAGE = ["-m", "oneshot.repair"]
HOSTS = {"ONESHOT_NODES": "2", "ONESHOT_NODE_RANK": "1", "ONESHOT_HEAD": "10.0.0.1", "ONESHOT_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip


class Place:
    """A repository root whose ``accelerate``, ``srun`` and ``getent`` are stand-ins that print what they are given."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "root", folder / "bin"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("slurm", "launch", "ds_configs"):
            (self.root / name).symlink_to(ROOT / name)
        self.stand_in("accelerate", 'printf "%s\\n" "$@"; exit ${CODE:-0}')
        self.stand_in("srun", '[ "$1" = --help ] && echo "$SRUN_HELP" || printf "%s\\n" "$@"')
        self.stand_in("getent", '[ "$2" != nowhere ] && echo 10.0.0.1')

    def stand_in(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("ONESHOT_", "SLURM_", "SBATCH_", "GLOO_"))}
        return {**kept, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", **variables}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment(variables)
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=30)

    def launched(self, **variables: str) -> list[str]:
        """Arguments of accelerate, started by node.sh."""
        ran = self.run("launch/node.sh", *STAGE, "--repair.rank", "8", **variables)
        assert (ran.returncode, ran.stderr) == (0, "")
        said, *arguments = ran.stdout.splitlines()
        assert said.endswith(" ".join(arguments))
        assert arguments[-4:] == [*STAGE, "--repair.rank", "8"]
        assert arguments[:2] == ["launch", "--quiet"]
        return arguments[2:-4]

    def refused(self, **variables: str) -> str:
        """The one line with which node.sh ends."""
        ran = self.run("launch/node.sh", *STAGE, **variables)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert re.fullmatch(r"launch/node\.sh: error on \S+: .*\n", ran.stderr), ran.stderr
        return ran.stderr


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def several(rank: int, head: str, port: int, processes: int, config: str = "launch/zero3.yaml") -> list[str]:
    return [
        "--config_file", config, "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", head,
        "--main_process_port", str(port), "--deepspeed_multinode_launcher", "standard",
        "--num_processes", str(processes),
    ]  # fmt: skip


def test_the_only_machine_goes_by_the_yaml(place: Place) -> None:
    assert place.launched() == ["--config_file", "launch/zero3.yaml"]
    other = place.launched(ONESHOT_ACCELERATE="launch/zero2.yaml", ONESHOT_PROCS_PER_NODE="4")
    assert other == ["--config_file", "launch/zero2.yaml", "--num_processes", "4"]


def test_two_hosts_go_by_variables(place: Place) -> None:
    assert place.launched(**HOSTS, ONESHOT_PROCS_PER_NODE="4") == several(1, "10.0.0.1", 29500, 8)


def test_a_step_goes_by_slurm(place: Place) -> None:
    port = 10000 + 42 * 10 + 1
    assert place.launched(**SLURM) == several(1, "gpu07", port, 16)
    assert place.launched(**{**SLURM, "SLURM_NODEID": "0"}) == several(0, "gpu07", port, 16)
    changed = {"ONESHOT_PORT": "2000", "ONESHOT_PROCS_PER_NODE": "3", "ONESHOT_ACCELERATE": "launch/zero3_nf4.yaml"}
    assert place.launched(**SLURM, **changed) == several(1, "gpu07", 2000, 6, "launch/zero3_nf4.yaml")


def test_ports_are_a_jobs_own_and_in_range(place: Place) -> None:
    jobs = [("1", "0"), ("1", "1"), ("2", "0"), ("1999", "9"), ("67108863", "4294967290")]
    commands = [place.launched(**{**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job, step in jobs]
    ports = {int(command[command.index("--main_process_port") + 1]) for command in commands}
    assert len(ports) == len(jobs)
    assert all(10000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("n1", "n1"),
        ("a1,b2", "a1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("login1,gpu[007-009,012]", "login1"),
        ("rack[0-1]node[3,5]", "rack0node3"),
        ("10.1.0.[5,9]", "10.1.0.5"),
        ("c[12]-ib.cluster", "c12-ib.cluster"),
    ],
)
def test_the_head_is_the_first_node_of_the_step(listed: str, first: str, place: Place) -> None:
    command = place.launched(**{**SLURM, "SLURM_STEP_NODELIST": listed})
    assert command[command.index("--main_process_ip") + 1] == first


@pytest.mark.parametrize("name", HOSTS)
def test_a_missing_variable_of_hosts_is_named(name: str, place: Place) -> None:
    said = place.refused(**{key: value for key, value in HOSTS.items() if key != name})
    assert f": {name} not set: several hosts need all of" in said


@pytest.mark.parametrize("name", [name for name in SLURM if name not in ("SLURM_JOB_ID", "SLURM_GPUS_ON_NODE")])
def test_a_missing_variable_of_slurm_is_named(name: str, place: Place) -> None:
    said = place.refused(**{key: value for key, value in SLURM.items() if key != name})
    assert f": {name} not set: this is a Slurm job but no step" in said


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (HOSTS, "how many processes per node is not known: set ONESHOT_PROCS_PER_NODE"),
        ({"SLURM_JOB_ID": "42", "SLURM_NODEID": "0"}, "start it by srun, as slurm/start.sh does"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "16"}, "started 16 tasks on 2 nodes: give sbatch --ntasks-per-node=1"),
        ({**SLURM, "SLURM_GPUS_ON_NODE": ""}, "how many processes per node is not known"),
        ({**SLURM, "ONESHOT_NODE_RANK": "0"}, "ONESHOT_NODE_RANK is set in a Slurm job"),
        ({**SLURM, "ONESHOT_NODES": "2"}, "ONESHOT_NODES is set in a Slurm job"),
        ({**SLURM, "ONESHOT_HEAD": "gpu07"}, "ONESHOT_HEAD is set in a Slurm job"),
        ({**SLURM, "SLURM_STEP_NODELIST": "nowhere"}, "the head node's name nowhere is not known here"),
        ({**SLURM, "ONESHOT_PORT": "http"}, "the port is 'http': give a whole number from 1024 to 65535"),
        ({**HOSTS, "ONESHOT_NODE_RANK": "2"}, "the rank of this node is '2': give a whole number from 0 to 1"),
        ({**HOSTS, "ONESHOT_NODES": "two"}, "the number of nodes is 'two'"),
        ({"ONESHOT_PROCS_PER_NODE": "0"}, "the number of processes per node is '0'"),
        ({"ONESHOT_ACCELERATE": "no.yaml"}, "has no no.yaml or no ds_configs/: start in the repository root"),
        ({"ONESHOT_VENV": "/no"}, "ONESHOT_VENV is /no, which has no bin/accelerate"),
        ({"ONESHOT_MODULES": "cuda"}, "ONESHOT_MODULES is set, but this shell has no command module"),
    ],
)
def test_what_is_wrong_is_one_line(variables: dict[str, str], said: str, place: Place) -> None:
    assert said in place.refused(**variables)


def test_without_a_script_there_is_nothing_to_start(place: Place) -> None:
    ran = place.run("launch/node.sh")
    assert ran.returncode == 2
    assert "nothing to start" in ran.stderr


def test_a_host_that_calls_itself_loopback_is_told(place: Place) -> None:
    place.stand_in("getent", "case $2 in 10.*) echo 10.0.0.1 ;; *) echo 127.0.1.1 ;; esac")
    known = {**HOSTS, "ONESHOT_PROCS_PER_NODE": "1"}
    assert "set GLOO_SOCKET_IFNAME" in place.run("launch/node.sh", "x.py", **known).stderr
    assert place.run("launch/node.sh", "x.py", **known, GLOO_SOCKET_IFNAME="eth0").stderr == ""


def test_modules_are_loaded_and_the_named_environment_comes_first(place: Place) -> None:
    environment = place.root / "env" / "bin"
    environment.mkdir(parents=True)
    (environment / "accelerate").write_text('#!/bin/sh\necho "from the environment, with $LOADED"\n')
    (environment / "accelerate").chmod(0o755)
    module = {"BASH_FUNC_module%%": '() { export LOADED="$*"; }', "ONESHOT_MODULES": "cuda/12.4 nccl"}
    ran = place.run("launch/node.sh", "x.py", ONESHOT_VENV="env", **module)
    assert ran.stdout.splitlines()[-1] == "from the environment, with load cuda/12.4 nccl"


def test_modules_are_found_without_an_exported_function_and_may_use_what_is_not_set(place: Place) -> None:
    """A login shell other than bash exports no function; MODULESHOME is set in every one."""
    init = place.root / "modules" / "init"
    init.mkdir(parents=True)
    (init / "bash").write_text('module() { echo "$NOBODY_SETS_THIS$*"; false || true; }\n')
    given = {"ONESHOT_MODULES": "cuda nccl", "MODULESHOME": str(init.parent)}
    ran = place.run("launch/node.sh", "x.py", **given)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "load cuda nccl" in ran.stdout.splitlines()
    (init / "bash").write_text("module() { return 1; }\n")
    assert "module load cuda nccl failed" in place.refused(**given)


def test_the_launchers_exit_code_is_passed_on(place: Place) -> None:
    assert place.run("launch/node.sh", "x.py", CODE="7").returncode == 7


LAUNCHER = "import subprocess, sys; sys.exit(subprocess.Popen(sys.argv[1:], start_new_session=True).wait())"
WORKER = """
import os, signal, sys, time
number = signal.Signals[sys.argv[1]]
heard = []
signal.signal(number, lambda *_: heard.append(number))
print("ready", flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(0.3)
print("saved", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_reaches_the_workers_and_lets_them_end(name: str, place: Place) -> None:
    """As torch's launcher does, this one starts its worker in a session of its own; it dies of any signal it gets."""
    place.stand_in("accelerate", f"exec {sys.executable} -c '{LAUNCHER}' {sys.executable} -c \"$WORKER\" {name}")
    process = subprocess.Popen(
        ["launch/node.sh", "x.py"],
        cwd=place.root,
        env=place.environment({"WORKER": WORKER}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("node 0 of 1")
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[name])
        assert process.communicate(timeout=20)[0] == "saved\n"
        assert process.returncode == 0
    finally:
        process.kill()


def test_the_launcher_survives_usr1_and_hears_ctrl_c_through_node_sh_alone(place: Place) -> None:
    """Slurm sends USR1 to every process of a step; a terminal sends INT to its foreground group."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print(os.getpgrp() == os.getpid());"
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    place.stand_in("accelerate", f"exec {sys.executable} -c '{code}'")
    ran = place.run("launch/node.sh", "x.py")
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[1:] == ["True", "True"]


def test_a_signal_before_there_are_workers(place: Place) -> None:
    """TERM ends the launcher; USR1 leaves it alone, as there is nothing to save yet."""
    place.stand_in("accelerate", f'exec {sys.executable} -c "import time; print(0, flush=True); time.sleep(30)"')
    process = subprocess.Popen(
        ["launch/node.sh", "x.py"], cwd=place.root, env=place.environment({}), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline()[:4] for _ in range(2)] == ["node", "0\n"]
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_every_node_is_started_once_and_a_failing_one_ends_the_others(place: Place) -> None:
    ran = place.run("slurm/start.sh", *STAGE, "--repair.rank", "8", SLURM_JOB_ID="42")
    *options, script, module, stage, setting, value = ran.stdout.splitlines()
    assert [script, module, stage, setting, value] == ["launch/node.sh", *STAGE, "--repair.rank", "8"]
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1", "--export=ALL"} <= set(options)
    assert "container" not in ran.stdout


def test_a_container_sees_the_repository_and_what_is_mounted(place: Place) -> None:
    pyxis = {"SLURM_JOB_ID": "42", "SRUN_HELP": "  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]"}
    ran = place.run("slurm/start.sh", "x.py", ONESHOT_CONTAINER="a.sqsh", ONESHOT_MOUNTS="/data,/b:/c", **pyxis)
    assert "--container-image=a.sqsh" in ran.stdout.splitlines()
    assert f"--container-mounts={place.root}:{place.root},/data,/b:/c" in ran.stdout.splitlines()
    assert f"--container-workdir={place.root}" in ran.stdout.splitlines()
    pyxis["SRUN_HELP"] += "\n" + "more than a pipe holds " * 5000
    assert place.run("slurm/start.sh", "x.py", ONESHOT_CONTAINER="a.sqsh", **pyxis).returncode == 0
    without = place.run("slurm/start.sh", "x.py", ONESHOT_CONTAINER="a.sqsh", SLURM_JOB_ID="42")
    assert without.returncode == 2
    assert "srun has no --container-image (Pyxis)" in without.stderr


def test_start_outside_a_job_is_an_error(place: Place) -> None:
    ran = place.run("slurm/start.sh", "x.py")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "this is no Slurm job" in ran.stderr


def submitted(place: Place, template: str, *arguments: str) -> list[str]:
    """What a template gives node.sh."""
    ran = place.run("bash", f"slurm/{template}_70b.sh", *arguments, SLURM_JOB_ID="42")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    return lines[lines.index("launch/node.sh") + 1 :]


@pytest.mark.parametrize(("template", "stage"), [("patch", "repair"), ("finetune", "finetune")])
def test_settings_after_the_template_win(template: str, stage: str, place: Place) -> None:
    """A job has one folder, and --resume in it, so that it can be requeued."""
    resumed, out = ["-m", f"oneshot.{stage}", "--resume"], ["--out", f"runs/oneshot-{template}-42"]
    config = ["--config", "launch/runs/llama3-70b.yaml"]
    assert submitted(place, template) == [*resumed, *out, *config]
    assert submitted(place, template, "--seed", "1") == [*resumed, *out, *config, "--seed", "1"]
    for mine in (["--config", "mine.yaml"], ["--config=mine.yaml"]):
        assert submitted(place, template, *mine) == [*resumed, *out, *mine]
    for mine in (["--out", "mine"], ["--out=mine"]):
        assert submitted(place, template, *mine) == [*resumed, *config, *mine]


def test_a_job_is_requeued_only_where_progress_was_saved(place: Place) -> None:
    place.stand_in("scontrol", 'echo "scontrol $*"')
    place.stand_in("srun", "exit 3")
    ran = place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42")
    assert (ran.returncode, ran.stdout) == (3, "")
    place.stand_in("srun", 'echo 7 > "$ONESHOT_PROGRESS_FILE"; exit ${CODE:-3}')
    ran = place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42")
    assert (ran.returncode, ran.stdout) == (3, "scontrol requeue 42\n")
    assert "step 7 is saved: requeue" in ran.stderr
    ran = place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", CODE="0")
    assert (ran.returncode, ran.stdout) == (0, "")
    assert list((place.root / "runs").iterdir()) == []


def test_one_task_of_an_array_is_requeued_and_not_all_of_them(place: Place) -> None:
    """The number of an array's last task is the whole array's, too, to scontrol."""
    place.stand_in("scontrol", '[ "$1" = show ] || echo "scontrol $*"')
    place.stand_in("srun", 'echo 7 > "$ONESHOT_PROGRESS_FILE"; exit 3')
    array = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "5"}
    assert place.run("slurm/start.sh", "x.py", **array).stdout == "scontrol requeue 42_5\n"


def test_a_job_that_cannot_be_requeued_keeps_its_code_and_says_how_to_go_on(place: Place) -> None:
    """An allocation of salloc, or a site or user that forbids it."""
    place.stand_in("scontrol", '[ "$1" = show ] || { echo "Only batch jobs are accepted" >&2; exit 1; }')
    place.stand_in("srun", 'echo 7 > "$ONESHOT_PROGRESS_FILE"; exit 3')
    ran = place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42")
    assert ran.returncode == 3
    assert "Slurm does not requeue it: go on with --resume and the same --out." in ran.stderr
    assert list((place.root / "runs").iterdir()) == []


def test_a_preempted_job_is_requeued_though_nothing_was_saved(place: Place) -> None:
    """A repair, or a fine-tune that still loads: told to end they fail, and Slurm itself takes that for the end."""
    facts = "JobId=42 PreemptTime=$TIME SuspendTime=None"
    place.stand_in("scontrol", f'[ "$1" = show ] && echo "{facts}" || echo "scontrol $*"')
    place.stand_in("srun", "exit ${CODE:-143}")
    time = "2026-01-01T00:00:00"
    ran = place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", TIME=time)
    assert (ran.returncode, ran.stdout) == (143, "scontrol requeue 42\n")
    assert "it makes room for another job: requeue" in ran.stderr
    assert place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", TIME="None").stdout == ""
    assert place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", TIME=time, CODE="0").stdout == ""


def test_a_job_ends_with_the_code_that_its_first_failing_rank_gave(place: Place) -> None:
    """Launchers make it a 1, and srun a 143 where it ended another node."""
    place.stand_in("srun", 'printf "$SAID" > "$ONESHOT_CODE_FILE"; exit ${CODE:-143}')
    assert place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", SAID="3\\n").returncode == 3
    assert place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", SAID="").returncode == 143
    assert place.run("slurm/start.sh", "x.py", SLURM_JOB_ID="42", SAID="3\\n", CODE="0").returncode == 0
    assert list((place.root / "runs").iterdir()) == []


def test_what_node_sh_refuses_is_a_users_mistake_to_the_job(place: Place, tmp_path: Path) -> None:
    """Where srun ends the other nodes it makes a 143 of it."""
    said = tmp_path / "code"
    place.refused(ONESHOT_VENV="/no", ONESHOT_CODE_FILE=str(said))
    assert said.read_text() == "2\n"
    said.write_text("3\n")
    place.refused(ONESHOT_VENV="/no", ONESHOT_CODE_FILE=str(said))
    assert said.read_text() == "3\n", "the first to fail is believed"
    place.refused(ONESHOT_VENV="/no", ONESHOT_CODE_FILE=str(tmp_path / "no" / "code"))


def test_the_first_rank_to_tell_its_code_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODE_FILE, str(tmp_path / "code"))
    tell_code(3)
    tell_code(1)
    assert (tmp_path / "code").read_text() == "3\n"
    monkeypatch.setenv(CODE_FILE, str(tmp_path / "no" / "code"))
    tell_code(2)
    monkeypatch.delenv(CODE_FILE)
    tell_code(2)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_templates_are_thin_and_their_options_constant(template: Path) -> None:
    text = template.read_text()
    options = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert len(text.splitlines()) <= 60
    assert not any("$" in option for option in options), "sbatch expands no variables"
    wanted = {"--nodes=2", "--gpus-per-node=8", "--requeue", "--open-mode=append", "--signal=USR1@300"}
    assert wanted <= set(options)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_job_from_another_folder_says_so(template: Path, place: Place) -> None:
    (place.root / "slurm").unlink()
    elsewhere = place.run("bash", str(template), SLURM_JOB_ID="42", SLURM_JOB_NAME="job")
    assert elsewhere.returncode == 2
    assert "job: error: " in elsewhere.stderr
    assert "is not the repository root" in elsewhere.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_no_rank_is_read_before_srun(script: Path) -> None:
    assert not re.search(r"SLURM_(PROCID|NODEID|LOCALID|NODE_ALIASES)|HOSTNAME|hostname", script.read_text())


def test_the_documents_name_every_variable() -> None:
    code = [script.read_text() for script in SCRIPTS] + [(ROOT / "oneshot/distributed/runtime.py").read_text()]
    used = set(re.findall(r"ONESHOT_[A-Z_]+[A-Z]", "\n".join(code)))
    assert used == set(re.findall(r"ONESHOT_[A-Z_]+[A-Z]", (ROOT / "docs" / "cluster.md").read_text()))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_settings_are_read_and_hold_only_what_differs(path: Path) -> None:
    settings = parse(["--config", str(path)], "repair")
    written = dict(_leaves(yaml.safe_load(path.read_text())))
    below = parse([], "repair") if path.stem == "tiny" else Settings()  # without a model the toy's settings lie below
    found, default = (dict(_leaves(dataclasses.asdict(one))) for one in (settings, below))
    assert {name: found[name] for name in written} == written
    assert {name for name in written if written[name] == default[name]} == set()
    assert {name for name in found if found[name] != default[name]} == set(written)
    if path.stem not in ("tiny", "toy"):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", written["model.path"]), "no Hub id"
        assert written["reference"] == written["model.path"]


def test_every_size_has_run_settings() -> None:
    names = {path.stem for path in RUNS}
    families = {"llama2-7b", "llama3-8b", "mistral-7b", "qwen2.5-7b", "gemma2-9b"}
    assert names == families | {
        "tiny", "toy", "llama2-13b", "llama3-70b", "qwen2.5-72b", "qwen3-30b-a3b", "gpt-oss-120b",
    }  # fmt: skip


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        nested = isinstance(value, dict) and name != "learning_rate"  # that is one value, by method
        found += _leaves(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return found


def test_how_long_ranks_wait_is_set_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONESHOT_TIMEOUT_MINUTES", raising=False)
    assert _timeout(None) == timedelta(minutes=30)
    monkeypatch.setenv("ONESHOT_TIMEOUT_MINUTES", "0.5")
    assert _timeout(None) == timedelta(seconds=30)
    assert _timeout(2.0) == timedelta(minutes=2)


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "1e13"])
def test_a_wrong_time_to_wait_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESHOT_TIMEOUT_MINUTES", text)
    with pytest.raises(UserError, match=r"^ONESHOT_TIMEOUT_MINUTES is '.*': give a number of minutes above 0\.$"):
        _timeout(None)
