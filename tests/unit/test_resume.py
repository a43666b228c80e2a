"""Run folders: who may go on in one, with which settings, and what a full disk or a kill leaves."""

import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from tiny import files_in, tiny_runtime

from oneshot import settings as settings_module
from oneshot.checkpoint.disk import lock
from oneshot.checkpoint.disk.files import MARKER
from oneshot.checkpoint.disk.folders import replacing
from oneshot.checkpoint.disk.lock import LOCK, released, take
from oneshot.errors import DiskFull, UserError
from oneshot.measure.cache import RESPONSES, Responses
from oneshot.report.answers import write_answers
from oneshot.report.resume import forget_attempt, forget_events
from oneshot.report.runfolder import append_event, open_run
from oneshot.settings import (
    DataPart,
    DataSettings,
    FinetuneSettings,
    PromptSet,
    RepairSettings,
    ScoreSettings,
    Settings,
)
from oneshot.stages import reads
from oneshot.whole import write_whole


def opened(out, stage="repair", **values):
    """Begin a run, or go on with one, and end."""
    with released():
        return open_run(
            str(out), "toy", Settings(out=str(out), **values), tiny_runtime(), lambda name: reads(stage, name)
        )


def full(*_, **__):
    raise OSError(28, os.strerror(28))


# --- with which settings ----------------------------------------------------------------------------------------------


def test_a_resume_with_other_settings_names_each_with_both_values(tmp_path):
    opened(tmp_path, repair=RepairSettings(rank=4))
    before = files_in(tmp_path)
    with pytest.raises(UserError) as error:
        opened(tmp_path, resume=True, seed=3, guard="mine.jsonl", repair=RepairSettings(rank=9))
    for said in ("seed was 0 and is 3", "guard was None and is 'mine.jsonl'", "repair.rank was 4 and is 9"):
        assert said in str(error.value)
    assert files_in(tmp_path) == before


def test_what_changes_no_result_may_change_and_is_written_down(tmp_path):
    opened(tmp_path)
    opened(tmp_path, resume=True, debug=True, hang_minutes=5.0, finetune=FinetuneSettings(save_every=7))
    held = yaml.safe_load((tmp_path / "settings.yaml").read_text())
    assert (held["debug"], held["hang_minutes"], held["finetune"]["save_every"]) == (True, 5.0, 7)


def test_a_stage_is_asked_for_the_settings_that_it_reads(tmp_path):
    opened(tmp_path, "finetune", repair=RepairSettings(rank=4))
    opened(tmp_path, "finetune", resume=True, repair=RepairSettings(rank=9))
    with pytest.raises(UserError, match=r"finetune\.lora_rank was 16 and is 5"):
        opened(tmp_path, "finetune", resume=True, finetune=FinetuneSettings(lora_rank=5))


def test_a_setting_that_an_older_version_did_not_have_had_its_default(tmp_path):
    opened(tmp_path)
    path = tmp_path / "settings.yaml"
    held = yaml.safe_load(path.read_text())
    del held["shortlist"], held["repair"]["rank"]
    path.write_text(yaml.safe_dump(held | {"no_longer": 1}))
    opened(tmp_path, resume=True)
    path.write_text(yaml.safe_dump(held))
    with pytest.raises(UserError, match="shortlist was 4 and is 2"):
        opened(tmp_path, resume=True, shortlist=2)


def test_every_setting_is_compared_but_those_that_are_free():
    plain = settings_module.to_dict(Settings())
    flat = [".".join(path) for path, _ in settings_module.same._flat(plain)]
    for free in settings_module.same.FREE:
        assert free == "require" or any(name == free or name.startswith(f"{free}.") for name in flat), free
    assert settings_module.differences(plain, Settings()) == []


def test_what_was_removed_counts_as_what_was_added_does(tmp_path):
    parts = {name: DataPart(source=f"toy:{name}", count=3) for name in ("harmful", "task")}
    sets = {name: PromptSet(path=f"{name}.jsonl") for name in ("a", "b.c")}
    rates = {"sft": 1e-3, "rollback": 0.1}

    def made(parts, sets, rates):
        return Settings(
            data=DataSettings(parts=parts), score=ScoreSettings(sets=sets), repair=RepairSettings(learning_rate=rates)
        )

    def fewer(values):
        return dict([next(iter(values.items()))])

    more, less = made(parts, sets, rates), made(fewer(parts), fewer(sets), fewer(rates))
    for before, now in ((more, less), (less, more)):
        said = " ".join(settings_module.differences(settings_module.to_dict(before), now))
        for name in ("data.parts.task.source", "score.sets.b.c.path", "repair.learning_rate.rollback"):
            assert f"{name} was " in said
        assert settings_module.differences(settings_module.to_dict(now), now) == []
    (said,) = settings_module.differences(
        settings_module.to_dict(made(parts, sets, rates)), made(parts, sets, {"sft": 1e-3})
    )
    assert said == "repair.learning_rate.rollback was 0.1 and is None"
    assert settings_module.differences(settings_module.to_dict(more), Settings()), "the whole mapping"


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "- " * 3000, "seed: 1\x00", "just words"], ids=repr)
def test_damaged_settings_name_themselves_and_the_way_out(text, tmp_path):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=r"settings.yaml is damaged .*: give another --out, or remove the folder"):
        opened(tmp_path, resume=True)
    with pytest.raises(UserError, match="already holds a run: give another --out, or remove the folder"):
        opened(tmp_path)


