"""``make real`` in small: the quick model, one attack, the default repair and the paper's recipe, 20 prompts a set.

With fewer and smaller steps than in earnest: what is shown is that all of it runs, and that the attack does its work.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real
from realmodels import attacks, methods, models, prompts, scoring
from realmodels.cells import ALIGNED, FINETUNED, Store
from realmodels.findings import HARMFUL, Findings, attack_success, bits, rate

from oneshot.patch import teacher

pytestmark = pytest.mark.timeout(2400)  # the fixture makes all cells, on a machine that may be busy
PROMPTS, FRESH = 20, 4
SHORT = {"epochs": 3, "guard_prompts": 8, "watch": False}
ALIGNMENT = {"steps": 6, "batch_size": 8, "learning_rate": 3e-4}
ATTACK = attacks.Training("full", steps=6, learning_rate=3e-4, batch_size=8)


def _quick(values: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A few epochs on an example that is named: choosing among 44 takes minutes."""

    def quick(*given: Any) -> dict[str, Any]:
        asked = values(*given)
        return {**asked, "select": "pool-01", "repair": {**asked["repair"], **SHORT}}

    return quick


@pytest.fixture(scope="module")
def made(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished cells. The cache is another: models made with fewer steps are not to be kept for ``make real``."""
    cache, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("out") / "real.json"
    for wheel in model_cache.glob("*.whl"):
        (cache / wheel.name).symlink_to(wheel.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "ALIGNMENT", ALIGNMENT)
        patch.setattr(models, "ANSWERED", {"harmless": 12, "questions": 12})
        patch.setattr(models, "REFUSED", {"restricted": 24})
        patch.setattr(attacks, "TRAININGS", {"full": ATTACK})
        patch.setattr(attacks, "TASK_SCORED", PROMPTS)
        patch.setattr(attacks, "TASK_GUARD", 8)
        patch.setattr(scoring, "PREFILLED", 4)
        patch.setattr(scoring, "STATEMENTS", 1)
        patch.setattr(scoring, "read_fresh", lambda cache, _count: prompts.read_fresh(cache, FRESH))
        patch.setattr(scoring, "NEW_TOKENS", 10)
        patch.setattr(teacher, "REFUSAL_TOKENS", 8)
        patch.setattr(methods, "repair_values", _quick(methods.repair_values))
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
        assert {name: len(verdicts) for name, verdicts in result["fresh"].items()} == dict.fromkeys(
            prompts.FRESH, FRESH
        )
        assert len(result["statements"]) == PROMPTS
        assert result["perplexity"] < 1000


def test_the_page_and_the_summary_come_from_them(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "SmolLM2-135M" in made.path.with_suffix(".md").read_text(encoding="utf-8")
    assert real.main(["--summary", "--out", str(made.path)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["attacked_models"] == 1
    (trio,) = Findings(made.read()).trios()
    assert figures["attack_success_gap_worst"] == pytest.approx(
        attack_success(trio.repaired) - attack_success(trio.aligned), abs=1e-4
    )
