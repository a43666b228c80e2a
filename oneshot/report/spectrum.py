"""spectrum.json, spectrum.html and the console's table: the safety gradient's spectrum, by layer and by module."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.patch.spectrum import Matrix, Spectrum, cosine_over
from oneshot.report import spectrum_figures
from oneshot.report.markup import Cell, document, escaped, figures_grid, pairs, section, table, warnings_section
from oneshot.report.plain import one_line
from oneshot.report.runfolder import write_json, write_whole
from oneshot.report.spectrum_medians import SHOWN_RANKS, by_layer, by_module, medians, module_of, short_name

if TYPE_CHECKING:
    from rich.table import Table

JSON, PAGE = "spectrum.json", "spectrum.html"
EXPLAINED = {
    "safety": "other safety examples and their refusals",
    "harmful": "harmful conversations of the fine-tune's data",
    "task": "the fine-tune's task",
    "guard": "guard prompts, with the model's own answers",
}


def console_table(spectrum: Spectrum) -> Table:
    """Return the table of medians per module, and of all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = (
        "Medians over layers. k 90%, 99%: directions that hold so much of sum(sigma^2). overlap: of the leading "
        "directions with those of other safety examples, mean of left and right (random: what chance gives). cos: "
        "with the example's gradient, layers together."
    )
    groups = list(spectrum.cosines)
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    heads = ["module", "rank", "eff.\nrank", "k 90%", "k 99%", "overlap", "random", *[f"cos\n{g}" for g in groups]]
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    modules = by_module(spectrum)
    for name, matrices in {**modules, "all": spectrum.matrices}.items():
        if name == "all":
            table.add_section()
        row = medians(matrices, groups)
        cells = [
            f"{row['rank']:.0f}",
            f"{row['effective_rank']:.1f}",
            f"{row['directions_90']:.0f}",
            f"{row['directions_99']:.0f}",
            *[_mean(row[f"{kind}_left"], row[f"{kind}_right"]) for kind in ("overlap", "chance")],
            *[_signed(row["cosines"][group]) for group in groups],
        ]
        table.add_row(Text(one_line(short_name(name, modules))), *cells)
    return table


def sweep_table(sweep: Sequence[Mapping[str, float]]) -> Table:
    """Return, for every number of directions, the step with the least loss on other safety examples."""
    from rich import box
    from rich.table import Table

    caption = "Of all step sizes the one with the lowest loss on other safety examples; nats per token."
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for head in ("k", "energy", "alpha", "loss on example", "on others", "guard KL"):
        table.add_column(head, justify="right")
    for rank in sorted({int(row["rank"]) for row in sweep}):
        rows = [row for row in sweep if row["rank"] == rank]
        by = "others_loss" if any(_known(row["others_loss"]) for row in rows) else "loss"
        known = [row for row in rows if _known(row[by])]
        if known:
            best = min(known, key=lambda row: row[by])
            keys = {"energy": ".3f", "alpha": "g", "loss": ".4f", "others_loss": ".4f", "guard_kl": ".4f"}
            table.add_row(str(rank), *[_format(best[key], how) for key, how in keys.items()])
    return table


def write_spectrum(
    run_dir: Path, spectrum: Spectrum, facts: Mapping[str, Any], sweep: Sequence[Mapping[str, float]]
) -> Path:
    """Write spectrum.json and spectrum.html, and return the page's path.

    Args:
        facts: model, example, groups (name -> conversations), notes, resources and versions, for both
        sweep: rows of ``project.sweep``; empty for none
    """
    whole = {
        "schema": 1,
        **facts,
        "summary": medians(spectrum.matrices, spectrum.cosines),
        "cosines_each": spectrum.each,
        "matrices": [vars(matrix) for matrix in spectrum.matrices],
        "sweep": list(sweep),
    }
    write_json(run_dir / JSON, whole, indent=1)
    return write_whole(run_dir / PAGE, _page(spectrum, facts, sweep))


def read_spectrum(run_dir: Path) -> str | None:
    """Return words and figures of the folder's spectrum.json as HTML; none where it is not one of ours."""
    try:
        whole = json.loads((run_dir / JSON).read_text(encoding="utf-8"))
        matrices = [Matrix(**_numbers(fields)) for fields in whole["matrices"]]
        cosines, sweep = _numbers(whole["summary"]["cosines"]), [dict(row) for row in whole["sweep"]]
        each = {group: [_numbers(value) for value in values] for group, values in whole["cosines_each"].items()}
        return words_of(medians(matrices, cosines)) + figures_of(Spectrum(matrices, cosines, each), sweep)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _page(spectrum: Spectrum, facts: Mapping[str, Any], sweep: Sequence[Mapping[str, float]]) -> str:
    example = facts["example"]
    title = f"Spectrum of the safety gradient: {facts['model']}"
    groups = [(EXPLAINED.get(name, name), count) for name, count in facts["groups"].items()]
    body = [
        f"<h1>{escaped(title)}</h1>",
        words_of(medians(spectrum.matrices, spectrum.cosines)),
        f'<p class="soft">The gradient of one refusal, to "{escaped(example["prompt"])}" '
        f"(example {escaped(example['id'])}), per weight matrix, at the model as it is.</p>",
        warnings_section(facts["notes"]),
        section("Figures", figures_of(spectrum, sweep)),
        section("Medians by module", _modules(spectrum)),
        section("Patches along the gradient", _sweep(sweep)),
        section("Conversations compared with the example", pairs(groups)),
        section("Versions", pairs([(name, value or "not installed") for name, value in facts["versions"].items()])),
    ]
    return document(title, body)


