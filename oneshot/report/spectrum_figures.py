"""The figures of the spectrum, as inline SVG in the page's own colours; "" where there is nothing to draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from oneshot.report.figures import _GRID, _INK, _SERIES, _figure, _finite, _svg

_COLORS = {"safety": _SERIES[0], "harmful": _SERIES[1], "task": _SERIES[2], "guard": _SERIES[3]}
_CELLS_WITH_NUMBERS = 200  # in more of them nobody could read a number
_ROW, _MARGIN = 0.16, 1.35  # inches
_FLOOR = 1e-4  # nats: less is drawn as this, on a logarithmic scale
_GUARD = "guard: KL to the unpatched model"


def energy(spectra: Sequence[Sequence[float]]) -> str:
    """Cumulative energy ratio against k: the median over matrices, and their range.

    Args:
        spectra: singular values of every matrix, falling
    """
    if not spectra:
        return ""
    longest = max(len(values) for values in spectra)
    curves = []
    for values in spectra:
        total, running, curve = sum(v * v for v in values), 0.0, []
        for value in values:
            running += value * value
            curve.append(running / total)
        curves.append(curve + [1.0] * (longest - len(curve)))
    ks = list(range(1, longest + 1))
    columns = list(zip(*curves))
    figure, (ax,) = _figure(height=2.6)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    ax.fill_between(ks, low, high, color=_SERIES[0], alpha=0.25, linewidth=0, label="range")
    median = [statistics.median(c) for c in columns]
    marks = "o" if longest <= 40 else None
    ax.plot(ks, median, color=_SERIES[0], marker=marks, markersize=3.5, linewidth=1.6, label="median")
    ax.set_ylim(0, 1.03)
    ax.set_xlim(left=0.5 if longest <= 40 else 1)
    ax.set_xlabel("k")
    _whole_numbers(ax)
    _legend(ax, "lower right")
    return _svg(figure, "energy", "Share of the safety gradient's energy in its first k directions")


def heat_map(cells: Mapping[tuple[int | None, str], float]) -> str:
    """A value per layer (down) and module (across), stronger where larger, with the number where there is room."""
    from matplotlib.patches import Rectangle

    known = {key: value for key, value in cells.items() if key[0] is not None and math.isfinite(value)}
    if not known:
        return ""
    layers = sorted({layer for layer, _ in known if layer is not None})
    modules = list(dict.fromkeys(module for _, module in known))
    numbers = len(layers) * len(modules) <= _CELLS_WITH_NUMBERS
    height = (0.26 if numbers else 7.0 / len(layers) if len(layers) > 44 else _ROW) * len(layers)
    figure, (ax,) = _figure(height=_MARGIN + max(height, 0.5))
    least, most = min(known.values()), max(known.values())
    for (layer, module), value in known.items():
        assert layer is not None
        x, y = modules.index(module), layers.index(layer)
        strength = 0.12 + 0.58 * ((value - least) / (most - least) if most > least else 0.5)
        ax.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=_SERIES[0], alpha=strength, linewidth=0))
        if numbers:
            ax.text(x + 0.5, y + 0.52, f"{value:.1f}", ha="center", va="center", fontsize=8.5, color=_INK)
    ax.set_xlim(0, len(modules))
    ax.set_ylim(len(layers), 0)
    shown = layers if len(layers) <= 20 else layers[:: max(1, len(layers) // 10)]
    ax.set_yticks([layers.index(layer) + 0.5 for layer in shown], [str(layer) for layer in shown])
    names = [module.rpartition(".")[2] for module in modules]
    names = names if len(set(names)) == len(names) else modules
    ax.set_xticks([x + 0.5 for x in range(len(modules))], names, rotation=40, ha="right", parse_math=False)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_ylabel("layer", color=_INK)
    if not numbers:
        ax.set_title(f"from {least:.1f} (pale) to {most:.1f}", loc="left", fontsize=9.5, color=_INK)
    return _svg(figure, "ranks", "Effective rank by layer and module")


def cosines(layers: Mapping[int, Mapping[str, float]]) -> str:
    """Cosine of each group's gradient with the example's, by layer.

    Args:
        layers: layer -> group -> cosine
    """
    groups = list(dict.fromkeys(group for row in layers.values() for group, v in row.items() if _finite(v)))
    if not groups:
        return ""
    figure, (ax,) = _figure(height=2.6)
    ax.axhline(0, color=_INK, linewidth=0.8)
    for place, group in enumerate(groups):
        points = [(layer, row[group]) for layer, row in sorted(layers.items()) if _finite(row.get(group))]
        _line(ax, points, _COLORS.get(group, _SERIES[place % len(_SERIES)]), group)
    low, high = ax.get_ylim()
    ax.set_ylim(max(-1.05, low), min(1.05, high))
    ax.set_xlabel("layer")
    _whole_numbers(ax)
    _legend_above(figure, len(groups))
    return _svg(figure, "cosines", "Cosine with the safety gradient by layer")


def overlaps(layers: Mapping[int, Mapping[str, Any]]) -> str:
    """Overlap of left and right subspaces by layer, and that of random subspaces (dashed).

    Args:
        layers: layer -> overlap_left, overlap_right, chance_left, chance_right
    """
    known = {layer: row for layer, row in sorted(layers.items()) if _finite(row.get("overlap_left"))}
    if not known:
        return ""
    figure, (ax,) = _figure(height=2.6)
    for side, what, color in (("left", "outputs (left)", _SERIES[0]), ("right", "inputs (right)", _SERIES[2])):
        _line(ax, [(layer, row[f"overlap_{side}"]) for layer, row in known.items()], color, what)
        chance = [row[f"chance_{side}"] for row in known.values()]
        ax.plot(list(known), chance, color=color, linewidth=1.2, linestyle=(0, (3, 2)))
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("layer")
    _whole_numbers(ax)
    _legend_above(figure, 2)
    return _svg(figure, "overlaps", "Overlap of singular subspaces by layer")


def sweep_figure(rows: Sequence[Mapping[str, float]]) -> str:
    """Losses on the example and on others, and the guard's KL, against alpha; a stronger line has more directions."""
    from matplotlib.ticker import NullFormatter

    panels = {"loss": "loss on the example", "others_loss": "loss on other safety examples", "guard_kl": _GUARD}
    panels = {key: title for key, title in panels.items() if any(_finite(row.get(key)) for row in rows)}
    if not panels:
        return ""
    ranks = sorted({int(row["rank"]) for row in rows})
    alphas = sorted({row["alpha"] for row in rows})
    figure, axes = _figure(height=0.6 + 1.7 * len(panels), panels=len(panels))
    for ax, (key, title) in zip(axes, panels.items()):
        for place, rank in enumerate(ranks):
            points = [
                (row["alpha"], max(row[key], _FLOOR)) for row in rows if row["rank"] == rank and _finite(row[key])
            ]
            strength = min(1.0, 0.2 + 0.8 * (place + 1) / len(ranks))  # of 3 ranks it is a little more than 1
            ax.plot(
                *zip(*sorted(points)), color=_SERIES[0], alpha=strength, marker="o", markersize=3.2, linewidth=1.5,
                label=f"k = {rank}",
            )  # fmt: skip
        ax.set_title(title, loc="left", fontsize=10, color=_INK)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(which="minor", length=0)
        ax.yaxis.grid(True, color=_GRID, linewidth=0.8)
    axes[-1].set_xlabel("alpha")
    _legend_above(figure, 3, axes[0])
    return _svg(figure, "sweep", "Losses and guard KL against the step, by number of directions")


def _line(ax: Any, points: Sequence[tuple[float, float]], color: str, label: str) -> None:
    marks = "o" if len(points) <= 40 else None
    ax.plot(*zip(*points), color=color, marker=marks, markersize=3.5, linewidth=1.6, label=label)


def _whole_numbers(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.grid(True, color=_GRID, linewidth=0.8)


def _legend(ax: Any, where: str) -> None:
    ax.legend(loc=where, frameon=False, fontsize=9.5, labelcolor=_INK)


def _legend_above(figure: Any, columns: int, ax: Any = None) -> None:
    handles = ax.get_legend_handles_labels() if ax is not None else ()
    style = {"frameon": False, "fontsize": 9.5, "labelcolor": _INK, "handlelength": 1.4}
    figure.legend(*handles, loc="outside upper left", ncols=columns, **style)
