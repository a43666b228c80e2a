"""The page's figures: SVG files in the house style, with its colours in them, as a picture file has no page's."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.report.figures import _GRID, _INK, _SERIES, _figure, _svg
from oneshot.report.style import CSS
from reproduce.bounds import plane
from reproduce.findings import Findings, unrecovered
from reproduce.sections import COUNTS, EPOCHS, FEW, METHODS, RANKED, RANKS, STUDIED, ranked

_MARKS = "osD^vP*Xd<>ph"
Series = Mapping[str, Sequence[tuple[float, list[float]]]]  # name -> (x, the seeds' values) each


def draw_all(findings: Findings, folder: Path) -> dict[str, Path]:
    """Write the figures that there is something for; return name -> file."""
    from oneshot.report.runfolder import write_whole

    drawn = {
        "plane": _plane(findings),
        "examples": _lines("examples", "Attack success by harmful examples", _by_count(findings), list(COUNTS)),
        "epochs": _lines("epochs", "Attack success by epochs", _by_epoch(findings), list(EPOCHS)),
        "ranks": _lines("ranks", "Attack success by rank", _by_rank(findings), list(RANKS)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_whole(folder / f"paper-{name}.svg", standalone(svg)) for name, svg in drawn.items() if svg}


def standalone(svg: str) -> str:
    """Return an inline SVG as a file of its own: with the house style's colours, light and dark, and a ground."""
    colours = re.findall(r":root \{[^}]*\}", CSS)[:2]
    dark = f"@media (prefers-color-scheme: dark) {{ {colours[1]} }}"
    style = f"{colours[0]} {dark} svg {{ color: var(--ink); background: var(--ground); }}"
    start = svg.index(">") + 1
    return f"{svg[:start]}<style>{style}</style>{svg[start:]}\n"


def _plane(findings: Findings) -> str:
    points = plane(findings)
    if not points:
        return ""
    figure, (ax,) = _figure(height=5.4)
    for place, (name, (asr, lost)) in enumerate(points.items()):
        ax.plot(
            [asr], [lost], linestyle="none", marker=_MARKS[place % len(_MARKS)], markersize=8,
            color=_SERIES[place % 4], label=name, clip_on=False,
        )  # fmt: skip
    ax.set_xlabel("attack success, mean over attacks and seeds")
    ax.set_title("larger loss of utility and task, mean", loc="left", fontsize=10, color=_INK)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(
        min(-0.02, *(lost for _, lost in points.values())), max(0.1, *(lost for _, lost in points.values())) + 0.02
    )
    ax.grid(True, color=_GRID, linewidth=0.8)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1)
    return _svg(figure, "plane", "Safety against utility, all methods")


def _lines(name: str, title: str, series: Series, ticks: Sequence[Any]) -> str:
    """Medians joined by a line, and a bar from the smallest to the largest, at evenly spaced places."""
    shown = {method: [(x, values) for x, values in points if values] for method, points in series.items()}
    shown = {method: points for method, points in shown.items() if len(points) > 1}
    if not shown:
        return ""
    figure, (ax,) = _figure(height=3.4)
    for place, (method, points) in enumerate(shown.items()):
        shift = (place - (len(shown) - 1) / 2) * 0.06  # or bars would hide one another
        xs = [x + shift for x, _ in points]
        middles = [statistics.median(values) for _, values in points]
        bars = [[m - min(v) for m, (_, v) in zip(middles, points)], [max(v) - m for m, (_, v) in zip(middles, points)]]
        ax.errorbar(
            xs, middles, yerr=bars, color=_SERIES[place % 4], marker=_MARKS[place], markersize=5, linewidth=1.5,
            elinewidth=1, capsize=2, label=method,
        )  # fmt: skip
    ax.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    ax.set_xlabel(title.partition(" by ")[2])
    ax.set_title("attack success: median, smallest and largest", loc="left", fontsize=10, color=_INK)
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.grid(True, color=_GRID, linewidth=0.8)
    columns = 2 if max(map(len, shown)) < 24 else 1
    figure.legend(
        loc="outside lower left", ncols=columns, frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1.8
    )
    return _svg(figure, name, title)


def _by_count(findings: Findings) -> Series:
    return {
        method: [(x, findings.rates(attack, METHODS[method], "asr")) for x, attack in enumerate(COUNTS.values())]
        for method in FEW
    }


def _by_epoch(findings: Findings) -> Series:
    return {"sft": [(x, findings.rates(STUDIED, kind, "asr")) for x, kind in enumerate(EPOCHS.values())]} | {
        f"{method}: probes not recovered": _recovered_by(findings, method) for method in ("rollback (auto)", "lowrank")
    }


def _recovered_by(findings: Findings, method: str) -> list[tuple[float, list[float]]]:
    """Per tick, of each seed the share of held-out requests whose refusal is not ahead by then."""
    found = []
    for x, epochs in enumerate(EPOCHS):
        values = [unrecovered(after["trace"], epochs) for _, after in findings.pairs(STUDIED, METHODS[method])]
        found.append((float(x), [value for value in values if math.isfinite(value)]))
    return found


def _by_rank(findings: Findings) -> Series:
    return {
        method: [
            (x, findings.rates(STUDIED, ranked(method, rank), "asr"))
            for x, rank in enumerate(RANKS)
            if (method, rank) != ("project", "full")  # which is the same as 20
        ]
        for method in RANKED
    }
