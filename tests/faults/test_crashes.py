"""A process that dies at any step of a save, and again while cleaning up, costs no folder."""

import os
import sys

import pytest
from saving import save, whole

from oneshot.checkpoint.disk import folders
from oneshot.checkpoint.disk.folders import OLD, clean

pytestmark = pytest.mark.faults
CALLS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}  # audit events: what changes a folder, or opens it


def dies_at(step, exchange, folder, text):
    """Whether a process that saves died before its step-th change of the disk (no handler runs, as by kill -9)."""
    child = os.fork()
    if child == 0:
        left, real = [step], folders._exchange

        def count(event, arguments):
            if event in CALLS and str(folder.parent) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        def exchanged(one, other):
            count("os.rename", [str(one)])
            done = exchange and real(one, other)
            count("os.rename", [str(one)])
            return done

        try:
            folders._exchange = exchanged
            sys.addaudithook(count)
            save(folder, text)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the save itself failed"
    return code == 9


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "fallback"])
@pytest.mark.parametrize("before", ["old", None], ids=["replaced", "new"])
def test_a_crash_at_any_step_leaves_a_whole_folder(before, exchange, place):
    seen, step = set(), 0
    while True:
        step += 1
        folder = place / str(step) / "saved"
        folder.parent.mkdir()
        if before:
            save(folder, before)
        died = dies_at(step, exchange, folder, "new")
        found = whole(folder)
        if exchange or not before:
            assert found in (before, "new"), "a reader sees the old or the new one at any moment"
        seen.add(found)
        aside = whole(folder.with_name(folder.name + OLD))
        assert aside in (None, "old"), "what bears that name is whole, for it may be put back"
        clean(folder)
        assert whole(folder) in (before, "new")
        assert found is None or whole(folder) == found, "cleaning up goes back to no older state"
        assert [path.name for path in folder.parent.iterdir()] == ["saved"] * folder.exists()
        save(folder, "next")
        assert whole(folder) == "next"
        if not died:
            break
    assert step > 10, "many steps were interrupted"
    assert seen == ({"old", "new"} if exchange and before else {"old", "new", None} if before else {None, "new"})


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "fallback"])
def test_a_crash_while_cleaning_up_after_a_crash_loses_nothing(exchange, place):
    both, first, died = 0, 0, True
    while died:
        first += 1
        for second in range(1 + first % 9, 40, 9):  # every pair would take a minute
            folder = place / f"{first}-{second}" / "saved"
            folder.parent.mkdir()
            save(folder, "old")
            died = dies_at(first, exchange, folder, "new")
            again = dies_at(second, exchange, folder, "newer")
            both += died and again
            clean(folder)
            assert whole(folder) in ("old", "new", "newer")
            assert [path.name for path in folder.parent.iterdir()] == ["saved"]
            if not again:
                break
    assert both > 20
