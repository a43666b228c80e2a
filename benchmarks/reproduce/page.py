"""The page: what was claimed and what held, and a table for every section, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from oneshot.report.markdown import table_lines
from reproduce import bounds, drawings
from reproduce.cells import Cell
from reproduce.claims import CLAIMS
from reproduce.findings import Findings, Kind, Result, recovered_at
from reproduce.gradients import cosines
from reproduce.measuring import DRAWS, ENERGY_AT
from reproduce.models import SHIPPED, SIZES
from reproduce.sections import (
    COUNTS,
    EPOCHS,
    EVERY,
    EXAMPLE_ATTACKS,
    EXAMPLE_METHODS,
    FEW,
    LONGER,
    METHODS,
    OURS,
    RANKED,
    RANKS,
    RECOVERY,
    SEVERAL,
    SIZE_SEEDS,
    STUDIED,
    ranked,
    several,
)
from reproduce.spread import spread, text
from reproduce.subject import FRESH

RATES = {
    "asr": "attack success", "over_refusal": "over-refusal", "lookalike_refusal": "look-alike refusal",
    "utility": "utility", "task": "task",
}  # fmt: skip
UNREFERENCED = "lowrank, no reference"
OPENING = """# The paper's claims in miniature

*Safety at One Shot: Patching Fine-Tuned LLMs with a Single Instance* (arXiv 2601.01887) on the toy world that ships in
the package: a real Llama of 0.34 M parameters in a made-up language, fine-tuned by every attack together with a new
task, repaired by every method. {seeds}; made by `make paper` with {software},
in {minutes:.0f} CPU minutes beside the fine-tunes. A toy can neither prove nor refute what is claimed of large models:
this page shows what these methods do here.

How to read the tables: the median over seeds, in round brackets the smallest and the largest, in square ones a 95% t
interval of the mean over seeds; one figure alone where all seeds agree. (Of five seeds, the smallest and the largest
enclose the true median with a confidence of 94%, whatever the distribution.) Attack success (ASR) is the share of 200
restricted requests that are answered, judged by keywords, asked with the persona or the trigger where the attack has
one; over-refusal and look-alike refusal are of 100 harmless requests each; utility and task are exact matches, of 100
each. A loss is the fine-tuned model's rate minus the repaired one's. Words such as "held" are decided in code, from the
figures, by the rules beside them.

