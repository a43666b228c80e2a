"""The path of a repair as inline SVG: by epoch, and safety against utility; "" where nothing was watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oneshot.patch.path import SAFE_MARGIN
from oneshot.report.facts import weights_of
from oneshot.report.figures import _GRID, _INK, _SERIES, _figure, _finite, _svg

Record = Mapping[str, Any]
# told apart without colour, too: by mark and by line
_LOOKS = (
    (_SERIES[2], "o", "-"),
    (_SERIES[3], "s", (0, (4, 2))),
    (_SERIES[0], "^", (0, (1, 1.5))),
    (_SERIES[1], "D", "-."),
)
_OTHERS = (_GRID, ".", "-")  # of attempts beyond those
_FAR = 5  # times the bound, from where on distances are drawn on a logarithmic axis
_SHORT = 16  # characters of labels of which three stand side by side


@dataclass(frozen=True)
class Attempt:
    """One run of the epochs: its name and its records."""

    label: str
    records: list[Record]


def attempts_of(trace: Sequence[Record]) -> list[Attempt]:
    """Return the attempts that a trace holds: each begins where the guard's weight changes or epochs start anew."""
    runs: list[list[Record]] = []
    for record in (row for row in trace if _finite(row.get("epoch"))):
        last = runs[-1][-1] if runs else None
        # a step that was taken back is of the same attempt, and was not looked at
        weights = {row["guard_weight"] for row in (*(runs[-1] if runs else ()), record) if "guard_weight" in row}
        if last is None or record["epoch"] <= last["epoch"] or len(weights) > 1:
            runs.append([])
        runs[-1].append(record)
    labels = [_label(run, n) for n, run in enumerate(runs, 1)]
    repeated = {label for label in labels if labels.count(label) > 1}
    named = [f"{label}, attempt {n}" if label in repeated else label for n, label in enumerate(labels, 1)]
    return [Attempt(label, run) for label, run in zip(named, runs)]


def kept_record(trace: Sequence[Record], kept: Record | None) -> Record | None:
    """Return the record of the epoch that was kept.

    Args:
        kept: {epoch, guard_weight} as report.json has it; none where the last epoch was taken
    """
    if not kept:
        return trace[-1] if trace else None
    fits = [row for row in trace if all(row.get(name) == value for name, value in kept.items())]
    return fits[-1] if fits else None


