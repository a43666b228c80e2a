"""Figures as inline SVG whose colours the page's style sheet decides, so that they suit light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from oneshot.report.table import measure_name, ordered_rates

STAGES = ("aligned", "finetuned", "repaired")
LABEL_CHARACTERS = 34

# matplotlib knows no CSS: it draws in these stand-ins, which are replaced in its output.
_INK, _GRID, _SERIES = "#010203", "#010204", ("#010205", "#010206", "#010207", "#010208")
_STAND_INS = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    **{color: f"var(--series-{index + 1})" for index, color in enumerate(_SERIES)},
}


def rates_figure(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return an SVG of horizontal bars, one group per measure and one bar per stage, with intervals; "" for no rates.

    Args:
        stages: as in report.json: stage to rate name to {value, low, high, n}
    """
    names = ordered_rates(name for rates in stages.values() for name in rates)
    if not names:
        return ""
    rows = len(stages)
    step = rows + 0.9
    figure, axes = _figure(height=0.75 + 0.185 * step * len(names))
    ax = axes[0]
    for place, (stage, rates) in enumerate(stages.items()):
        color = _SERIES[stage_series(stage, place)]
        bars = [(index * step + place, rates[name]) for index, name in enumerate(names) if _has_value(rates.get(name))]
        ys = [y for y, _ in bars]
        values = [rate["value"] for _, rate in bars]
        below = [max(0.0, rate["value"] - rate["low"]) for _, rate in bars]
        above = [max(0.0, rate["high"] - rate["value"]) for _, rate in bars]
        ax.barh(ys, values, height=0.82, color=color, label=stage)
        ax.errorbar(values, ys, xerr=[below, above], fmt="none", color=_INK, ecolor=_INK, elinewidth=1, capsize=2)
    middle = (rows - 1) / 2
    # A group's name may be a sentence, which would leave the bars no room; the table has it whole.
    full = [" ".join(measure_name(name).split()) for name in names]
    labels = [name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…" for name in full]
    # A group's name comes from the user's file: a dollar sign in it is no formula.
    ax.set_yticks([index * step + middle for index in range(len(names))], labels, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) * step - 1, -0.9)
    ax.set_xlim(0, 1.02)
    ax.xaxis.grid(True, color=_GRID, linewidth=0.8)
    figure.legend(loc="outside upper left", ncols=rows, frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1)
    return _svg(figure, "rates", "Rates per stage with 95% intervals")


def stage_series(stage: str, place: int) -> int:
    """Return which of the page's colours a stage has, the same wherever the stage is shown."""
    return STAGES.index(stage) if stage in STAGES else min(place, len(_SERIES) - 1)


def series_of(stages: Iterable[str]) -> dict[str, int]:
    """Return each stage's colour number, from 1, as the style sheet names them."""
    return {stage: stage_series(stage, place) + 1 for place, stage in enumerate(stages)}


def _figure(height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    # Narrow on purpose: on a phone the text of a wide figure would shrink with it. No pyplot: it keeps global state.
    figure = Figure(figsize=(4.7, height), layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        ax.set_facecolor("none")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_INK)
        ax.tick_params(colors=_INK, labelsize=9.5)
        ax.xaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Any, name: str, title: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # its style element is the page's business: the policy lets no other style sheet in
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    for color, replacement in _STAND_INS.items():
        text = text.replace(color, replacement)
    text = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 system-ui, sans-serif", text)
    # Several figures share a page: their ids must not meet.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    opening = re.sub(r' (?:width|height)="[^"]*"', "", text[: text.index(">")])
    return f'{opening} role="img" aria-label="{title}"{text[text.index(">") :]}'


def _has_value(rate: Mapping[str, Any] | None) -> bool:
    return rate is not None and _finite(rate.get("value"))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
