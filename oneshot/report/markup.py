"""HTML that is the same on every page: escaped text, sections, tables, and the document around them."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from oneshot.report.plain import plain
from oneshot.report.style import CSS, SCRIPT


def _hashed(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# Nothing may be loaded or run but the page's own style and script, whatever an answer holds and should the escaping
# ever fail. Attributes keep their styles, which the figures consist of; style-src is for browsers without -elem.
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; style-src-elem {_hashed(CSS)}; style-src-attr 'unsafe-inline'; "
    f"script-src {_hashed(SCRIPT)}; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: HTML
        sort: what the column is sorted by, where that is not the shown text
    """

    shown: str
    sort: float | str | None = None


def escaped(value: Any) -> str:
    """Return a string that the page did not write itself as HTML: every such string goes through here."""
    return html.escape(plain(value), quote=True)


def section(heading: str, content: str) -> str:
    """Return a section; "" without content."""
    return f"<section><h2>{escaped(heading)}</h2>\n{content}</section>" if content else ""


def warnings_section(warnings: Iterable[str]) -> str:
    """Return the list of warnings, "" where there are none."""
    items = "".join(f"<li>{escaped(warning)}</li>" for warning in warnings)
    return section("Warnings", f"<ul>{items}</ul>") if items else ""


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Cell | str]], kind: Literal["", "dense", "wordy", "counts"] = ""
) -> str:
    """Return a table that a click on a column's head sorts, and that scrolls by itself where it is too wide.

    Args:
        heads: HTML of each column's head
        rows: cells, strings being HTML; the first of each row is its name
        kind: dense stacks what is in a cell, for many columns; wordy breaks lines, for text; counts leaves the last
            column out where the window is narrow
    """
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(_cell(cell, place) for place, cell in enumerate(row))}</tr>" for row in rows)
    return _scrolled(f'<table class="sortable {kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def pairs(rows: Sequence[tuple[str, Any]]) -> str:
    """Return names and values as a table of two columns; "" for none."""
    cells = "".join(f'<tr><th scope="row">{escaped(n)}</th><td>{escaped(v)}</td></tr>' for n, v in rows)
    return _scrolled(f'<table class="pairs"><tbody>{cells}</tbody></table>') if rows else ""


def figures_grid(drawn: Iterable[tuple[str, str]]) -> str:
    """Return figures side by side where there is room, those without SVG left out; "" for none.

    Args:
        drawn: SVG and what it says
    """
    shown = [f"<figure>{svg}<figcaption>{escaped(says)}</figcaption></figure>" for svg, says in drawn if svg]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def document(title: str, body: Iterable[str]) -> str:
    """Return the whole page.

    Args:
        title: plain text
        body: HTML; empty parts are left out
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _cell(cell: Cell | str, place: int) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    by = "" if cell.sort is None else f' data-sort="{escaped(cell.sort)}"'
    return f'<th scope="row"{by}>{cell.shown}</th>' if place == 0 else f"<td{by}>{cell.shown}</td>"


def _scrolled(content: str) -> str:
    return f'<div class="scroll" tabindex="0">{content}</div>'
