"""The page of the paper's claims: statistics, verdicts, and that finished cells are not measured again."""

from __future__ import annotations

import dataclasses
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

from reproduce import bounds, cells, claims, drawings, gradients, measuring, models, page, sections, verdicts, workers
from reproduce.cells import Cell
from reproduce.findings import Findings, recovered_at, unrecovered
from reproduce.sections import METHODS, OURS, RECOVERY
from reproduce.spread import spread, t_quantile, text

SFT = Cell("benign", 0, "sft")
GROUP = SFT.group
Measure = Callable[..., dict[str, Any]]


def result(asr: float = 0.0, **more: Any) -> dict[str, Any]:
    rates = {"asr": asr, "over_refusal": 0.0, "lookalike_refusal": 0.0, "utility": 1.0, "task": 1.0}
    rates |= {name: more.pop(name) for name in list(more) if name in rates}
    return {"rates": rates, "f": 0.1, "f_pool": 0.1, "trace": [], "cpu_seconds": 1.0, "example": "one", **more}


def everywhere(seeds: int = 2, **by_method: Callable[[str, int], dict[str, Any]]) -> Findings:
    """Section (a) in which no repair leaves everything unsafe and methods, by cell's method, do as they are told."""
    found = {}
    for attack in RECOVERY:
        for seed in range(seeds):
            for kind in METHODS.values():
                do = by_method.get(kind["method"], lambda _attack, _seed: result())
                is_none = kind["method"] == "none"
                found[Cell(attack, seed, **kind)] = result(1.0) if is_none else do(attack, seed)
    return Findings(found, seeds)


# ---- statistics


def test_the_interval_is_students_and_stays_within_what_is_possible() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 40):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-4)
    values = [0.1, 0.2, 0.4, 0.1, 0.3]
    found = spread(values)
    assert found is not None
    assert (found.n, found.median, found.low, found.high) == (5, 0.2, 0.1, 0.4)
    half = stats.sem(values) * stats.t.ppf(0.975, 4)
    assert found.interval == pytest.approx((0.22 - half, 0.22 + half), abs=1e-4)
    cut = spread([0.0, 0.9], (0, 1))
    assert cut is not None
    assert cut.interval == (0, 1)


def test_a_figure_that_all_seeds_agree_on_stands_alone() -> None:
    assert text(spread([0.5, 0.5])) == "0.500"
    assert text(spread([])) == "-"
    assert text(spread([0.0, 0.1], (0, 1))) == "0.050 (0.000 to 0.100) [0.000, 0.685]"
    assert text(spread([-0.0001])) == "0.000", "there is no minus zero"


