"""The wheel is the whole product: built, installed outside the checkout, and run from an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
RATES = ("asr", "over_refusal", "lookalike_refusal", "utility", "task")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel, and an empty folder to work in."""

    python: Path
    work: Path

    @property
    def oneshot(self) -> str:
        return str(self.python.parent / "oneshot")

    def run(self, *command: str, code: int = 0, timeout: float = 200) -> str:
        """What the command prints; its exit code is as expected."""
        ran = subprocess.run(
            command, cwd=self.work, env=environment(self.python), capture_output=True, text=True, timeout=timeout
        )
        assert ran.returncode == code, f"{ran.stdout[-3000:]}\n{ran.stderr[-6000:]}"
        return ran.stdout + ran.stderr


def environment(python: Path) -> dict[str, str]:
    """Nothing of the checkout: neither its package on Python's path nor a setting of ours."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "ONESHOT_"))}
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def built(source: Path, kind: str, folder: Path) -> Path:
    """Build a wheel or sdist in ``source`` with the setuptools of this environment: no network."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(folder)!r}))"
    clean = environment(Path(sys.executable))
    ran = subprocess.run([sys.executable, "-c", code], cwd=source, env=clean, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel of the checkout's files, and the one of the sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for name in ("oneshot", "launch", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    for name in ("wheels", "sdist", "from_sdist"):
        (folder / name).mkdir()
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Debian 12's Python 3.11.2 has none
    shutil.unpack_archive(built(source, "sdist", folder / "sdist"), folder / "unpacked", **safely)
    unpacked = next((folder / "unpacked").iterdir())
    return built(source, "wheel", folder / "wheels"), built(unpacked, "wheel", folder / "from_sdist")


@pytest.fixture(scope="module")
def installed(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A fresh environment: the wheel, and this one's other packages by path, without its editable oneshot."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheels[0])], check=True, timeout=120, cwd=folder, env=environment(Path(sys.executable)))
    own = next((folder / "venv").glob("lib/python*/site-packages"))
    # a folder that a .pth names is searched, but its own .pth files, the editable install among them, are not read
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    script = python.parent / "accelerate"  # which installing it here would have made
    script.write_text(f"#!{python}\nfrom accelerate.commands.accelerate_cli import main\n\nmain()\n")
    script.chmod(0o755)
    (folder / "work").mkdir()
    made = Installed(python, folder / "work")
    found = made.run(str(python), "-c", "import oneshot; print(oneshot.__file__)").strip()
    assert Path(found).is_relative_to(own)
    return made


def test_the_sdist_builds_the_same_wheel(wheels: tuple[Path, Path]) -> None:
    one, other = ({i.filename: a.read(i) for i in a.infolist()} for a in map(zipfile.ZipFile, wheels))
    assert one == other


def test_the_wheel_holds_what_stands_beside_the_package_in_the_checkout(wheels: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(wheels[0])
    held = {name for name in archive.namelist() if name.startswith("oneshot/shipped_files/")}
    files = [path for name in ("launch", "ds_configs", "slurm") for path in (ROOT / name).rglob("*") if path.is_file()]
    assert held == {f"oneshot/shipped_files/{path.relative_to(ROOT)}" for path in files}
    node = archive.getinfo("oneshot/shipped_files/launch/node.sh")
    assert node.external_attr >> 16 & 0o111, "a script that cannot be started"


def test_it_says_its_version_its_names_and_its_environment(installed: Installed) -> None:
    from oneshot import __version__

    assert installed.run(installed.oneshot, "--version") == f"oneshot {__version__}\n"
    names = installed.run(installed.oneshot, "list")
    assert all(f"\n  {name} " in names for name in ("llama3-70b", "attacks/mixed", "prompts/xstest", "zero3_cpu"))
    said = installed.run(installed.oneshot, "env")
    assert re.search(rf"^oneshot +{re.escape(__version__)}$", said, re.MULTILINE)


def test_the_demo_runs_in_one_process_and_in_two_with_the_same_outcome(installed: Installed) -> None:
    small = ["--config", "tiny", "--select", "hardest"]
    installed.run(installed.oneshot, "repair", *small, "--out", "one")
    said = installed.run(installed.oneshot, "repair", "--launch", "zero2_cpu", *small, "--out", "two")
    assert "Traceback" not in said
    reports = [json.loads((installed.work / name / "report.json").read_text()) for name in ("one", "two")]
    assert [report["world_size"] for report in reports] == [1, 2]
    assert reports[0]["example"]["id"] == reports[1]["example"]["id"]
    rates = [[stage[rate]["value"] for stage in report["stages"].values() for rate in RATES] for report in reports]
    assert rates[0] == pytest.approx(rates[1], abs=0.05)
    assert reports[0]["stages"]["finetuned"]["asr"]["value"] >= 0.9
    assert (installed.work / "two" / "patch" / "adapter_model.safetensors").is_file()


def test_plan_is_the_checkouts(installed: Installed, tmp_path: Path) -> None:
    """The DeepSpeed numbers come with the wheel: where they are missing, ten rows differ."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = ["plan", "--json", "--model.path", str(tmp_path / "config.json"), "--gpus", "2", "--gpu_memory", "80GB"]
    checkout = {**environment(Path(sys.executable)), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "oneshot", *words]
    here = subprocess.run(command, cwd=ROOT, env=checkout, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(installed.run(installed.oneshot, *words)) == json.loads(here.stdout)


def test_a_folder_of_ones_own_runs_with_its_own_files(installed: Installed) -> None:
    said = installed.run(installed.oneshot, "init", "mine")
    assert "cd mine && accelerate launch --config_file launch/zero3.yaml -m oneshot.repair" in said
    mine = Installed(installed.python, installed.work / "mine")
    kept = mine.work / "launch" / "ddp_cpu.yaml"
    kept.write_text(kept.read_text() + "# changed\n")
    refused = installed.run(installed.oneshot, "init", "mine", code=2)
    assert "Files in mine differ from what ships (launch/ddp_cpu.yaml)" in refused
    assert kept.read_text().endswith("# changed\n")
    small = ["-m", "oneshot.repair", "--config", "launch/runs/tiny.yaml", "--select", "hardest", "--out", "out"]
    mine.run("env", "ONESHOT_ACCELERATE=launch/zero3_cpu.yaml", "launch/node.sh", *small)
    assert json.loads((mine.work / "out" / "report.json").read_text())["world_size"] == 2
