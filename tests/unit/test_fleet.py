"""Many adapters of one base: what is loaded once, what goes on when one fails, what is not done twice."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import oneshot
from oneshot import fleet, shared
from oneshot.commandline import parse
from oneshot.errors import Unmet, UserError
from oneshot.patch.path import ATTEMPTS
from oneshot.patch.select import Chosen
from oneshot.report.fleet import Row, write_rows
from oneshot.report.runfolder import write_report


class Tokenizer:
    chat_template = "{{ messages }}"

    def __init__(self, words):
        self.words = words

    def get_vocab(self):
        return self.words


class Stand:
    """Stands in for the repair, and notes what it is asked."""

    def __init__(self):
        self.loads, self.chosen_for, self.fails, self.words = 0, [], set(), {}
        self.judges, self.bases = set(), 0

    def ways(self):
        return fleet.Ways(self.check, self.repair)

    def pinned(self, settings):
        if settings.reference_revision == "nosuch":
            raise UserError("Revision nosuch is not to be had: check it.")
        return dataclasses.replace(settings, model=dataclasses.replace(settings.model, base_revision="commit"))

    def base(self, request, model):
        self.bases += 1
        return {"aligned": 1}

    def check(self, settings, runtime):
        name = os.path.basename(settings.model.path)
        if name in self.fails:
            raise UserError(f"{name} is broken: mend it.")
        method = SimpleNamespace(name="rollback", cost=SimpleNamespace(trains="nothing"))
        return SimpleNamespace(
            settings=settings, runtime=runtime, adapter=object(), recipe=SimpleNamespace(method=method),
            conversations=[SimpleNamespace(id="another"), SimpleNamespace(id="one")],
            tokenizer=Tokenizer(self.words.get(name, {"a": 1})), source=SimpleNamespace(checkpoint=None),
        )  # fmt: skip

    def repair(self, request, run_dir, console, shared):
        name = os.path.basename(request.settings.model.path)
        if f"{name} later" in self.fails:
            raise UserError(f"{name} has no good point: look at it.")
        self.judges.add(shared.classifier)
        self.indices = {shared.chosen.index} if shared.chosen else set()
        self.chosen_for.append((name, shared.chosen.selected_by if shared.chosen else None))
        rates = {"asr": {"value": 0.9, "low": 0.8, "high": 1.0, "n": 10}}
        report = {
            "schema": 1, "model": name, "seed": 0, "world_size": 1, "versions": {}, "resources": {"seconds": {"a": 2}},
            "stages": {"finetuned": rates, "repaired": {"asr": {**rates["asr"], "value": 0.0}}},
            "example": {"id": "one", "selected_by": "bilevel"}, "repair": None,
        }  # fmt: skip
        write_report(run_dir, report)
        return Chosen(3, "bilevel", 0.5, {"table": []}), report


@pytest.fixture
def stand(monkeypatch):
    found = Stand()

    @contextlib.contextmanager
    def loaded(_request):
        found.loads += 1
        yield SimpleNamespace(model=None)

    monkeypatch.setattr("oneshot.checkpoint.loading.pinned.pinned", found.pinned)
    monkeypatch.setattr("oneshot.patch.bench.loaded", loaded)
    monkeypatch.setattr("oneshot.patch.teacher.wanted", lambda _request: False)
    monkeypatch.setattr("oneshot.patch.aligned.of_reference", lambda _request: ({}, None))
    monkeypatch.setattr("oneshot.patch.aligned.of_base", found.base)
    monkeypatch.setattr(
        "oneshot.report.members.find_source",
        lambda model, _runtime: SimpleNamespace(checkpoint=(Path(model.path) / "base").read_text()),
    )
    return found


@pytest.fixture
def adapters(tmp_path):
    def make(*names, base="one"):
        for name in names:
            (tmp_path / "ads" / name).mkdir(parents=True)
            (tmp_path / "ads" / name / "adapter_config.json").write_text("{}")
            (tmp_path / "ads" / name / "base").write_text(base)
        return str(tmp_path / "ads" / "*")

    return make


def settings(pattern, out, *more):
    return parse(["--model.paths", pattern, "--out", str(out), *more], "repair")


def test_the_base_is_loaded_and_the_example_chosen_once(stand, adapters, tmp_path):
    (tmp_path / "ads" / "no adapter").mkdir(parents=True)
    rows = fleet.run(settings(adapters("a", "b", "c"), tmp_path / "out"), stand.ways(), quiet=True)
    assert stand.loads == stand.bases == 1
    assert stand.chosen_for == [("a", None), ("b", "bilevel, for a"), ("c", "bilevel, for a")]
    assert [(row.name, row.outcome, row.rates["asr"]) for row in rows] == [
        (n, rows[0].outcome, (0.9, 0.0)) for n in "abc"
    ]
    table = json.loads((tmp_path / "out" / "fleet.json").read_text())
    assert [row["adapter"] for row in table["rows"]] == [str(tmp_path / "ads" / name) for name in "abc"]
    assert "| b |" in (tmp_path / "out" / "fleet.md").read_text()
    own = (tmp_path / "out" / "b" / "settings.yaml").read_text()
    assert f"path: {tmp_path / 'ads' / 'b'}" in own, "it can be repaired alone from its own settings"
    assert "paths: null" in own
    assert "base_revision: commit" in own


def test_a_judge_is_loaded_once(stand, adapters, tmp_path, monkeypatch):
    loads = []

    @contextlib.contextmanager
    def loaded(_runtime, score):
        loads.append(score.judge_model)
        yield "the judge"

    monkeypatch.setattr("oneshot.measure.classifier.loaded_classifier", loaded)
    given = settings(adapters("a", "b"), tmp_path / "out", "--score.judge_model", "guard")
    fleet.run(given, stand.ways(), quiet=True)
    assert (loads, stand.judges) == (["guard"], {"the judge"})


@pytest.mark.parametrize("when", ["b", "b later"])
def test_one_that_fails_stops_no_other_and_is_taken_up_again(stand, adapters, tmp_path, when):
    pattern, out = adapters("a", "b", "c"), tmp_path / "out"
    stand.fails = {when}
    with pytest.raises(UserError, match=r"1 of 3 adapters were not repaired.*ads/b.*--resume"):
        fleet.run(settings(pattern, out), stand.ways(), quiet=True)
    assert [name for name, _ in stand.chosen_for] == ["a", "c"]
    assert "failed" in (out / "fleet.md").read_text()
    stand.fails, stand.chosen_for = set(), []
    rows = fleet.run(settings(pattern, out, "--resume", "true"), stand.ways(), quiet=True)
    assert stand.chosen_for == [("b", "bilevel, for a")], "the others are through, and their example is taken"
    assert stand.indices == {1}
    assert all(row.rates["asr"] == (0.9, 0.0) and not row.problem for row in rows)
    with pytest.raises(Unmet, match=r"3 of 3 outcomes are not 'repaired'.*a, b, c"):
        fleet.run(settings(pattern, out, "--resume", "true", "--require", "repaired"), stand.ways(), quiet=True)
    with pytest.raises(UserError, match="already holds a fleet"):
        fleet.run(settings(pattern, out), stand.ways(), quiet=True)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_changed_is_not_taken_for_repaired(stand, adapters, tmp_path, name):
    pattern, out = adapters("a"), tmp_path / "out"
    fleet.run(settings(pattern, out), stand.ways(), quiet=True)
    changed = tmp_path / "ads" / "a" / name
    changed.write_bytes(b'{"lora_alpha": 64}')
    os.utime(changed, (1, 1))  # as cp -p and rsync leave it
    with pytest.raises(UserError, match="another adapter"):
        fleet.run(settings(pattern, out, "--resume", "true"), stand.ways(), quiet=True)


def test_other_settings_are_not_gone_on_with_and_another_spelling_of_the_path_is(
    stand, adapters, tmp_path, monkeypatch
):
    pattern, out = adapters("a"), tmp_path / "out"
    fleet.run(settings(pattern, out), stand.ways(), quiet=True)
    with pytest.raises(UserError, match=r"other settings.*repair\.rank"):
        fleet.run(settings(pattern, out, "--resume", "true", "--repair.rank", "3"), stand.ways(), quiet=True)
    monkeypatch.chdir(tmp_path)
    fleet.run(settings("ads/*", out, "--resume", "true"), stand.ways(), quiet=True)
    assert [name for name, _ in stand.chosen_for] == ["a"]


def test_links_and_names_that_look_alike_lose_no_adapter(stand, adapters, tmp_path):
    adapters("a-b/c", "a/b-c", "x/c")
    (tmp_path / "ads" / "x" / "latest").symlink_to(tmp_path / "ads" / "x" / "c")
    fleet.run(settings(str(tmp_path / "ads" / "*" / "*"), tmp_path / "out"), stand.ways(), quiet=True)
    rows = json.loads((tmp_path / "out" / "fleet.json").read_text())["rows"]
    assert sorted(row["adapter"] for row in rows) == [str(tmp_path / "ads" / n) for n in ("a-b/c", "a/b-c", "x/c")]
    assert len({row["name"] for row in rows}) == 3


def test_a_revision_that_there_is_not_repairs_nothing(stand, adapters, tmp_path):
    given = settings(adapters("a"), tmp_path / "out", "--reference", "lab/model", "--reference_revision", "nosuch")
    with pytest.raises(UserError, match=r"1 of 1 adapters were not repaired.*Revision nosuch is not to be had"):
        fleet.run(given, stand.ways(), quiet=True)
    assert stand.chosen_for == []


def test_room_is_looked_for_for_every_merged_checkpoint_that_is_to_come(stand, adapters, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr("oneshot.checkpoint.disk.files.stored_bytes", lambda _: 10)
    monkeypatch.setattr("oneshot.report.preflight.look_around", lambda *given: needed.append(given[3]))
    pattern, out, merge = adapters("a", "b", "c"), tmp_path / "out", ("--repair.merge", "true")
    stand.fails = {"b later", "c later"}
    with pytest.raises(UserError, match="2 of 3"):
        fleet.run(settings(pattern, out, *merge), stand.ways(), quiet=True)
    stand.fails = set()
    fleet.run(settings(pattern, out, *merge, "--resume", "true"), stand.ways(), quiet=True)
    fleet.run(settings(pattern, tmp_path / "other"), stand.ways(), quiet=True)
    assert needed == [30, 20, 0], "those that are through have theirs; without merging there are none"


def test_runs_are_not_put_among_the_adapters(stand, adapters, tmp_path):
    for out in ("ads", "ads/a"):
        if not (tmp_path / "ads").exists():
            adapters("a")
        with pytest.raises(UserError, match="among the adapters"):
            fleet.run(settings(str(tmp_path / "ads" / "*"), tmp_path / out), stand.ways(), quiet=True)


def test_other_bases_and_other_words_are_refused(stand, adapters, tmp_path):
    pattern = adapters("a", "b")
    stand.words = {"b": {"a": 2}}
    with pytest.raises(UserError, match="tokenizer or chat template"):
        fleet.run(settings(pattern, tmp_path / "out"), stand.ways(), quiet=True)
    adapters("c", base="two")
    with pytest.raises(UserError, match=r"a is an adapter of one, and .*c of two"):
        fleet.run(settings(pattern, tmp_path / "other"), stand.ways(), quiet=True)
    assert stand.loads == 1


def test_the_table_in_markdown_aligns_numbers_alone_to_the_right(tmp_path):
    write_rows(tmp_path, [Row("a", "a", "repaired", {"asr": (1.0, 0.0)}, "pool-1", 2.0)], 1)
    heads, align = (tmp_path / "fleet.md").read_text().splitlines()[2:4]
    by_head = dict(zip(heads.split(" | "), align.split(" | ")))
    assert [head.strip("| ") for head, how in by_head.items() if ":" not in how] == ["adapter", "outcome", "example"]


def test_what_makes_no_sense_is_refused(stand, adapters, tmp_path):
    with pytest.raises(UserError, match="No adapter folder"):
        fleet.run(settings(str(tmp_path / "none*"), tmp_path / "out"), stand.ways(), quiet=True)
    with pytest.raises(UserError, match="log_with is for one model"):
        fleet.run(settings(adapters("a"), tmp_path / "o", "--log_with", "wandb"), stand.ways(), quiet=True)
    with pytest.raises(UserError, match="delete_degraded removes only what a run itself fine-tuned"):
        fleet.run(settings(adapters("a2"), tmp_path / "o", "--delete_degraded", "true"), stand.ways(), quiet=True)
    with pytest.raises(UserError, match="both given"):
        settings("x*", tmp_path, "--model.path", "x")
    assert parse(["--config", "toy", "--model.paths", "x*"], "repair").model.path is None, "a file's one gives way"
    with pytest.raises(UserError, match=r"model\.paths is empty"):
        settings("", tmp_path)
    with pytest.raises(UserError, match="in Python repair one"):
        oneshot.repair(model={"paths": "x*"})
    with pytest.raises(UserError, match="has the name of the fleet's own table"):
        fleet.run(settings(adapters("fleet.json"), tmp_path / "p"), stand.ways(), quiet=True)
    with pytest.raises(UserError, match="for oneshot repair, not score"):
        parse(["--model.paths", "x*"], "score")


class Found:
    """A watch whose best point costs so much, and whether that is good enough."""

    def __init__(self, cost):
        self.enough, self.bounds = cost == 0, None
        self.best = SimpleNamespace(cost=cost, better=lambda other, _bounds: cost <= other.cost)


@pytest.fixture
def tried(monkeypatch):
    """Choose and solve on a stand-in; returns what was tried, and lets the test say what it came to."""
    told, costs, given = [], {}, []

    def choose(_bench, chosen, batch):
        given.append(batch)
        chosen = chosen or Chosen(7, "bilevel", 0.1, begun="a trial")
        return SimpleNamespace(chosen=chosen, batch="batch")

    def solve(_bench, _batch, index, _listen, begun, attempts):
        told.append((index, begun, attempts))
        return SimpleNamespace(watch=Found(costs[index]) if index in costs else None, index=index)

    @dataclasses.dataclass
    class Choice:
        chosen: Chosen
        batch: str = "batch"

    monkeypatch.setattr("oneshot.patch.choose.choose", lambda *asked: Choice(choose(*asked).chosen))
    monkeypatch.setattr("oneshot.patch.solve.solve", solve)

    def run(found, *, lent=True, candidates=9, select="bilevel"):
        costs.update(found)
        request = SimpleNamespace(
            settings=SimpleNamespace(select=select, seed=0), candidates=[None] * candidates
        )  # fmt: skip
        chosen = Chosen(3, "bilevel, for a", 0.5) if lent else None
        choice, solution = shared.solved(SimpleNamespace(request=request), chosen, lambda _: None, lent=lent)
        return choice.chosen.selected_by, solution.index, told

    run.given = given
    return run


def test_a_lent_example_that_is_good_enough_is_tried_and_no_other(tried):
    assert tried({3: 0.0}) == ("bilevel, for a", 3, [(3, None, 1)])


def test_where_a_lent_example_fails_one_is_chosen_as_if_alone_and_the_better_repair_stays(tried):
    said, index, told = tried({3: 0.4, 7: 0.1})
    assert (index, told) == (7, [(3, None, 1), (7, "a trial", ATTEMPTS)])
    assert said == "bilevel, as the example of the others came to no good point"
    assert tried.given == [None, "batch"], "the guard's prompts are answered once"


def test_a_choice_that_comes_to_less_is_not_kept(tried):
    assert tried({3: 0.1, 7: 0.4})[:2] == ("bilevel, for a", 3)


def test_an_example_of_its_own_has_all_its_attempts(tried):
    assert tried({7: 0.4}, lent=False) == ("bilevel", 7, [(7, "a trial", ATTEMPTS)])


@pytest.mark.parametrize("given", [{"candidates": 1}, {"select": "random"}])
def test_where_no_other_would_be_chosen_a_lent_example_has_all_attempts_too(tried, given):
    assert tried({3: 0.4}, **given)[1:] == (3, [(3, None, ATTEMPTS)])


def test_without_a_watch_a_lent_example_stays(tried):
    assert tried({})[:2] == ("bilevel, for a", 3)