def words_of(found: Mapping[str, Any]) -> str:
    k = found["directions_90"]
    said = (
        f"In the median of {found['matrices']} matrices {k:.0f} direction{'s' if k > 1 else ''} of {found['rank']:.0f} "
        f"hold 90% of the gradient's energy and {found['directions_99']:.0f} hold 99%; the effective rank is "
        f"{found['effective_rank']:.1f}."
    )
    cosines = [f"{name} {value:+.2f}" for name, value in found["cosines"].items() if math.isfinite(value)]
    return f"<p>{escaped(said)}{escaped(' Cosines with it: ' + ', '.join(cosines) + '.') if cosines else ''}</p>"


def figures_of(spectrum: Spectrum, sweep: Sequence[Mapping[str, float]]) -> str:
    cells = {module_of(matrix.name): matrix.effective_rank for matrix in spectrum.matrices if matrix.rank}
    layers = by_layer(spectrum)
    return figures_grid(
        [
            (
                spectrum_figures.energy([m.singular_values for m in spectrum.matrices if m.rank]),
                "Share of sum(sigma^2) in the first k directions: median over matrices, and the range of all.",
            ),
            (
                spectrum_figures.cosines(
                    {layer: {g: cosine_over(m, g) for g in spectrum.cosines} for layer, m in layers.items()}
                ),
                "Cosine with the example's gradient, all matrices of a layer together. Below 0 a step for one undoes "
                "the other.",
            ),
            (
                spectrum_figures.overlaps({layer: medians(matrices, ()) for layer, matrices in layers.items()}),
                "Overlap of the example's leading directions with those of other safety examples; dashed: of random "
                "ones.",
            ),
            (
                spectrum_figures.heat_map(cells),
                "Effective rank of the example's gradient (exp of the entropy of its singular values).",
            ),
            (
                spectrum_figures.sweep_figure(sweep),
                "The model patched with k directions of the gradient: alpha 1 would bring the loss to 0, were it "
                "linear in the weights.",
            ),
        ]
    )


def _modules(spectrum: Spectrum) -> str:
    groups = list(spectrum.cosines)
    heads = ["module", "rank", "effective rank", "k at 90%", "k at 99%", *[f"CER({k})" for k in SHOWN_RANKS]]
    heads += ["overlap left, right", "random", *[f"cosine {group}" for group in groups]]
    rows = []
    for name, matrices in {**by_module(spectrum), "all": spectrum.matrices}.items():
        row = medians(matrices, groups)
        cells = [f"{row['rank']:.0f}", f"{row['effective_rank']:.1f}", f"{row['directions_90']:.0f}"]
        cells += [f"{row['directions_99']:.0f}", *[f"{row['energy'][str(k)]:.3f}" for k in SHOWN_RANKS]]
        cells += [_two(row["overlap_left"], row["overlap_right"]), _two(row["chance_left"], row["chance_right"])]
        cells += [_signed(row["cosines"][group]) for group in groups]
        rows.append([escaped(name), *cells])
    return table([escaped(head) for head in heads], rows)


def _sweep(sweep: Sequence[Mapping[str, float]]) -> str:
    heads = ["k", "alpha", "step", "energy", "loss on the example", "on other safety examples", "guard KL"]
    shown = {"alpha": "g", "step": ".3g", "energy": ".3f", "loss": ".4f", "others_loss": ".4f", "guard_kl": ".4f"}
    rows = [
        [Cell(str(row["rank"])), *[Cell(_format(row[key], how), _sort(row[key])) for key, how in shown.items()]]
        for row in sweep
    ]
    folded = table(heads, rows) if rows else ""
    return f"<details><summary>{len(rows)} patches</summary><div>{folded}</div></details>" if rows else ""


def _numbers(value: Any) -> Any:
    """A value of spectrum.json, with nan where JSON has null."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    return math.nan if value is None else value


def _format(value: float | None, how: str) -> str:
    return f"{value:{how}}" if _known(value) else "-"


def _sort(value: float | None) -> float | str:
    return value if value is not None and _known(value) else "-"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _two(first: float, second: float) -> str:
    return f"{first:.2f}, {second:.2f}" if math.isfinite(first) else "-"


def _mean(first: float, second: float) -> str:
    return f"{(first + second) / 2:.2f}" if math.isfinite(first) else "-"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "-"
