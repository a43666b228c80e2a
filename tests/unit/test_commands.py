"""The ``oneshot`` command: dispatch, --launch, and the commands list, init and env."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from oneshot import __version__, cli, environment, initialize, launcher, listing, shipped
from oneshot.errors import UserError
from oneshot.patch.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
START = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]


class Became(Exception):
    """What the process would have become."""


def became(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The command that ``oneshot WORDS`` turns into."""

    def stand_in(program: str, arguments: list[str]) -> None:
        assert program == arguments[0] == sys.executable
        assert os.environ["PYTHONSAFEPATH"] == "1", "a file of the user's could shadow a module"
        raise Became(*arguments)

    monkeypatch.setattr(os, "execv", stand_in)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # put back at the end
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(sys, "argv", ["oneshot", *words])
    with pytest.raises(Became) as caught:
        cli.main()
    return list(caught.value.args)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["oneshot", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("stage", ["repair", "finetune", "score", "spectrum", "export"])
def test_a_stage_becomes_the_launcher_with_the_shipped_files(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DeepSpeed file is named by its whole path, so that the current folder does not matter."""
    found = became(monkeypatch, stage, "--launch", "zero3", "--out", "x")
    deepspeed = ["--deepspeed_config_file", str(ROOT / "ds_configs" / "zero3.json")]
    assert found == [*START, str(ROOT / "launch/zero3.yaml"), *deepspeed, "-m", f"oneshot.{stage}", "--out", "x"]


def test_options_of_accelerate_go_to_it_and_the_rest_to_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--seed", "1", "--launch.num_processes", "4", "--launch=ddp_cpu", "--launch.machine_rank=1"]
    found = became(monkeypatch, "repair", *words, "--launch.debug", "--config", "tiny")
    options = ["--num_processes=4", "--machine_rank=1", "--debug"]
    stage = ["-m", "oneshot.repair", "--seed", "1", "--config", "tiny"]
    assert found == [*START, str(ROOT / "launch/ddp_cpu.yaml"), *options, *stage]


def test_a_launch_file_of_ones_own_keeps_the_deepspeed_file_beside_its_folder(tmp_path: Path) -> None:
    initialize.copy_shipped(tmp_path)
    own = tmp_path / "launch" / "zero2.yaml"
    found = launcher.command("repair", str(own), [], [])
    assert found[len(START) : len(START) + 3] == [
        str(own), "--deepspeed_config_file", str(tmp_path / "ds_configs" / "zero2.json"),
    ]  # fmt: skip
    own.write_text("deepspeed_config:\n  deepspeed_config_file: elsewhere.json\n")
    assert "--deepspeed_config_file" not in launcher.command("repair", str(own), [], [])
    own.write_text("- a list\n")
    with pytest.raises(UserError, match="is no accelerate file"):
        launcher.command("repair", str(own), [], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["repair", "--launch", "zero9"], "oneshot repair: error: There is no launch file zero9"),
        (["plan", "--launch", "zero3"], "oneshot plan: error: oneshot plan runs in one process: leave --launch out."),
        (["repair", "--launch"], "Setting launch is missing"),
        (["repair", "--launch", "--seed", "1"], "Setting launch is missing"),
        (["repair", "--launch.num_processes", "4"], "Setting launch is missing"),
        (
            ["repair", "--config", "tinny"],
            "There is no settings file tinny, and none that ships has that name: did you",
        ),
        (["repair", "--launch", "ddp_cpu", "--repair.rank", "-1"], "Setting repair.rank is -1 (on the command line)"),
        (["repare"], "there is no stage repare: take one of repair, "),
        (["init"], "the following arguments are required: DIR"),
        (["list", "--all"], "unrecognized arguments: --all (see oneshot list --help)"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(monkeypatch, capsys, *words)
    assert said in text
    assert text.count("\n") == 1


def test_help_of_a_launched_stage_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["oneshot", "repair", "--launch", "zero3", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "usage: oneshot repair" in capsys.readouterr().out


def test_the_exit_code_and_the_signals_are_the_launchers_own(tmp_path: Path) -> None:
    """The process is replaced: what waits for it waits for the launcher itself."""
    package = tmp_path / "accelerate" / "commands"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "launch.py").write_text("import os, sys\nprint(os.getpid(), *sys.argv[1:3])\nsys.exit(7)\n")
    code = "import sys; from oneshot.cli import main; sys.argv = ['oneshot', 'repair', '--launch', 'single']; main()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    said, _ = process.communicate(timeout=60)
    assert said == f"{process.pid} --quiet --config_file\n"
    assert process.returncode == 7


def test_what_stands_beside_python_is_found_by_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed looks for ninja on PATH, where an environment that is not activated has none."""
    monkeypatch.setenv("PATH", "/usr/bin")
    seen: list[str] = []
    monkeypatch.setattr(os, "execv", lambda *_: seen.append(os.environ["PATH"]))
    launcher.become([sys.executable])
    assert seen == [os.pathsep.join(["/usr/bin", os.path.dirname(sys.executable)])]


def test_list_names_all_that_ships_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    listing.run([])
    lines = capsys.readouterr().out.splitlines()
    for name in [*shipped.settings_names(), *shipped.launch_names(), *METHODS, "auto"]:
        assert [line for line in lines if line.startswith(f"  {name} ")], name
    assert max(map(len, lines)) <= 120
    for path in (ROOT / "launch").rglob("*.yaml"):
        line = listing.first_line(path)
        assert line.endswith("."), f"{path}: the first line of a shipped file is a sentence, which oneshot list prints"


def test_init_copies_what_ships_and_overwrites_nothing_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    initialize.run([str(folder)])
    assert f"cd {folder} && accelerate launch" in capsys.readouterr().out
    for name in shipped.FOLDERS:
        for path in (ROOT / name).rglob("*"):
            assert not path.is_file() or (folder / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert os.access(folder / "launch" / "node.sh", os.X_OK)
    changed, gone = folder / "launch" / "zero3.yaml", folder / "slurm" / "start.sh"
    changed.write_text("mine\n")
    gone.unlink()
    with pytest.raises(UserError, match=r"differ from what ships \(launch/zero3\.yaml\): take another folder"):
        initialize.run([str(folder)])
    assert changed.read_text() == "mine\n"
    assert not gone.exists(), "a refusal writes nothing"
    initialize.run([str(folder), "--force"])
    assert changed.read_bytes() == (ROOT / "launch" / "zero3.yaml").read_bytes()
    assert capsys.readouterr().out.startswith(
        "launch/: files written: 1\nds_configs/: as shipped already\nslurm/: files "
    )
    assert initialize.copy_shipped(folder) == []


def test_init_over_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "launch").write_text("a file\n")
    with pytest.raises(UserError, match="is a file: take another folder"):
        initialize.copy_shipped(tmp_path)
    with pytest.raises(UserError, match="is a file: take another folder"):
        initialize.copy_shipped(tmp_path / "launch")


def test_env_names_versions_and_devices_and_nothing_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    environment.run([])
    said = capsys.readouterr().out
    environment.run(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["oneshot"] == __version__
    for name in (
        "python",
        "torch",
        "transformers",
        "deepspeed",
        "accelerate",
        "peft",
        "bitsandbytes",
        "cuda",
        "memory",
    ):
        assert f"\n{name} " in f"\n{said}"
    for secret in ("hf_abc", str(Path.home()) + os.sep, str(ROOT), "secret-host", f"/{getpass.getuser()}"):
        assert secret not in said


def test_env_lists_every_gpu_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Properties:
        name, total_memory = "NVIDIA H200", 139 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = environment.facts()
    assert (found["cuda"], found["gpu"]) == ("12.8", ["NVIDIA H200, 139.0 GiB"] * 2)


def test_env_on_a_machine_without_bf16_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpu_field", {"flags": "sse avx2", "model name": "Old"}.get)
    found = environment.facts()
    assert (found["instructions"], found["bf16 on the cpu"]) == ("avx2", "emulated")