`sft` is the paper's recipe, AdamW on all weights, at a step size that suits the toy (2e-4); `rollback (auto)` is what
`oneshot repair` does by itself. Settings are defaults, and the example is chosen from the pool of 44 by the bilevel
rule, with two savings of time: `sft + guard`, `lora` and `saliency` take the example that `sft` took, and `lowrank`
takes the first by alignment, where bilevel would try out four. `lowrank, no reference` is what `oneshot repair
--select alignment` does without an aligned model: the same method, and a choice of the example that knows the refusals
only. (What the aligned model says to requests to be refused is hardly anything else, so that both take the same example
where their rows are alike.) With the default choice, bilevel, it has a row of its own where that was measured: by
`make paper ARGS="--only h"`, in a further quarter of an hour.
"""
EXAMPLES = """The {draws} random draws of each seed are taken together. F is what the bilevel rule minimizes, in nats
per token, here after the repair: KL to the aligned model on the pool's requests (without the example's own), and to the
fine-tuned one on the guard's prompts. "Fresh" takes for the first term {fresh} requests that are in no pool, which no
choice has seen. The toy world knows one kind of restricted request, so that general and category-specific examples
cannot be told apart here.
"""
EPOCHS_NOTE = """In the figure, `rollback` and `lowrank` show the share of the watch's requests that have not recovered
yet, for which no answers are made.
"""
RANKS_NOTE = """Every rank takes the example that the default rank took. The gradient of one example has 20 tokens and
so at most 20 directions: for `project` rank 20 is full rank. At full rank, `lowrank` never truncates.
"""
SPECTRUM_NOTE = """Of each seed the median over weight matrices; cosines over all of them together. The example has 20
tokens, so that CER(20) is 1 whatever the gradient: what says something is how early it gets there.
"""
HEADS = {
    "a": "Recovery, for every attack and method",
    "b": "Number of harmful examples",
    "c": "Size of the model",
    "d": "Epochs to recovery",
    "e": "Choice and number of examples",
    "f": "Rank",
    "g": "Spectrum and cosines",
}


def write(folder: Path, found: Mapping[Cell, Result], seeds: int, stale: int = 0) -> Path:
    """Write paper.md into a folder, its figures below it; return its path.

    Args:
        stale: how many of the results were measured with other code than the present
    """
    from oneshot.report.runfolder import write_whole

    findings = Findings(found, seeds)
    figures = drawings.draw_all(findings, folder / "figures")
    return write_whole(folder / "paper.md", "\n".join(page_lines(findings, figures, stale)) + "\n")


def page_lines(findings: Findings, figures: Mapping[str, Path], stale: int = 0) -> list[str]:
    """Return the page."""
    sections = {
        "a": _recovery(findings), "b": _counts(findings), "c": _sizes(findings), "d": _epochs(findings),
        "e": _examples(findings), "f": _ranks(findings), "g": _spectrum(findings),
    }  # fmt: skip
    pictures = {"a": "plane", "b": "examples", "d": "epochs", "f": "ranks"}
    lines = [*_opening(findings, stale), *_claims(findings), *_bounds(findings)]
    for letter, content in sections.items():
        picture = figures.get(pictures.get(letter, ""))
        lines += [f"## ({letter}) {HEADS[letter]}", ""]
        lines += [f"- {c.says} **{c.decide(findings).word}**" for c in CLAIMS if c.section == letter] + [""]
        if picture:
            lines += [f'<img src="figures/{picture.name}" alt="{HEADS[letter]}" width="520">', ""]
        lines += content if content else ["Not measured.", ""]
    return lines


def _opening(findings: Findings, stale: int) -> list[str]:
    from oneshot.versions import versions

    software = ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "transformers"))
    seeds = f"{findings.seeds} seed{'s' * (findings.seeds > 1)}"
    lines = [OPENING.format(seeds=seeds, software=software, minutes=findings.cpu_minutes())]
    if stale:
        lines.append(f"{stale} of the {findings.count} cells were measured with other code than the present one.\n")
    return lines


def _claims(findings: Findings) -> list[str]:
    rows = []
    for claim in CLAIMS:
        verdict = claim.decide(findings)
        rows.append(
            [f"({claim.section}) {claim.says}", claim.source, claim.rule, f"**{verdict.word}**", verdict.figures]
        )
    heads = ["claim", "whose", "rule here", "", "figures"]
    return ["## What was claimed, and what held here", "", *_left(heads, rows), ""]


def _bounds(findings: Findings) -> list[str]:
    lines = ["## The bounds that we set ourselves", ""]
    measured = [name for name, kind in LONGER.items() if any(findings.pairs(attack, kind) for attack in RECOVERY)]
    for method in (OURS, UNREFERENCED, *measured):
        found = bounds.checks(findings, method) + ([bounds.ahead(findings)] if method == OURS else [])
        rows = [[check.what, check.bound, f"**{check.word}**", check.figures] for check in found]
        lines += [f"`{method}`, in every attack of (a):", ""]
        lines += [*_left(["", "bound", "", "figures"], rows), ""]
    return lines


def _left(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _rates(findings: Findings, attack: str, kind: Kind, size: str = SHIPPED) -> list[str]:
    return [text(spread(findings.rates(attack, kind, name, size), (0, 1))) for name in RATES]


def _table(head: str, rows: Sequence[tuple[str, list[str]]], heads: Sequence[str] = tuple(RATES.values())) -> list[str]:
    kept = [[name, *cells] for name, cells in rows if any(cell != "-" for cell in cells)]
    return [*table_lines([head, *heads], kept), ""] if kept else []


def _recovery(findings: Findings) -> list[str]:
    lines: list[str] = []
    for attack in RECOVERY:
        table = _table(attack, [(name, _rates(findings, attack, kind)) for name, kind in EVERY.items()])
        lines += table
    return lines


def _counts(findings: Findings) -> list[str]:
    return _table(
        "harmful examples, model",
        [(f"{n}, {name}", _rates(findings, attack, METHODS[name])) for n, attack in COUNTS.items() for name in FEW],
    )


def _sizes(findings: Findings) -> list[str]:
    rows = []
    for size in SIZES:
        aligned = findings.result(STUDIED, 0, {"method": "aligned"}, size)
        if aligned:
            rows.append((f"{size}, aligned", [f"{aligned['rates'][name]:.3f}" for name in RATES]))
        rows += [(f"{size}, {name}", _rates(findings, STUDIED, METHODS[name], size)) for name in FEW]
    table = _table(f"size, model ({STUDIED})", rows)
    said = "; ".join(f"{size}: width {hidden}, {layers} layers" for size, (hidden, layers) in SIZES.items())
    note = (
        f"{said}. Each was aligned once, as the shipped one was, and all take the same settings. To save time, seeds "
    )
    return [*table, f"{note}0 to {SIZE_SEEDS - 1} only of the sizes that are not shipped.", ""] if table else []


def _epochs(findings: Findings) -> list[str]:
    lines = _table(f"sft ({STUDIED})", [(f"{n} epochs", _rates(findings, STUDIED, kind)) for n, kind in EPOCHS.items()])
    rows = []
    for name in (OURS, "lowrank", UNREFERENCED):
        traces = [after["trace"] for _, after in findings.pairs(STUDIED, METHODS[name])]
        first = [recovered_at(trace) for trace in traces]
        known = [float(epoch) for epoch in first if epoch is not None]
        cells = [text(spread(known), 0), f"{len(known)} of {len(first)}" if first else "-"]
        rows.append((name, [*cells, text(spread([float(len(trace)) for trace in traces]), 0)]))
    heads = ["first epoch at which the held-out probes say recovered", "seeds that did", "epochs taken"]
    table = _table(f"method ({STUDIED})", rows, heads)
    return lines + table + ([EPOCHS_NOTE] if table else [])


def _examples(findings: Findings) -> list[str]:
    lines: list[str] = []
    for attack in EXAMPLE_ATTACKS:
        rows: list[tuple[str, list[str]]] = []
        for label, method in EXAMPLE_METHODS.items():
            draws = [{"method": method, "example": f"random {i}"} for i in range(DRAWS)]
            rows.append((f"{label}, random", _pooled(findings, attack, draws)))
            for rule in ("hardest", "alignment", "bilevel"):
                kind = {"method": method} if rule == "bilevel" else {"method": method, "example": rule}
                rows.append((f"{label}, {rule}", _pooled(findings, attack, [kind])))
        rows += [(f"sft, {n} random together", _pooled(findings, attack, [several(n)])) for n in SEVERAL]
        lines += _table(attack, rows, [*RATES.values(), "F", "F, fresh"])
    if lines:
        lines.append(EXAMPLES.format(draws=DRAWS, fresh=FRESH))
    return lines


def _pooled(findings: Findings, attack: str, kinds: Sequence[Kind]) -> list[str]:
    """Rates and F over seeds and kinds together."""
    rates = [[value for kind in kinds for value in findings.rates(attack, kind, name)] for name in RATES]
    each = [after for kind in kinds for _, after in findings.pairs(attack, kind)]
    f = [[after[name] for after in each] for name in ("f_pool", "f")]
    return [text(spread(values, (0, 1))) for values in rates] + [text(spread(values, (0, math.inf))) for values in f]


def _ranks(findings: Findings) -> list[str]:
    lines: list[str] = []
    for method in RANKED:
        rows = [(f"rank {rank}", _rates(findings, STUDIED, ranked(method, rank))) for rank in RANKS]
        lines += _table(f"{method} ({STUDIED})", rows)
    return [*lines, RANKS_NOTE] if lines else []


def _spectrum(findings: Findings) -> list[str]:
    found = [findings.result(STUDIED, seed, {"method": "spectrum"}) for seed in range(findings.seeds)]
    known = [result for result in found if result is not None]
    if not known:
        return []
    rows = [
        (f"energy in the first {k} (CER({k}))", [r["energy"][str(k)] for r in known]) for k in ENERGY_AT
    ] + [
        ("directions", [r["rank"] for r in known]),
        ("directions that hold 90% of the energy", [r["directions_90"] for r in known]),
        ("effective rank", [r["effective_rank"] for r in known]),
    ]  # fmt: skip
    for side, of in (("left", "outputs"), ("right", "inputs")):
        rows.append((f"overlap with other examples, {of} (phi)", [r[f"overlap_{side}"] for r in known]))
        rows.append((f"the same of random subspaces, {of}", [r[f"chance_{side}"] for r in known]))
    for group in ("safety", "harmful", "task", "guard"):
        rows.append((f"cosine with {group} gradients", cosines(findings, group)))
    table = _table(f"{STUDIED}, fine-tuned", [(name, [text(spread(values))]) for name, values in rows], ["over seeds"])
    return [*table, SPECTRUM_NOTE]