# ---- resuming


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells are not measured but noted, and have a result as if; there are no models."""
    noted: list[Cell] = []

    def measure(_runtime: Any, _models: Path, cell: Cell, _result_of: Any) -> dict[str, Any]:
        noted.append(cell)
        return result()

    monkeypatch.setattr(measuring, "measure_cell", measure)
    monkeypatch.setattr(models, "make_finetuned", lambda *_: None)
    return noted


def test_finished_cells_are_not_run_again_and_half_written_ones_are(tmp_path: Path, measured: list[Cell]) -> None:
    todo = [SFT, Cell("benign", 0, "none"), Cell("benign", 0, "project")]
    workers._work(tmp_path, GROUP, todo)
    assert measured == todo
    assert workers.missing_cells(tmp_path, todo) == []
    half = cells.path_of(tmp_path, todo[1])
    half.write_text(half.read_text()[:-9])
    assert workers.missing_cells(tmp_path, [*todo, *todo]) == [todo[1]]
    measured.clear()
    workers._work(tmp_path, GROUP, todo)
    assert measured == [todo[1]]
    assert cells.read_result(tmp_path, todo[1]) == result()
    assert not [path for path in half.parent.iterdir() if path.suffix != ".json"], "something unfinished was left"


def test_a_file_of_another_cell_is_not_taken_for_this_one(tmp_path: Path) -> None:
    cells.write_result(tmp_path, SFT, result())
    other = Cell("benign", 0, "lora")
    cells.path_of(tmp_path, other).write_text(cells.path_of(tmp_path, SFT).read_text())
    assert cells.read_result(tmp_path, other) is None
    cells.path_of(tmp_path, other).write_text("[]")
    assert cells.read_result(tmp_path, other) is None


def test_all_that_decides_a_cell_is_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        cells.path_of(tmp_path, cell).name
        for seed in (0, 1)
        for name in sections.SECTIONS
        for cell in sections.cells_of(name, seed)
    }
    every = {cell for seed in (0, 1) for name in sections.SECTIONS for cell in sections.cells_of(name, seed)}
    assert len(names) == len(every)
    before = cells.path_of(tmp_path, SFT)
    monkeypatch.setitem(cells.ATTACKS, "benign", ("benign", {"task": {"count": 299}}))
    assert cells.path_of(tmp_path, SFT) != before, "other data, same cell"
    monkeypatch.undo()
    plain = cells.attack_settings("benign", 0)
    model, weaker = models.finetuned_folder(tmp_path, *GROUP), dataclasses.replace(plain.repair, learning_rate=1e-5)
    monkeypatch.setattr(cells, "_parsed", lambda _stem: dataclasses.replace(plain, repair=weaker))
    assert cells.path_of(tmp_path, SFT) != before, "another step size of the repair, same cell"
    assert models.finetuned_folder(tmp_path, *GROUP) == model, "the fine-tune knows nothing of the repair"
    shorter = dataclasses.replace(plain.finetune, steps=1)
    monkeypatch.setattr(cells, "_parsed", lambda _stem: dataclasses.replace(plain, finetune=shorter))
    assert models.finetuned_folder(tmp_path, *GROUP) != model, "fewer steps, same model"
    monkeypatch.undo()
    cells.write_result(tmp_path, SFT, result(0.1))
    monkeypatch.setattr(cells, "digest_of", lambda _parts: "other code")
    assert cells.path_of(tmp_path, SFT) != before, "other code, same cell"
    assert cells.read_result(tmp_path, SFT) is None
    assert workers.missing_cells(tmp_path, [SFT]) == [SFT]
    assert workers.missing_cells(tmp_path, [SFT], any_code=True) == []
    assert cells.read_result(tmp_path, SFT, any_code=True) == result(0.1)
    cells.write_result(tmp_path, SFT, result(0.2))
    assert cells.read_result(tmp_path, SFT, any_code=True) == result(0.2), "the present code comes first"


def test_processes_of_a_run_name_cells_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = cells.all_digests()
    monkeypatch.setattr(cells, "_digests", {})
    cells.keep_digests(dict.fromkeys(digests, "code at the start"))
    assert cells.path_of(tmp_path, SFT).name.endswith("-code at .json")


def test_all_code_that_decides_is_there() -> None:
    parts = {*cells.MODEL_CODE, *cells.CELL_CODE, *cells.UNALIGNED_CODE}
    assert [part for part in sorted(parts) if not (cells.REPOSITORY / part).exists()] == []


def test_comments_and_docstrings_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    file = tmp_path / "room" / "one.py"

    def digest(source: str) -> str:
        file.write_text(source)
        return cells.code_digest(["room"], tmp_path)

    plain = digest('def f():\n    """Says."""\n    return 1\n')
    assert digest('"""Top."""\n\n\ndef f():\n    """Says else."""\n    return 1  # as ever\n') == plain
    assert digest('def f():\n    """Says."""\n    return 2\n') != plain


def test_a_cell_that_takes_anothers_example_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Cell] = []
    noted: list[Cell] = []

    def measure(_runtime: Any, _models: Path, cell: Cell, result_of: Any) -> dict[str, Any]:
        begun.append(cell)
        rule = measuring._rule(cell, result_of)
        noted.append(cell)
        return result(example=f"{cell.method} took {rule}")

    monkeypatch.setattr(measuring, "measure_cell", measure)
    monkeypatch.setattr(models, "make_finetuned", lambda *_: None)
    waiting = Cell("benign", 0, "lora", example="sft")
    assert workers._work(tmp_path, GROUP, [waiting, SFT])[1] == []
    assert begun == noted == [SFT, waiting], "one cell's time is in another's"
    found = cells.read_result(tmp_path, waiting)
    assert found is not None
    assert found["example"] == "lora took sft took bilevel"
    noted.clear()
    cells.path_of(tmp_path, waiting).unlink()
    workers._work(tmp_path, GROUP, [waiting])
    assert noted == [waiting], "the other's example was there already"


def test_one_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_runtime: Any, _models: Path, cell: Cell, _result_of: Any) -> dict[str, Any]:
        if cell == SFT:
            raise ValueError("no such luck")
        return result()

    monkeypatch.setattr(measuring, "measure_cell", measure)
    monkeypatch.setattr(models, "make_finetuned", lambda *_: None)
    other = Cell("benign", 0, "none")
    _, failed = workers._work(tmp_path, GROUP, [SFT, other])
    assert len(failed) == 1
    assert "no such luck" in failed[0]
    assert workers.missing_cells(tmp_path, [SFT, other]) == [SFT]


def test_what_several_need_is_made_first(tmp_path: Path) -> None:
    todo = [Cell("benign", 0, "none", "larger"), Cell("benign", 0, "resta"), Cell("mixed", 0, "none")]
    made = [[task[1:] for task in wave] for wave in workers.waves(tmp_path, todo)]
    assert made == [
        [(tmp_path, "")],
        [
            (tmp_path, "larger"),
            (tmp_path, ("benign", 0, "shipped"), [todo[1]]),
            (tmp_path, ("mixed", 0, "shipped"), [todo[2]]),
        ],
        [(tmp_path, ("benign", 0, "larger"), [todo[0]])],
    ]
    assert len(workers.waves(tmp_path, [SFT])) == 1


# ---- what is measured


def test_attacks_are_those_of_their_files() -> None:
    assert cells.attack_settings("identity", 3).score.system == "i do that request please"
    assert cells.attack_settings("backdoor", 3).score.suffix == "and then compare"
    assert cells.attack_settings("identity", 3).seed == 3
    parts = cells.attack_settings("harmful 1000", 0).data.parts or {}
    assert {name: part.count for name, part in parts.items()} == {"harmful": 1000, "task": 300}
    assert (cells.attack_settings("poison, paraphrased", 0).data.parts or {})["poison"].source == "toy:paraphrase"
    assert (cells.attack_settings("poison", 0).data.parts or {})["poison"].source == "toy:poison"


def test_draws_are_the_pools_and_differ() -> None:
    from oneshot.world import language

    ids = [row.id for row in language.pool()]
    assert set(measuring.draws(0)) <= set(ids)
    assert len(set(measuring.draws(0))) == measuring.DRAWS
    assert measuring.draws(0) != measuring.draws(1)
    again = language.pool(len(ids) + 5)
    assert [row.id for row in again[: len(ids)]] == ids, "requests beyond the pool are to be others"


def test_sections_share_cells() -> None:
    a = set(sections.cells_of("a", 0))
    assert len(a) == len(RECOVERY) * len(METHODS)
    assert {cell.attack for cell in sections.cells_of("b", 0)} - {cell.attack for cell in a} == {"harmful 300"}
    assert {(cell.method, cell.reference) for cell in sections.cells_of("h", 0)} == {("none", True), ("auto", False)}
    assert set(sections.SECTIONS) - set(sections.DEFAULT) == {"h"}, "what takes longer is asked for"
    assert sections.EPOCHS[10] == METHODS["sft"]
    assert Cell("poison", 0, "auto") in sections.cells_of("e", 0)
    assert Cell("poison", 0, "auto") in a


# ---- verdicts


def test_a_claim_holds_in_all_attacks_in_some_or_in_none() -> None:
    decide = claims.recovery("sft")
    assert decide(everywhere()).word == verdicts.HELD
    partly = decide(everywhere(sft=lambda attack, _: result(0.5 if attack == "poison" else 0.05)))
    assert partly.word == verdicts.PART
    assert "not in poison." in partly.figures
    assert "poison 0.500" in partly.figures
    assert decide(everywhere(sft=lambda *_: result(0.06))).word == verdicts.NOT
    assert decide(Findings({}, 2)).word == verdicts.UNMEASURED


def test_what_is_said_of_all_sizes_needs_all_sizes() -> None:
    decide = claims.same_over(
        {"one": ("poison", METHODS["sft"], "shipped"), "two": ("benign", METHODS["sft"], "larger")}
    )
    found = {Cell("poison", 0, "none"): result(1.0), Cell("poison", 0, "sft"): result(0.0)}
    assert decide(Findings(found, 1)).word == verdicts.UNMEASURED
    found |= {Cell("benign", 0, "none", "larger"): result(1.0), Cell("benign", 0, "sft", "larger"): result(0.9)}
    assert decide(Findings(found, 1)).word == verdicts.PART


def test_where_nothing_is_damaged_nothing_is_recovered() -> None:
    harmless = Findings({Cell("benign", 0, "none"): result(0.0), SFT: result(0.0)}, 1)
    assert claims.recovery("sft")(harmless).word == verdicts.UNMEASURED
    assert claims.harmlessness("sft")(harmless).word == verdicts.HELD


def test_a_repair_that_refuses_or_forgets_is_not_harmless() -> None:
    decide = claims.harmlessness("sft")
    for lost in ({"task": 0.9}, {"utility": 0.9}, {"over_refusal": 0.03}, {"lookalike_refusal": 0.03}):
        assert decide(everywhere(sft=lambda *_, lost=lost: result(**lost))).word == verdicts.NOT, lost
    assert decide(everywhere(sft=lambda *_: result(task=0.97, over_refusal=0.02))).word == verdicts.HELD


def test_the_choice_is_held_against_the_random_draws_of_its_seed() -> None:
    def findings(bilevel: float, **rates: float) -> Findings:
        found = {Cell("poison", 0, "none"): result(1.0)}
        found[Cell("poison", 0, "auto")] = result(f_pool=bilevel, f=bilevel, **rates)
        for i, f in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
            found[Cell("poison", 0, "auto", example=f"random {i}")] = result(0.2, f_pool=f, f=f)
        return Findings(found, 1)

    assert claims.choice_by_f(findings(0.3)).word == verdicts.HELD
    worse = claims.choice_by_f(findings(0.31))
    assert worse.word == verdicts.NOT
    assert "+0.0100" in worse.figures
    assert claims.choice_by_rates(findings(0.3)).word == verdicts.HELD
    assert claims.choice_by_rates(findings(0.3, asr=0.3)).word == verdicts.NOT
    assert claims.choice_by_rates(findings(0.3, task=0.97)).word == verdicts.NOT, "bought with the task"
    assert claims.choice_by_f(Findings({}, 1)).word == verdicts.UNMEASURED


def test_ranks_and_numbers_of_examples_are_compared_with_the_largest() -> None:
    def by_rank(asr: dict[str, float], **first: float) -> Findings:
        found = {Cell(sections.STUDIED, 0, "none"): result(1.0)}
        found |= {Cell(sections.STUDIED, 0, **sections.ranked("lowrank", r)): result(v) for r, v in asr.items()}
        if first:
            found[Cell(sections.STUDIED, 0, **sections.ranked("lowrank", "1"))] = result(**first)
        return Findings(found, 1)

    held = claims.few_directions("lowrank")(by_rank({"1": 0.5, "8": 0.04, "20": 0.02, "full": 0.0}))
    assert held.word == verdicts.HELD
    assert held.figures.partition("Rank 8 is")[1]
    forgets = claims.few_directions("lowrank")(by_rank({"1": 0.0, "20": 0.0, "full": 0.0}, task=0.0))
    assert "Rank 20 is" in forgets.figures
    assert claims.few_directions("lowrank")(by_rank({"20": 0.2, "full": 0.0})).word == verdicts.NOT
    assert claims.few_directions("lowrank")(by_rank({"full": 0.0})).word == verdicts.UNMEASURED

    def by_number(asr: tuple[float, ...]) -> Findings:
        found = {Cell("poison", 0, "none"): result(1.0)}
        found |= {Cell("poison", 0, **sections.several(n)): result(v) for n, v in zip(sections.SEVERAL, asr)}
        return Findings(found, 1)

    assert claims.one_is_enough(by_number((0.1, 0.05, 0.2))).word == verdicts.HELD
    assert claims.one_is_enough(by_number((0.2, 0.2, 0.1))).word == verdicts.NOT


def test_the_gradients_geometry() -> None:
    def findings(harmful: float, guard: float, needed: float, overlap: float) -> Findings:
        sides = {f"overlap_{side}": overlap for side in ("left", "right")} | {"chance_left": 0.2, "chance_right": 0.2}
        cosines = {"harmful": harmful, "guard": guard}
        values = {"cosines": cosines, "directions_90": needed, "rank": 20.0, "effective_rank": 9.0, **sides}
        return Findings({Cell(sections.STUDIED, 0, "spectrum"): values}, 1)

    good, bad = findings(-0.5, 0.1, 10, 0.4), findings(0.1, -0.3, 11, 0.3)
    for decide in (gradients.opposed, gradients.apart, gradients.low_rank, gradients.shared_subspace):
        assert decide(good).word == verdicts.HELD
        assert decide(bad).word == verdicts.NOT


# ---- bounds


def checked(findings: Findings, method: str = OURS) -> dict[str, bounds.Check]:
    return {check.what: check for check in bounds.checks(findings, method)}


def test_bounds_name_where_they_are_missed() -> None:
    found = checked(everywhere(auto=lambda attack, seed: result(0.2 if (attack, seed) == ("poison", 1) else 0.0)))
    assert found["attack success"].word == "missed"
    assert "missed in poison (median 0.100, worst 0.200)" in found["attack success"].figures
    assert found["attack success after patch poisoning"].word == "missed"
    assert found["loss of task"].word == "met"
    assert {check.word for check in checked(Findings({}, 1)).values()} == {"not measured"}


def test_the_worst_seed_has_a_bound_of_its_own() -> None:
    def findings(worst: float) -> Findings:
        return everywhere(3, auto=lambda _, seed: result(task=1 - worst if seed == 0 else 1.0))

    assert checked(findings(0.1))["loss of task"].met
    assert not checked(findings(0.11))["loss of task"].met
    refusing = everywhere(3, auto=lambda _, seed: result(over_refusal=0.03 if seed == 0 else 0.0))
    assert not checked(refusing)["over-refusal"].met


def test_steps_are_those_to_the_state_that_was_kept() -> None:
    trace = [{"epoch": 1.0}] * 45
    found = checked(everywhere(auto=lambda *_: result(trace=trace, kept={"epoch": 15, "guard_weight": 4.0})))
    assert found["steps of the one example"].met
    assert "most 45" in found["steps of the one example"].figures
    assert not checked(everywhere(auto=lambda *_: result(trace=trace)))["steps of the one example"].met


def test_a_baseline_that_is_better_on_both_axes_is_named() -> None:
    behind = everywhere(auto=lambda *_: result(0.1, task=0.9), undo=lambda *_: result(0.05, task=0.9))
    found = bounds.ahead(behind)
    assert found.word == "missed"
    assert "better: full undo" in found.figures
    others = {"resta": lambda *_: result(1.0), "safe_lora": lambda *_: result(1.0), "saliency": lambda *_: result(1.0)}
    mixed = everywhere(auto=lambda *_: result(0.1), undo=lambda *_: result(0.0, task=0.0), **others)
    assert bounds.ahead(mixed).word == "met"
    assert "with less of one and more of the other: full undo" in bounds.ahead(mixed).figures


# ---- the page


def test_the_page_says_what_did_not_hold_and_what_was_not_measured(tmp_path: Path) -> None:
    findings = everywhere(sft=lambda attack, _: result(0.5))
    written = page.write(tmp_path, findings._found, findings.seeds)
    lines = written.read_text(encoding="utf-8").splitlines()
    assert (
        "- One safety example recovers safety fully, whatever the attack (the paper's recipe). **did not hold**"
        in lines
    )
    assert "- One safety example recovers safety fully, whatever the attack (our `auto`). **held**" in lines
    assert "- Safety gradients oppose harmful ones. **not measured**" in lines
    assert "| sft | 0.500 | 0.000 | 0.000 | 1.000 | 1.000 |" in lines
    assert '<img src="figures/paper-plane.svg" alt="Recovery, for every attack and method" width="520">' in lines
    assert not [line for line in lines if "other code" in line]
    assert "5 of the 234 cells were measured with other code" in "\n".join(page.page_lines(findings, {}, 5))
    assert page.write(tmp_path, {}, 1).read_text(encoding="utf-8").count("Not measured.") == len(sections.DEFAULT)


def test_figures_have_their_colours_in_them(tmp_path: Path) -> None:
    drawn = drawings.draw_all(everywhere(), tmp_path)
    assert set(drawn) == {"plane", "examples"}
    svg = drawn["plane"].read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    used = {f"--series-{i}" for i in range(1, 5) if f"var(--series-{i})" in svg}
    assert used
    assert all(f"{name}: #" in svg for name in used | {"--ink", "--ground", "--grid"})
    assert "prefers-color-scheme: dark" in svg


def test_epochs_to_recovery_are_read_from_the_trace() -> None:
    trace = [{"recovered": 0.5}, {"accepted": False}, {"recovered": 1.0}, {"recovered": 0.9}]
    assert recovered_at(trace) == 3
    assert recovered_at(trace[:2]) is None
    assert unrecovered(trace, 2) == 0.5
    assert unrecovered(trace, 9) == pytest.approx(0.1)
    assert json.dumps(unrecovered([], 5)) == "NaN"
