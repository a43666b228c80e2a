"""How stages are launched: the whole chain on two ranks, nothing shadowed, and a --help that is there at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from harness import BIN, ROOT, launch, run

pytestmark = pytest.mark.distributed
STAGES = [ROOT / "oneshot" / f"{name}.py" for name in ("repair", "finetune", "score", "export", "spectrum")]
BY_PATH = [stage for stage in STAGES if stage.stem != "export"]
HELP_WITHIN = 2.0  # seconds


@pytest.mark.parametrize("topology", ["ddp", "zero3"])
def test_the_chain_is_run_and_written_once(topology: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--finetune.steps", "4", "--repair.epochs", "3", "--repair.watch", "false", "--shortlist", "1"]
    arguments += ["--score.max_new_tokens", "4", "--profile", "--out", str(out)]
    ran = launch(topology, ROOT / "oneshot" / "repair.py", *arguments).check()
    assert {path.name for path in out.iterdir()} == {
        "settings.yaml", "events.jsonl", "report.json", "report.html", "report.md", "answers.jsonl", "selection.json",
        "profile.json", "finetuned", "patch",
    }  # fmt: skip
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["stage"] == "finetune"] == [1, 2, 3, 4]
    assert [e["epoch"] for e in events if e["stage"] == "repair"] == [1, 2, 3]
    report = json.loads((out / "report.json").read_text())
    assert set(report["stages"]) == {"aligned", "finetuned", "repaired"}
    assert report["world_size"] == len(report["resources"]["peak_rss_bytes"]) == 2
    profile = {row["phase"]: row for row in report["resources"]["profile"]}
    assert {"start", "read", "train", "generate", "choose", "solve", "write", "other"} <= set(profile)
    for name in ("train", "generate", "choose", "solve"):
        assert profile[name]["slowest_seconds"] >= profile[name]["seconds"] > 0
        assert profile[name]["tokens_per_second"] > 0
    checkpoint = (out / "finetuned" / "model.safetensors").stat().st_size
    assert profile["write"]["written_bytes"] >= checkpoint
    assert profile["read"]["read_bytes"] > 2 * checkpoint, "aligned and fine-tuned model, each once for all ranks"
    assert profile["read"]["read_bytes"] < 8 * checkpoint
    for once in (
        "fine-tune: 4 steps in ",
        "repair: 3 epochs in ",
        "Method: rollback",
        "attack success (keywords)",
        "Report: ",
    ):
        assert ran.out.count(once) == 1, f"{once!r} stands {ran.out.count(once)} times in\n{ran.out}"
    assert ran.err == "", "chatter of the libraries"


@pytest.mark.parametrize("stage", BY_PATH, ids=lambda path: path.stem)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_launched_stage_shadows_no_module(stage: Path, elsewhere: bool, tmp_path: Path) -> None:
    """``python oneshot/repair.py`` puts oneshot/ first on sys.path; the probe runs the file just so."""
    cwd = tmp_path if elsewhere else ROOT
    given = stage if elsewhere else stage.relative_to(ROOT)
    folders = [p.stem for p in (ROOT / "oneshot").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    assert "distributed" in folders
    code = (
        "import importlib.util, json, os, runpy, sys\n"
        f"sys.path[0] = os.path.dirname(os.path.abspath({str(given)!r}))\n"
        f"runpy.run_path({str(given)!r}, run_name='not_main')\n"
        "names = [n for n in json.loads(sys.argv[1]) if not n.startswith('__')]\n"
        "found = {n: getattr(importlib.util.find_spec(n), 'origin', None) for n in names}\n"
        "import oneshot\n"
        "print(json.dumps({'path': sys.path, 'found': found, 'package': oneshot.__file__}))\n"
    )
    ran = run([sys.executable, "-c", code, json.dumps(folders)], cwd=cwd).check()
    seen = json.loads(ran.out)
    assert str(ROOT / "oneshot") not in [os.path.realpath(p) for p in seen["path"]]
    shadowed = {n: where for n, where in seen["found"].items() if where and where.startswith(str(ROOT / "oneshot"))}
    assert shadowed == {}
    assert Path(seen["package"]) == ROOT / "oneshot" / "__init__.py"


def test_a_stage_is_launched_from_another_folder(tmp_path: Path) -> None:
    arguments = ["--finetune.steps", "1", "--finetune.batch_size", "2", "--out", "here"]
    launch("single", ROOT / "oneshot" / "finetune.py", *arguments, cwd=tmp_path).check()
    assert (tmp_path / "here" / "finetuned" / "model.safetensors").is_file()


@pytest.mark.parametrize("arguments", [[], *[[stage.stem] for stage in STAGES]], ids=lambda a: " ".join(a) or "oneshot")
def test_help_is_there_at_once(arguments: list[str]) -> None:
    command = [str(BIN / "oneshot"), *arguments, "--help"]
    best = min((run(command).check() for _ in range(3)), key=lambda ran: ran.seconds)
    assert "usage: oneshot" in best.out
    assert best.seconds < HELP_WITHIN
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['oneshot', *{arguments!r}, '--help']\n"
        "try:\n    runpy.run_module('oneshot', run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'peft', 'datasets', 'numpy', 'matplotlib'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    assert run([sys.executable, "-c", code]).check().out.splitlines()[-1] == "heavy: []"
