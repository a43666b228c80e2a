"""The lock of an output folder: between processes of this machine, and with runs elsewhere, which are only seen."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from saving import save, whole
from tiny import files_in, tiny_runtime

from oneshot.checkpoint.disk import holder, lock
from oneshot.checkpoint.disk.folders import replacing
from oneshot.checkpoint.disk.lock import LOCK, locked, released, still_held, take
from oneshot.errors import DiskFull, UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "STALE", 0.3)


def held_by(path, **who):
    """A lock file as another run would have left it; returns its content."""
    line = json.dumps({**json.loads(holder.own_line()), **who}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(line + b"\n" + lock._count(0))
    return path.read_bytes()


def ended():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


ELSEWHERE = {"host": "node7", "pid": 4711, "where": "another boot", "job": "42, restart 1"}


def test_a_folder_has_one_run(tmp_path):
    held_by(tmp_path / LOCK, pid=os.getppid(), began=holder._began(os.getppid()), job="7")
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=rf"is being written by another run \(process {os.getppid()}, on .*job 7"):
        take(tmp_path)
    assert files_in(tmp_path) == before


def test_what_a_killed_process_left_on_its_way_to_the_lock_is_removed(tmp_path):
    run, names = tmp_path / "run", [f"{LOCK}-{number:016x}" for number in range(4)]
    held_by(run / names[0], pid=ended())
    held_by(run / names[1], pid=os.getppid(), began=holder._began(os.getppid()))  # it is trying now
    held_by(run / names[2], **ELSEWHERE)
    (run / names[3]).write_bytes(b"")
    with released():
        take(run)
        assert {path.name for path in run.iterdir()} == {LOCK, *names[1:]}


def test_released_it_is_free_and_leaves_nothing(tmp_path):
    for beside, place in ((False, tmp_path / "run"), (True, tmp_path / "deep" / "out")):
        with released():
            take(place, beside=beside)
            take(place, beside=beside)  # once more by the same thread
            (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert path.name == (f"out{LOCK}" if beside else LOCK)
            assert holder.holder_of(path.read_bytes())["pid"] == os.getpid()
        assert not path.exists()
    assert [path.name for path in tmp_path.iterdir()] == [], "folders made for the lock alone are gone"


def test_it_is_released_when_the_run_fails(tmp_path):
    @released()
    def run():
        take(tmp_path)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        run()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_another_run(tmp_path):
    said = []

    def other():
        try:
            take(tmp_path)
        except UserError as error:
            said.append(str(error))

    with released():
        take(tmp_path)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another run" in said[0]


def test_a_run_releases_no_lock_of_one_in_another_thread(tmp_path):
    taken, over = threading.Event(), threading.Event()

    @released()
    def other_run():
        take(tmp_path / "other")
        taken.set()
        over.wait(10)

    thread = threading.Thread(target=other_run)
    with released():
        take(tmp_path / "mine")
        thread.start()
        assert taken.wait(10)
    assert not (tmp_path / "mine" / LOCK).exists()
    assert (tmp_path / "other" / LOCK).exists()
    over.set()
    thread.join()
    assert not (tmp_path / "other" / LOCK).exists()


@pytest.mark.parametrize("began", [None, "1"], ids=["ended", "its number given anew"])
def test_of_a_dead_process_of_this_machine_the_lock_is_taken_at_once(began, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 60.0)
    who = {"pid": os.getppid(), "began": began} if began else {"pid": ended()}
    held_by(tmp_path / LOCK, **who)
    with released():
        take(tmp_path)
        assert holder.holder_of((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_run_elsewhere_that_gives_signs_of_life_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 30.0)
    before = held_by(tmp_path / LOCK, **ELSEWHERE)

    def beats():
        time.sleep(0.1)
        (tmp_path / LOCK).write_bytes(before[:-2] + b"1\n")

    thread = threading.Thread(target=beats)
    thread.start()
    with pytest.raises(UserError, match=r"process 4711, on node7, job 42, restart 1"):
        take(tmp_path)
    thread.join()


@pytest.mark.parametrize("raw", [None, b"", b"\x00\xff", b"[" * 4096, b'{"pid": "x"}\n'], ids=repr)
def test_a_lock_that_stands_still_is_a_dead_runs(raw, tmp_path, capsys):
    held_by(tmp_path / LOCK, **ELSEWHERE)
    if raw is not None:
        (tmp_path / LOCK).write_bytes(raw)
    began = time.monotonic()
    with released():
        take(tmp_path)
    assert time.monotonic() - began >= 0.3
    assert "waiting up to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_number_is_counted_up(tmp_path):
    with released():
        take(tmp_path)
        before = (tmp_path / LOCK).read_bytes()
        until = time.monotonic() + 10
        while (tmp_path / LOCK).read_bytes() == before and time.monotonic() < until:
            time.sleep(0.01)
        now = (tmp_path / LOCK).read_bytes()
        assert now != before
        assert holder.first_line_of(now) == holder.first_line_of(before)
        assert len(now) == len(before)


def test_without_hard_links_it_works_as_well(tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", none)
    held_by(tmp_path / LOCK, pid=ended())
    with released():
        take(tmp_path)
        assert holder.holder_of((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
    held_by(tmp_path / LOCK, pid=os.getppid(), began=None)
    with pytest.raises(UserError, match="another run"):
        take(tmp_path)


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    """Processes that start together; each says whether it holds the lock, and holds it until all have said so."""
    held_by(tmp_path / "run" / LOCK, pid=ended())
    code = (
        "import sys, time; from pathlib import Path; from oneshot.checkpoint.disk.lock import take\n"
        "from oneshot.errors import UserError\n"
        "place = Path(sys.argv[1])\n"
        "(place / ('ready' + sys.argv[2])).touch()\n"
        "while not (place / 'go').exists(): pass\n"
        "try:\n    take(place / 'run'); said = 'mine'\n"
        "except UserError as error:\n    said = str(error)\n"
        "(place / ('said' + sys.argv[2])).write_text(said)\n"
        "while len(list(place.glob('said*'))) < 6: time.sleep(0.01)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)]) for number in range(6)]
    while len(list(tmp_path.glob("ready*"))) < 6:
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [child.wait(60) for child in children] == [0] * 6
    said = [path.read_text() for path in tmp_path.glob("said*")]
    assert said.count("mine") == 1
    assert sum("another run" in text for text in said) == 5
    assert list((tmp_path / "run").iterdir()) == []


def test_a_full_disk_is_said_with_the_bytes(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"No space left .*bytes are needed"):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_was_taken_for_dead_puts_nothing_in_its_place(tmp_path):
    save(tmp_path / "saved", "theirs")

    def late():
        with replacing(tiny_runtime(), tmp_path / "saved") as temporary:
            (temporary / "one").write_text("mine")
            os.unlink(tmp_path / f"saved{LOCK}")
            held_by(tmp_path / f"saved{LOCK}", **ELSEWHERE)

    with released():
        take(tmp_path / "saved", beside=True)
        with pytest.raises(UserError, match=r"was taken over by another run \(process 4711, on node7"):
            late()
    assert whole(tmp_path / "saved") == "theirs"
    assert b"node7" in (tmp_path / f"saved{LOCK}").read_bytes(), "what is not ours is not released"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lock_that_somebody_removed_is_set_again(tmp_path):
    with locked(tiny_runtime(), tmp_path / "saved"):
        os.unlink(tmp_path / f"saved{LOCK}")
        still_held(tmp_path / "saved")
        assert (tmp_path / f"saved{LOCK}").is_file()
        still_held(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, "old"])
def test_a_folder_that_appears_while_another_is_written_is_left_alone(before, tmp_path):
    """By a program that knows no lock."""
    folder = tmp_path / "saved"
    if before:
        save(folder, before)

    def late():
        with replacing(tiny_runtime(), folder) as temporary:
            (temporary / "one").write_text("mine")
            if before:
                folder.rename(tmp_path / "moved")
            folder.mkdir()
            (folder / "theirs").write_text("theirs")

    with pytest.raises(UserError, match="was written by another program"):
        late()
    assert files_in(folder) == {"theirs": b"theirs"}
