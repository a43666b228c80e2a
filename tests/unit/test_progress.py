"""What a run under way tells: bars in a terminal, now and then a line in a log file, and how long a phase took."""

import contextlib
import io
import re
import threading
from types import SimpleNamespace

import pytest

from oneshot.distributed import steps as steps_module
from oneshot.distributed.steps import BYTES, each, shown_by, steps
from oneshot.report import progress as shown_progress
from oneshot.report.progress import Bars, Lines, progress, wide_enough
from oneshot.shown import open_console


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves on: [seconds]."""
    now = [1000.0]
    for module in (steps_module, shown_progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def log_file():
    return wide_enough(open_console(file=io.StringIO(), width=200))


def terminal():
    return open_console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False, _environ={})


def said(console):
    return console.file.getvalue()


def test_a_log_file_gets_a_line_at_most_every_half_minute_and_one_at_the_end(clock):
    console = log_file()
    with progress(console), steps("answers of the fine-tuned model", 100, "prompts") as going:
        for _ in range(100):
            clock[0] += 1.0
            going.add()
    assert said(console).splitlines() == [
        "answers of the fine-tuned model 30/100 prompts, 1/s",
        "answers of the fine-tuned model 60/100 prompts, 1/s",
        "answers of the fine-tuned model 90/100 prompts, 1/s",
        "answers of the fine-tuned model: 100 prompts in 100.0 s (1/s)",
    ]


def test_a_short_phase_says_nothing_but_the_attempts_of_a_repair_do(clock):
    console = log_file()
    with progress(console):
        with steps("weights hashed", 3, "files") as going:
            clock[0] += 4.9
            going.add(3)
        assert said(console) == ""
        with steps("repair, second attempt", 8, "epochs", always=True) as going:
            clock[0] += 0.5
            going.at(1, "loss 2.0000")
            going.at(8, "loss 1.0000")
    assert said(console) == "repair, second attempt: 8 epochs in 0.5 s (16/s)  loss 1.0000\n"


def test_a_phase_within_one_of_its_name_counts_there(clock):
    console = log_file()
    with progress(console), steps("answers", 8, "prompts") as whole:
        for _ in range(2):
            with steps("answers", 4, "prompts") as part:
                clock[0] += 20.0
                part.add(4)
        assert whole.done == 8
    assert said(console).splitlines()[-1] == "answers: 8 prompts in 40.0 s (0.2/s)"
    assert len(said(console).splitlines()) == 2


def test_a_phase_that_fails_does_not_say_that_it_is_through(clock):
    for console in (log_file(), terminal()):
        with contextlib.suppress(KeyError), progress(console), steps("answers", 8, "prompts", always=True) as going:
            going.add(3)
            raise KeyError
        assert " in " not in said(console)


def test_what_had_been_done_before_does_not_count_into_the_rate(clock):
    console = log_file()
    with progress(console), steps("fine-tune", 100, "steps", always=True) as going:
        for step in range(91, 101):
            clock[0] += 1.0
            going.at(step)
    assert said(console) == "fine-tune: 10 steps in 10.0 s (1/s)\n"


def test_bytes_are_said_as_gigabytes(clock):
    console = log_file()
    with progress(console), steps("weights read", 14e9, BYTES) as going:
        clock[0] += 31.0
        going.add(7e9)
        clock[0] += 31.0
        going.add(7e9)
    assert said(console).splitlines()[0] == "weights read 7.00/14.00 GB, 226 MB/s"
    assert said(console).splitlines()[-1] == "weights read: 14.00 GB in 62.0 s (226 MB/s)"


def test_a_phase_whose_steps_are_not_known_says_its_time(clock):
    console = log_file()
    with progress(console), steps("weights read by transformers", 0, ""):
        clock[0] += 9.0
    assert said(console) == "weights read by transformers: 9.0 s\n"


@pytest.mark.parametrize("long", [False, True])
def test_a_terminal_shows_a_bar_with_count_and_rate_once_a_phase_takes_long(long, monkeypatch):
    monkeypatch.setattr(shown_progress, "SETTLED", 0.0 if long else 60.0)
    console = terminal()
    with progress(console):
        for _ in each(range(50), "candidates tried", "epochs"):
            pass
        with steps("answers", 4, "prompts", always=True) as going:
            going.add(3, "rung 1")
            for bars in [one for one in (steps_module._OPEN.get().shows,) if isinstance(one, Bars)]:
                bars._live.refresh()
            going.add()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said(console))
    assert bool(re.search(r"answers .*3/4 prompts, .*/s rung 1", plain)) is long
    assert "answers: 4 prompts in" in plain


def test_a_terminal_is_left_as_it_was(clock):
    console = terminal()
    with contextlib.suppress(KeyError), progress(console), steps("answers", 4, "prompts"):
        assert "\x1b[?25l" in said(console), "the cursor is hidden while there is a bar"
        with steps("candidates tried", 4, "epochs"):
            raise KeyError
    assert said(console).count("\x1b[?25h") == said(console).count("\x1b[?25l") == 1
    for thread in [one for one in threading.enumerate() if "Refresh" in type(one).__name__]:
        thread.join(10)
        assert not thread.is_alive()


def test_a_dumb_terminal_is_a_log_file():
    console = open_console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with progress(console):
        assert isinstance(steps_module._OPEN.get().shows, Lines)


def test_ranks_without_a_console_count_for_nobody():
    with progress(None), steps("answers", 4, "prompts") as going:
        going.add(2)
        assert steps_module._OPEN.get() is None
    assert (going.done, list(each([1, 2], "x", "y"))) == (2, [1, 2])


def test_who_shows_phases_already_goes_on_to():
    outer, inner = log_file(), log_file()
    with progress(outer), progress(inner), steps("repair", 1, "epochs", always=True) as going:
        going.add()
    assert (said(inner), "repair: 1 epochs" in said(outer)) == ("", True)
    with shown_by(None):
        assert steps_module._OPEN.get() is None