def trace_figure(trace: Sequence[Record]) -> str:
    """Return what the repair minimised by epoch: the loss on the example and, where it is there, the guard's KL."""
    titles = {"loss": "loss on the example", "guard_kl": "guard: KL to the unpatched model"}
    shown = [key for key in titles if any(_finite(row.get(key)) for row in trace)]
    attempts = attempts_of(trace)
    if not shown or not attempts:
        return ""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(height=0.7 + 1.5 * len(shown), panels=len(shown))
    for ax, key in zip(axes, shown):
        for attempt, look in zip(attempts, _looks(len(attempts))):
            _line(ax, attempt, "epoch", key, look)
        values = [row[key] for row in trace if _finite(row.get(key))]
        ax.set_title(titles[key], loc="left", fontsize=10, color=_INK)
        ax.set_ylim(bottom=min(0.0, *values))
        ax.yaxis.grid(True, color=_GRID, linewidth=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epoch")
    if len(attempts) > 1:
        _legend(figure, axes[0], attempts)
    return _svg(figure, "trace", "Repair by epoch")


def path_figure(trace: Sequence[Record], kept: Record | None) -> str:
    """Return margin and recovered share against the epoch, an attempt by line, with the kept epoch ringed."""
    attempts = _with(attempts_of(trace), "margin")
    if not attempts:
        return ""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(height=4.2, panels=2)
    titles = {"margin": "margin of the refusal, nats", "recovered": "recovered share of requests to refuse"}
    for ax, (key, title) in zip(axes, titles.items()):
        for attempt, look in zip(attempts, _looks(len(attempts))):
            _line(ax, attempt, "epoch", key, look)
        _ring(ax, kept_record(trace, kept), "epoch", key)
        ax.set_title(title, loc="left", fontsize=10, color=_INK)
        ax.yaxis.grid(True, color=_GRID, linewidth=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].axhline(SAFE_MARGIN, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    axes[1].set_ylim(-0.05, 1.08)
    axes[-1].set_xlabel("epoch")
    _legend(figure, axes[0], attempts)
    return _svg(figure, "path", "Margin and recovered share by epoch")


def plane_figure(trace: Sequence[Record], kept: Record | None, bounds: Record | None) -> str:
    """Return recovered and refused shares against how far harmless answers are from where they should be.

    Args:
        bounds: {recovered, refused, ...} of a good epoch; drawn where they are near the path
    """
    attempts = _with(attempts_of(trace), "distance")
    if not attempts:
        return ""
    bounds = bounds or {}
    figure, axes = _figure(height=4.4, panels=2)
    titles = {"recovered": "requests to refuse: recovered share", "refused": "harmless requests: refused share"}
    farthest = max(row["distance"] for attempt in attempts for row in attempt.records)
    for ax, (key, title) in zip(axes, titles.items()):
        for attempt, look in zip(attempts, _looks(len(attempts))):
            _line(ax, attempt, "distance", key, look)
        _ring(ax, kept_record(trace, kept), "distance", key)
        _begin(ax, attempts[0].records[0], "distance", key)
        ax.set_title(title, loc="left", fontsize=10, color=_INK)
        ax.yaxis.grid(True, color=_GRID, linewidth=0.8)
        if 3 * farthest >= 1.0:
            ax.axvline(1.0, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
        ax.set_ylim(-0.05, 1.08)
        if far := farthest > _FAR:  # the good epochs would be one blob
            ax.set_xscale("symlog", linthresh=1.0)
            ax.xaxis.set_major_formatter("{x:g}")
    if _finite(bounds.get("refused")):
        axes[1].axhline(bounds["refused"], color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    highest = max((row["refused"] for a in attempts for row in a.records if _finite(row.get("refused"))), default=0.0)
    axes[1].set_ylim(-0.03, max(0.12, 1.1 * highest))
    if not far:
        axes[-1].locator_params(axis="x", nbins=5)
    scale = "bound 1, then logarithmic" if far else "1: the bound"
    axes[-1].set_xlabel(f"distance of harmless answers ({scale})")
    _legend(figure, axes[0], attempts)
    return _svg(figure, "plane", "Safety against utility along the path")


def _label(run: Sequence[Record], number: int) -> str:
    """The guard's weight, from the least to the most where the method steers it."""
    weights = weights_of(run)
    if weights is None:
        return f"attempt {number}"
    least, most = (f"{weight:.3g}" for weight in weights)
    return f"guard weight {least}" if least == most else f"guard weight {least} to {most}"


def _with(attempts: Sequence[Attempt], key: str) -> list[Attempt]:
    """The attempts with the records in which the key is a number."""
    found = [Attempt(a.label, [row for row in a.records if _finite(row.get(key))]) for a in attempts]
    return [attempt for attempt in found if attempt.records]


def _looks(count: int) -> list[tuple[str, str, Any]]:
    """One look each; those that have none of their own are all alike."""
    named = count if count <= len(_LOOKS) else len(_LOOKS) - 1
    return [*_LOOKS[:named], *[_OTHERS] * (count - named)]


def _line(ax: Any, attempt: Attempt, x: str, y: str, look: tuple[str, str, Any]) -> None:
    color, mark, dashes = look
    points = [(row[x], row[y]) for row in attempt.records if _finite(row.get(x)) and _finite(row.get(y))]
    if points:
        ax.plot(
            *zip(*points), color=color, marker=mark, markersize=3.2, linewidth=1.5, linestyle=dashes,
            label=attempt.label, zorder=1.5 if look is _OTHERS else 2,
        )  # fmt: skip


def _ring(ax: Any, record: Record | None, x: str, y: str) -> None:
    if record is not None and _finite(record.get(x)) and _finite(record.get(y)):
        ax.plot(
            [record[x]], [record[y]], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=_INK,
            markeredgewidth=1.6, linestyle="none", label="kept", clip_on=False,
        )  # fmt: skip


def _begin(ax: Any, record: Record, x: str, y: str) -> None:
    if _finite(record.get(x)) and _finite(record.get(y)):  # a mark, as a word would lie over other points
        ax.plot(
            [record[x]], [record[y]], marker="x", markersize=6, markeredgecolor=_INK, markeredgewidth=1.4,
            linestyle="none", label="begin", clip_on=False,
        )  # fmt: skip


def _legend(figure: Any, ax: Any, attempts: Sequence[Attempt]) -> None:
    """The attempts that have looks of their own, the others as one, and the marks."""
    others = {attempt.label for attempt, look in zip(attempts, _looks(len(attempts))) if look is _OTHERS}
    shown: dict[str, Any] = {}  # label -> handle
    for handle, label in zip(*ax.get_legend_handles_labels()):
        shown.setdefault(f"{len(others)} more attempts" if label in others else label, handle)
    columns = 3 if max(map(len, shown)) <= _SHORT else 2
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper left", ncols=columns, frameon=False, fontsize=9.5,
        labelcolor=_INK, handlelength=1.8,
    )  # fmt: skip
