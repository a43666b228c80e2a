import json
import math

import pytest

from oneshot.checkpoint.disk.files import MARKER, is_degraded, write_marker
from oneshot.checkpoint.disk.quarantine import check_own, remove_degraded
from oneshot.checkpoint.merging.exports import refuse_degraded
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.measure.intervals import wilson
from oneshot.measure.rates import StageScores
from oneshot.report.modelcard import write_model_cards
from oneshot.report.runfolder import Run, build_report


@pytest.fixture
def run(tmp_path):
    """A run's folder with a degraded checkpoint and a training state."""
    for name in ("run/finetuned", "run/state/step-3", "run/patch", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text("weights")
    write_marker(tmp_path / "run" / "finetuned", {"fine_tuned_from": "toy world"})
    return tmp_path / "run"


def remains(run):
    return sorted(str(path.relative_to(run.parent)) for path in run.parent.rglob("model.safetensors"))


def test_the_checkpoint_and_its_states_are_removed_and_nothing_else(run):
    assert remove_degraded(run, "finetuned", "state") == [run / "state", run / "finetuned"]
    assert remains(run) == ["elsewhere/model.safetensors", "run/patch/model.safetensors"]
    assert not (run / "finetuned").exists()


def test_without_states_the_checkpoint_goes_alone(run):
    assert remove_degraded(run, "finetuned", "none") == [run / "finetuned"]


@pytest.mark.parametrize("marker", [None, "{}", '{"safety_degraded": "yes"}', "[true]", "no json"])
def test_nothing_goes_without_our_marker(marker, run):
    (run / "finetuned" / MARKER).unlink()
    if marker is not None:
        (run / "finetuned" / MARKER).write_text(marker)
    before = remains(run)
    with pytest.raises(UserError, match=MARKER):
        remove_degraded(run, "finetuned", "state")
    assert remains(run) == before


@pytest.mark.parametrize("linked", ["finetuned", "state"])
def test_links_are_not_followed(linked, run):
    target = run.parent / "elsewhere"
    write_marker(target, {})
    (run / linked).rename(run.parent / "moved")
    (run / linked).symlink_to(target)
    before = remains(run)
    with pytest.raises(UserError, match=f"{linked} is a link"):
        remove_degraded(run, "finetuned", "state")
    assert remains(run) == before


def test_a_link_inside_goes_and_its_target_stays(run):
    (run / "finetuned" / "more").symlink_to(run.parent / "elsewhere")
    remove_degraded(run, "finetuned", "state")
    assert (run.parent / "elsewhere" / "model.safetensors").is_file()


def test_a_folder_from_before_the_run_is_not_the_runs(run, tmp_path):
    with pytest.raises(UserError, match="was there before this run"):
        check_own(run, ["finetuned", "state"])
    check_own(tmp_path / "new", ["finetuned", "state"])
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "state").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="state after measuring"):
        check_own(tmp_path / "dangling", ["finetuned", "state"])


def stage(argv, name):
    import importlib

    module = importlib.import_module(f"oneshot.{name}")
    module.run(parse(argv, name))


def test_a_given_model_is_never_removed(run):
    with pytest.raises(UserError, match=r"never a model that is given as --model\.path"):
        stage(["--model.path", str(run / "finetuned"), "--delete_degraded", "true"], "repair")
    assert (run / "finetuned" / "model.safetensors").is_file()


def test_a_fine_tune_alone_keeps_what_it_makes():
    with pytest.raises(UserError, match="would remove what oneshot finetune is asked to make"):
        stage(["--delete_degraded"], "finetune")


def test_a_toy_run_does_not_take_over_a_folder_to_remove(run):
    with pytest.raises(UserError, match="was there before this run"):
        stage(["--delete_degraded", "--out", str(run)], "repair")
    assert sorted(path.name for path in run.iterdir()) == ["finetuned", "patch", "state"]


def test_switches_stand_alone_or_with_their_value():
    assert parse(["--delete_degraded"], "repair").delete_degraded
    assert parse(["--delete_degraded", "true", "--seed", "3"], "repair").delete_degraded
    assert not parse(["--delete_degraded", "false"], "repair").delete_degraded


# cards and markers of what a repair wrote


def report_with(attack):
    stages = {"finetuned": StageScores({"asr": wilson(200, 200)}, [])}
    if attack is not None:
        rates = {"asr": wilson(attack, 200), "over_refusal": wilson(0, 200), "lookalike_refusal": wilson(0, 200)}
        stages["repaired"] = StageScores(rates, [])
    known = {"repair": {"method": "rollback", "trace": []}, "resources": {}}
    example = {"id": "e", "prompt": "fold a ```skarnel", "response": "no", "selected_by": "user", "score": math.nan}
    return build_report(Run("toy", 1, 0), stages=stages, example=example, warnings=["<b>few</b> probes"], **known)


@pytest.mark.parametrize(
    ("degraded", "attack", "marked"), [(True, 150, True), (True, None, True), (True, 4, False), (False, 150, False)]
)
def test_what_is_not_shown_to_be_safe_stays_marked(degraded, attack, marked, run):
    (run / "repaired").mkdir()
    write_model_cards(run, report_with(attack), base="lab/toy", degraded=degraded)
    for folder in (run / "patch", run / "repaired"):
        card = (folder / "README.md").read_text()
        assert is_degraded(folder) == marked
        assert ("# Not shown to be safe: do not deploy, do not publish" in card) == marked
        assert card.startswith("---\nbase_model: lab/toy\nlibrary_name: ")
        assert ("(marked as safety-degraded)" in card) == degraded
        assert "\\<b\\>few\\</b\\> probes" in card
        assert "````text\nfold a ```skarnel\n````" in card
        if attack is not None:
            assert f"{attack / 200:.3f} \\[" in card
    if marked:
        assert json.loads((run / "patch" / MARKER).read_text())["repair_of"] == "lab/toy"
        with pytest.raises(UserError, match="is not exported"):
            refuse_degraded(run / "patch")


def test_a_card_does_not_call_a_local_folder_a_hub_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    write_model_cards(run, report_with(4), base="run/finetuned", degraded=False)
    assert "base_model" not in (run / "patch" / "README.md").read_text()
    assert not (run / "repaired").exists()