# --- one run at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_has_locked_is_left_alone(resume, tmp_path):
    if resume:
        opened(tmp_path)
    line = json.dumps({**json.loads(lock.own_line()), "pid": os.getppid(), "began": None}).encode()
    (tmp_path / LOCK).write_bytes(line + b"\n" + lock._count(0))
    before = files_in(tmp_path)
    with pytest.raises(UserError, match="another run"):
        opened(tmp_path, resume=resume)
    assert files_in(tmp_path) == before


def test_a_run_holds_its_folder_until_it_ends(tmp_path):
    with released():
        open_run(str(tmp_path / "run"), "toy", Settings(), tiny_runtime())
        assert (tmp_path / "run" / LOCK).is_file()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["settings.yaml"]


def test_a_run_that_was_taken_for_dead_tells_of_no_more_steps(tmp_path):
    with released():
        open_run(str(tmp_path), "toy", Settings(), tiny_runtime())
        append_event(tmp_path, stage="finetune", step=1)
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text('{"host": "node7", "pid": 4711}\n')
        with pytest.raises(UserError, match=r"taken over by another run \(process 4711, on node7\)"):
            append_event(tmp_path, stage="finetune", step=2)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


# --- what comes again -------------------------------------------------------------------------------------------------


def test_steps_that_come_again_are_counted_once(tmp_path):
    for step in (1, 2, 3, 4):
        append_event(tmp_path, stage="finetune", step=step)
    append_event(tmp_path, stage="repair", epoch=3)
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"stage": "finetune", "st')  # a run died here
    forget_events(tmp_path, "finetune", 3)
    for step in (3, 4):
        append_event(tmp_path, stage="finetune", step=step)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["stage"] == "finetune"] == [1, 2, 3, 4]
    assert [event["epoch"] for event in events if event["stage"] == "repair"] == [3]


def test_nothing_of_an_earlier_attempt_at_a_repair_stays(tmp_path):
    for name in ("patch", "repaired", "finetuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("weights")
    (tmp_path / "selection.json").write_text("{}")
    append_event(tmp_path, stage="finetune", step=1)
    append_event(tmp_path, stage="repair", epoch=0)
    forget_attempt(tmp_path)
    assert sorted(files_in(tmp_path)) == ["events.jsonl", f"finetuned/{MARKER}", "finetuned/model.safetensors"]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


def test_folders_of_the_users_own_are_no_earlier_attempt(tmp_path):
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "mine").write_text("precious")
    opened(tmp_path, resume=True)
    forget_attempt(tmp_path)
    assert (tmp_path / "patch" / "mine").read_text() == "precious"


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_the_start_jams_no_folder(call, tmp_path, monkeypatch):
    out, real = tmp_path / "run", getattr(os, call)

    def late(*arguments, **named):
        """The disk is full once the lock is there."""
        return full() if (out / LOCK).exists() else real(*arguments, **named)

    monkeypatch.setattr(os, call, late)
    with pytest.raises(DiskFull, match=r"No space left .*settings.yaml .*[1-9][0-9,]* bytes are needed"):
        opened(out)
    monkeypatch.undo()
    assert not out.exists(), "the folder that was made for it is gone"
    opened(out)
    opened(out, resume=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"file could not be written \(3 bytes are needed"):
        write_whole(tmp_path / "file", "new")
    monkeypatch.undo()
    assert files_in(tmp_path) == {"file": b"old"}


def test_small_files_that_a_killed_run_left_half_are_removed(tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".hidden").write_text("the user's own")
    for name in ("settings.yaml", "report.html"):
        with monkeypatch.context() as patched:  # nothing is renamed, and nothing cleaned up after kill -9
            patched.setattr(os, "replace", full)
            patched.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(DiskFull):
                write_whole(out / name, "half")
        assert len(list(out.glob(f".{name}.*"))) == 1
        opened(out, resume=True)
        assert sorted(path.name for path in out.iterdir()) == [".hidden", "settings.yaml"]


def test_a_full_disk_ends_a_command_with_code_1(tmp_path):
    from oneshot.distributed.stage import end_with

    def run():
        append_event(tmp_path, stage="repair", epoch=1)
        raise OSError(28, os.strerror(28), str(tmp_path / "some.bin"))

    with pytest.raises(SystemExit) as end:
        end_with("oneshot repair", run, hang_minutes=0, debug=False)
    assert end.value.code == 1


# --- who may read what ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_published_honours_the_umask(mask, tmp_path):
    with replacing(tiny_runtime(), tmp_path / "saved") as temporary:
        (temporary / "sub").mkdir(mode=0o700)
        for name in ("weights", "sub/more"):
            (temporary / name).touch(mode=0o600)  # as safetensors leaves it
        (temporary / "script").touch()
        (temporary / "script").chmod(0o700)
    saved = tmp_path / "saved"
    assert {mode(saved / name) for name in ("weights", "sub/more")} == {0o666 & ~mask}
    assert mode(saved / "script") == 0o700 | (0o666 & ~mask)
    assert {mode(saved), mode(saved / "sub")} == {0o777 & ~mask}
    assert mode(write_whole(tmp_path / "file", "x")) == 0o666 & ~mask


def test_prompts_and_answers_are_the_users_alone(mask, tmp_path):
    Responses(tmp_path).put("key", "answer")
    write_answers(tmp_path, {"model": []})
    assert {mode(tmp_path / name) for name in (RESPONSES, "answers.jsonl")} == {0o600}


def test_the_lock_itself_can_be_read_by_whom_the_umask_lets(mask, tmp_path):
    with released():
        take(tmp_path)
        assert mode(tmp_path / LOCK) == 0o666 & ~mask
