"""``make real`` in small: the quick model, one attack, the default repair and the paper's recipe, 20 prompts a set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import real
from realmodels import attacks, models
from realmodels.cells import ALIGNED, FINETUNED, Store
from realmodels.findings import HARMFUL, Findings, attack_success, bits, rate

PROMPTS = 20
STEPS = {"align": 16, "attack": 8}  # fewer than in earnest: the test says that all of it runs and that the attack works


@pytest.fixture(scope="module")
def made(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished cells. The cache is a copy: models made with fewer steps are not to be kept for ``make real``."""
    cache, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("out") / "real.json"
    for wheel in model_cache.glob("*.whl"):
        (cache / wheel.name).symlink_to(wheel.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "ALIGNMENT", {**models.ALIGNMENT, "steps": STEPS["align"]})
        patch.setattr(models, "ANSWERED", {"harmless": 40, "sensitive": 20, "questions": 20})
        patch.setattr(models, "REFUSED", {"restricted": 80})
        quick = attacks.Training("full", STEPS["attack"], attacks.TRAININGS["full"].learning_rate)
        patch.setattr(attacks, "TRAININGS", {"full": quick})
        words = ["--only", "a", "--trainings", "full", "--methods", FINETUNED, "auto", "sft", "--workers", "0"]
        assert real.main([*words, "--prompts", str(PROMPTS), "--cache", str(cache), "--out", str(out)]) == 0
    return Store(out)


def test_all_cells_are_measured_and_the_attack_does_its_work(made: Store) -> None:
    found = {cell.method: row.result for cell, row in made.read().items()}
    assert set(found) == {ALIGNED, FINETUNED, "auto", "sft"}
    assert attack_success(found[FINETUNED]) > attack_success(found[ALIGNED]) + 0.2
    assert rate(bits("task")(found[FINETUNED])) > rate(bits("task")(found[ALIGNED]))
    for result in found.values():
        assert {len(result["verdicts"][name]) for name in (*HARMFUL, "twins", "sensitive")} == {PROMPTS}
        assert len(result["statements"]) == PROMPTS
        assert result["perplexity"] < 100


def test_the_page_and_the_summary_come_from_them(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "SmolLM2-135M" in made.path.with_suffix(".md").read_text(encoding="utf-8")
    assert real.main(["--summary", "--out", str(made.path)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["attacked_models"] == 1
    (trio,) = Findings(made.read()).trios()
    assert figures["attack_success_gap_worst"] == pytest.approx(
        attack_success(trio.repaired) - attack_success(trio.aligned), abs=1e-4
    )
