"""Text of strangers in a terminal: no markup that ends a run, no escape code that reaches it, no key in a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
import threading

import pytest
from rich.progress import Progress
from rich.table import Table

from oneshot import cli
from oneshot.distributed import stage
from oneshot.distributed.steps import steps
from oneshot.redact import STRUCK, redacted
from oneshot.report.progress import progress, wide_enough
from oneshot.shown import open_console, printed_plainly

ESCAPE = "\x1b]0;title\x07\x1b[31mred"
KEY = "hf_" + "Ab1" * 8


@pytest.mark.parametrize("text", ["[/INST]", "[bold]x[/]", "[/]", ":smile:", "[link=http://x]y[/link]", "a[/b]"])
def test_square_brackets_are_square_brackets(text):
    console = open_console(file=io.StringIO(), width=200)
    console.print(text)
    console.print(f"Example: {text}", highlight=False)
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    console.print(table)
    assert console.file.getvalue().count(text) == 6


def test_no_escape_code_reaches_the_terminal():
    console = open_console(file=io.StringIO(), width=200)
    table = Table(ESCAPE, title=ESCAPE)
    table.add_row(ESCAPE)
    console.print(table, ESCAPE)
    shown = console.file.getvalue()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "<U+001B>" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_what_it_is_told(terminal):
    console = wide_enough(open_console(file=io.StringIO(), force_terminal=terminal, width=200))
    with progress(console), steps("repair [/x]", 1, "epochs", always=True) as going:
        going.at(1, "loss [/INST]")
    assert "repair [/x]" in console.file.getvalue()
    assert "loss [/INST]" in console.file.getvalue()
    assert Progress is not None


def test_every_console_of_ours_is_a_plain_one():
    from pathlib import Path

    import oneshot

    root = Path(oneshot.__file__).parent
    made = [path for path in root.rglob("*.py") if " Console(" in path.read_text() or "(Console(" in path.read_text()]
    assert made == [], "take oneshot.shown.open_console"


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_names_of_tensors_cannot_colour_the_terminal(command, tmp_path, monkeypatch, capsys):
    name = f"a{ESCAPE}[/b]"
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\xff" * 4)
    monkeypatch.setattr(sys, "argv", ["oneshot", command, str(tmp_path)])
    with contextlib.suppress(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert "<U+001B>" in said.out
    assert "\x1b" not in said.out + said.err


def test_errors_hold_no_escape_code_and_tracebacks_no_key(capsys, monkeypatch):
    def fails():
        raise RuntimeError(f"{ESCAPE} {KEY}")

    with pytest.raises(SystemExit):
        stage.end_with("oneshot verify", fails, hang_minutes=0, debug=True)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert KEY not in said
    assert "\x1b" not in said
    monkeypatch.setattr(sys, "argv", ["oneshot", f"{ESCAPE}"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b" not in capsys.readouterr().err


def test_what_a_library_in_rust_prints_is_plain_too(capfd):
    with printed_plainly():
        os.write(1, ESCAPE.encode())
    print("after")
    said = capfd.readouterr().out
    assert "\x1b" not in said
    assert said.endswith("<U+001B>[31mredafter\n")


def test_two_threads_that_do_so_leave_stdout_where_it_was(capfd):
    within, over = threading.Event(), threading.Event()

    def other():
        with printed_plainly():
            within.set()
            over.wait(10)

    thread = threading.Thread(target=other)
    with printed_plainly():
        thread.start()
        within.wait(0.5)  # if it does not wait for this one
    over.set()
    thread.join()
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:pa/ss@w0rd@host/v1", f"https://{STRUCK}@host/v1"),
        ("git+ssh://me:p:a@b/c@host:22/x y@z", f"git+ssh://{STRUCK}@host:22/x y@z"),
        ('{"url": "https://u:p@h", "mail": "a@b"}', f'{{"url": "https://{STRUCK}@h", "mail": "a@b"}}'),
    ],
)
def test_passwords_with_slashes_and_at_signs_are_struck_out(text, left):
    assert redacted(text) == left


@pytest.mark.parametrize("name", ["GITHUB_PAT", "DB_PWD", "MY_PAT_2", "REGISTRY_PASSPHRASE", "API_KEYS", "X_PW"])
def test_values_of_further_secret_variables_are_struck_out(name, monkeypatch):
    monkeypatch.setenv(name, "zork-fnord-blim-99")
    assert redacted("see zork-fnord-blim-99") == f"see {STRUCK}"


def test_where_one_is_and_search_paths_are_no_secrets(monkeypatch):
    monkeypatch.setenv("PWD", "/somewhere/that/is/not")
    monkeypatch.setenv("MY_PATTERN", "some-pattern-of-mine")
    assert redacted("/somewhere/that/is/not some-pattern-of-mine") == "/somewhere/that/is/not some-pattern-of-mine"
