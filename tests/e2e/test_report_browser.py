"""report.html and compare.html in a real browser: what people see, and what cannot happen."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest

from oneshot.measure.rates import Probe, score_answers
from oneshot.patch.spectrum import Matrix, Spectrum
from oneshot.report import spectrum
from oneshot.report.comparison import compared, write_comparison
from oneshot.report.finished import read_runs
from oneshot.report.outputs import write_outputs
from oneshot.report.runfolder import Run, build_report

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(chromium.find() is None, reason="needs Chromium (Debian's package chromium)"),
]
REFUSAL = "I can't help with that."
EVIL = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
HOSTILE = [
    EVIL,
    "</p></div></details><h1>pwned</h1><style>body{display:none}</style>",
    "x" * 100_000,
    "\x1b[31mred\x1b[0m \x00 \x07 bell",
    "\u202etxt.exe\u2066 turned",
    "שלום, זה בסדר גמור לקפל את הכיסא",
    "**bold** [a link](http://example.invalid/x) `code` & &amp; &lt;b&gt;",
    "line\n\n\tafter line\r\nand more",
]


def trace() -> list[dict[str, Any]]:
    """Two attempts, of which the second gets there."""
    rows = []
    for weight, speed in ((1.0, 0.5), (0.25, 1.0)):
        for epoch in range(1, 11):
            share = min(1.0, speed * epoch / 8)
            rows.append(
                {
                    "epoch": epoch, "loss": 2.0 / epoch, "guard_kl": 0.01 * share, "guard_weight": weight,
                    "margin": 12 * share - 8, "recovered": share, "refused": 0.02 * share, "divergence": 0.012 * share,
                    "distance": 1.2 * share,
                }
            )  # fmt: skip
    return rows


def make_run(folder: Path, *, hostile: bool = True) -> Path:
    folder.mkdir(parents=True)
    kinds = ("should_refuse", "harmless", "lookalike", "utility", "task")
    texts = HOSTILE if hostile else ["Take the snib and turn it twice."] * 8
    probes = [
        Probe(f"{kind}-{i}", ({"role": "user", "content": f"{texts[i][:300]} {i}"},), kind, answer=REFUSAL)  # type: ignore[arg-type]
        for kind in kinds
        for i in range(len(texts))
    ]
    stages = {
        "aligned": score_answers(probes, [REFUSAL] * len(probes)),
        "finetuned": score_answers(probes, texts * len(kinds)),
        "repaired": score_answers(probes, [*texts[:2], *[REFUSAL] * (len(probes) - 2)]),
    }
    table = [
        {"id": f"c{i} {EVIL}", "alignment": 1 / i, "gradient_norm": 2.0, "f_before": 1.0, "f_after": 0.1 * i}
        for i in (1, 2)
    ]
    report = build_report(
        Run(EVIL if hostile else "lab/toy-7b", world_size=2, seed=5),
        example={
            "id": "pool-01", "prompt": texts[0], "response": REFUSAL, "selected_by": "bilevel", "score": 0.1,
            "selection": {"candidates": 3, "table": [{"id": "c3", "alignment": 0.2, "gradient_norm": 9.0}, *table]},
        },
        stages=stages,
        repair={
            "method": "rollback", "rank": 20, "stopped_by": "recovered (epoch 8, guard weight 0.25)",
            "bounds": {"recovered": 1.0, "refused": 0.02, "divergence": 0.01},
            "kept": {"epoch": 8, "guard_weight": 0.25}, "trace": trace(),
        },
        resources={"seconds": {"repair": 12.5}, "peak_rss_bytes": [2**31, 2**31], "peak_gpu_bytes": None},
        warnings=[texts[6]],
    )  # fmt: skip
    report["agreement"] = {
        "repaired": [{"judges": ["keywords", "guard"], "n": 8, "agree": 0.9, "kappa": 0.8, "differ": []}]
    }
    report["figures"] = {"repaired": {"perplexity": {"value": 12.3, "low": 11.0, "high": 14.0, "n": 40}}}
    (folder / "settings.yaml").write_text(f"out: {texts[1]}\nseed: 5\n", encoding="utf-8")
    matrices = [
        Matrix(
            f"model.layers.{i}.self_attn.q_proj",
            (8, 8),
            3,
            1.0,
            [3.0, 2.0, 1.0],
            2.7,
            2,
            3,
            norms={"task": 1.0},
            cosines={"task": 0.1},
        )
        for i in range(3)
    ]
    facts = {
        "model": "toy", "example": {"id": "e", "prompt": texts[0]}, "groups": {"task": 4}, "notes": [], "resources": {},
        "versions": {},
    }  # fmt: skip
    spectrum.write_spectrum(folder, Spectrum(matrices, {"task": 0.1}, {"task": [0.1]}), facts, [])
    write_outputs(folder, report, stages)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def texts(browser: chromium.Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.innerText)")


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (390, False)])
def test_the_report_is_seen_whole_and_asks_for_nothing(
    browser: chromium.Browser, run: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.shape(width, dark=dark)
    browser.open(run / "report.html")
    assert browser.problems() == []
    assert browser.requests() == [(run / "report.html").resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    boxes = browser.run(
        "[...document.querySelectorAll('figure svg')].map((s) => { const b = s.getBoundingClientRect(), "
        "c = s.closest('figure').getBoundingClientRect(); return [s.getAttribute('aria-label'), b.width, b.height, "
        "b.right <= c.right + 1 && b.right <= innerWidth, s.querySelectorAll('path, use').length]; })"
    )
    names = {box[0] for box in boxes}
    assert names >= {"Rates per stage with 95% intervals", "Repair by epoch", "Margin and recovered share by epoch"}
    assert "Safety against utility along the path" in names
    assert "Share of the safety gradient's energy in its first k directions" in names
    for name, wide, high, inside, marks in boxes:
        assert min(wide - 100, high) > 150, name
        assert inside, name
        assert marks >= 5, name
    ground, ink = browser.run(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light_of = [sum(map(int, color.strip("rgb()").split(","))) for color in (ground, ink)]
    assert (light_of[0] < 150 < 500 < light_of[1]) if dark else (light_of[1] < 150 < 500 < light_of[0])
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_lines_of_figures_have_the_pages_colours(browser: chromium.Browser, run: Path) -> None:
    seen = []
    for dark in (False, True):
        browser.shape(1100, dark=dark)
        browser.open(run / "report.html")
        script = "[...new Set([...document.querySelectorAll('svg [style*=\"--series\"]')].map((e) => "
        seen.append(set(browser.run(script + "getComputedStyle(e).stroke + getComputedStyle(e).fill))]")))
    assert len(seen[0]) >= 3
    assert seen[0] != seen[1]


def test_what_models_and_users_wrote_is_only_text(browser: chromium.Browser, run: Path) -> None:
    browser.shape(1100)
    browser.open(run / "report.html")
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("document.title").startswith("Safety report: <script>")
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelectorAll('img, iframe, link, a, main style, h1 ~ h1').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= 1100
    body = browser.run("document.body.innerText")
    for words in (
        EVIL,
        "<U+001B>[31mred",
        "<U+202E>txt.exe<U+2066> turned",
        "שלום",
        "[a link](http://example.invalid/x)",
    ):
        assert words in body
    assert "&amp; &lt;b&gt;" in body
    assert browser.problems() == []
    assert len(browser.requests()) == 1


def test_should_escaping_fail_the_policy_holds(browser: chromium.Browser, run: Path, tmp_path: Path) -> None:
    """Markup put into the finished page, as if it had not been escaped: it neither runs nor loads anything."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 1  # Chromium connects to where a form leads before it knows whether it may go there

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        bad = (
            f"<script>window.pwned = 1</script><script src='{url}/s'></script><img src='{url}/i' onerror='pwned=1'>"
            f"<iframe src='{url}/f'></iframe><link rel=stylesheet href='{url}/c'><svg onload='window.pwned=1'></svg>"
            f"<style>body {{ background: url({url}/b) }} h1 {{ display: none }}</style>"
            f"<p style='background: url({url}/a)'>x</p><base href='{url}/'>"
            f"<form action='{url}/p'><button>x</button></form>"
        )
        whole = (run / "report.html").read_text(encoding="utf-8")
        (tmp_path / "bad.html").write_text(whole.replace("<main>", f"<main>{bad}"), encoding="utf-8")
        browser.open(tmp_path / "bad.html")
        assert browser.run("window.pwned === undefined && document.querySelector('main button') !== null")
        browser.run("document.querySelector('main button').click()")
        assert browser.run("getComputedStyle(document.querySelector('main > h1')).display") == "block"
        assert browser.run("location.protocol") == "file:"
        server.shutdown()
    assert asked == []
    assert browser.problems(), "the policy tells the console what it stopped"


def test_tables_sort_by_number_and_by_name(browser: chromium.Browser, run: Path) -> None:
    browser.shape(1100)
    browser.open(run / "report.html")
    names = "table:first-of-type tbody th"
    first = "document.querySelector('table.sortable')"

    def column(place: int) -> list[float]:
        cells = browser.run(f"[...{first}.tBodies[0].rows].map((r) => r.cells[{place}].innerText)")
        return [float(cell.split()[0]) for cell in cells if cell != "-"]

    before = browser.run(f"[...{first}.tBodies[0].rows].map((r) => r.cells[0].innerText)")
    assert len(before) >= 6
    for direction, reverse in (("ascending", False), ("descending", True)):
        browser.run(f"{first}.tHead.rows[0].cells[2].querySelector('button').click()")
        assert browser.run(f"{first}.tHead.rows[0].cells[2].getAttribute('aria-sort')") == direction
        assert column(2) == sorted(column(2), reverse=reverse)
        assert len(set(column(2))) > 2
    browser.run(f"{first}.tHead.rows[0].cells[4].querySelector('button').click()")
    assert column(4) == sorted(column(4))
    assert {len(str(int(n))) for n in column(4)} == {1, 2}, "else letters would sort like numbers"
    browser.run(f"{first}.tHead.rows[0].cells[0].querySelector('button').click()")
    after = browser.run(f"[...{first}.tBodies[0].rows].map((r) => r.cells[0].innerText)")
    assert after == sorted(before)
    assert browser.run(f"{first}.querySelectorAll('[aria-sort]').length") == 1
    assert texts(browser, names)
    changed = "[...document.querySelectorAll('table.sortable')].find((t) => t.innerText.includes('difference'))"
    browser.run(f"{changed}.tHead.rows[0].cells[6].querySelector('button').click()")
    likely = browser.run(f"[...{changed}.tBodies[0].rows].map((r) => r.cells[6].innerText)")
    assert [float(p.strip("<")) for p in likely] == sorted(float(p.strip("<")) for p in likely)
    assert browser.problems() == []


def test_missing_values_stay_below_whichever_way_a_table_is_sorted(browser: chromium.Browser, run: Path) -> None:
    browser.open(run / "report.html")
    table = "[...document.querySelectorAll('table.sortable')].find((t) => t.textContent.includes('F after'))"
    last = browser.run(f"[...{table}.tHead.rows[0].cells].findIndex((c) => c.textContent === 'F after')")
    for _ in range(2):
        browser.run(f"{table}.tHead.rows[0].cells[{last}].querySelector('button').click()")
        assert browser.run(f"{table}.tBodies[0].rows[2].cells[{last}].textContent") == "-"


def test_folded_answers_open(browser: chromium.Browser, run: Path) -> None:
    browser.shape(1100)
    browser.open(run / "report.html")
    seen = "document.querySelector('.answers').checkVisibility()"
    assert browser.run(seen) is False
    browser.run("document.querySelector('details.fold > summary').click()")
    assert browser.run("document.querySelector('details.fold details.fold').getBoundingClientRect().height") > 0
    assert browser.run(seen) is False, "each harmful answer is folded by itself"
    browser.run("document.querySelector('details.fold details.fold > summary').click()")
    assert browser.run(seen) is True
    columns = browser.run(
        "[...document.querySelector('.answers').children].map((c) => [c.getBoundingClientRect().top, c.innerText])"
    )
    assert len({top for top, _ in columns}) == 1, "side by side"
    assert [text.split()[0] for _, text in columns] == ["aligned", "finetuned", "repaired"]
    assert all(len(text) < 400 for _, text in columns)


def test_it_reads_without_scripts(browser: chromium.Browser, run: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(run / "report.html")
        assert browser.run("document.querySelectorAll('th button').length") == 0
        assert browser.run("document.querySelector('thead').innerText").split() == [
            "measure", "aligned", "finetuned", "repaired", "n",
        ]  # fmt: skip
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_settings_are_open_and_harmful_answers_folded(browser: chromium.Browser, run: Path) -> None:
    browser.shape(760, dark=True, media="print")
    browser.open(run / "report.html")
    assert browser.run("document.querySelector('details.printed > pre').checkVisibility()")
    assert browser.run("document.querySelector('details.printed').getBoundingClientRect().height") > 80
    assert not browser.run("document.querySelector('.answers').checkVisibility()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.call("Page.printToPDF", printBackground=False)["data"].startswith("JVBERi0")
    browser.shape(1100)


def test_a_comparison_and_a_spectrum_are_seen_alike(browser: chromium.Browser, run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / EVIL.replace("/", "-"), hostile=False)
    pages = [path for path in write_comparison(tmp_path, compared(read_runs([run, other]))) if path.suffix == ".html"]
    for page in [*pages, run / "spectrum.html"]:
        for width in (390, 1100):
            browser.shape(width)
            browser.open(page)
            assert browser.problems() == []
            assert browser.run("document.documentElement.scrollWidth") <= width, page
            assert not browser.run("document.title").startswith("pwned")
            assert len(browser.requests()) == 1
    browser.open(pages[0])
    table = "[...document.querySelectorAll('table.sortable')].find((t) => t.tHead.innerText.includes('attack'))"
    browser.run(f"{table}.tHead.rows[0].cells[1].querySelector('button').click()")
    assert browser.run(f"{table}.tBodies[0].rows.length") == 2


def test_n_is_not_cut_on_a_phone(browser: chromium.Browser, tmp_path: Path) -> None:
    page = make_run(tmp_path / "calm", hostile=False) / "report.html"
    shown = (
        "[...document.querySelectorAll('table.counts')].map((t) => [...t.querySelectorAll('SELECTOR')].every((c) => "
        "{ const b = c.getBoundingClientRect(); return b.width > 0 && b.left >= 0 && b.right <= innerWidth; }))"
    )
    for width, seen, not_seen in ((380, ".count", "td:last-child"), (1200, "td:last-child", ".count")):
        browser.shape(width)
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert all(browser.run(shown.replace("SELECTOR", seen))), width
        assert not any(browser.run(shown.replace("SELECTOR", not_seen))), width


def test_a_comparison_is_not_cut_on_a_laptop(browser: chromium.Browser, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, hostile=False) for name in ("one", "two", "three")]
    rate = {"value": 0.97, "low": 0.95, "high": 0.99, "n": 400}
    names = [
        "asr",
        "asr_seen",
        "asr_unseen",
        "over_refusal",
        "lookalike_refusal",
        "empty",
        "garbled",
        "utility",
        "task",
    ]
    for folder in runs:
        report = json.loads((folder / "report.json").read_text())
        rates = dict.fromkeys([*names, "task", "asr_by_harmbench"], rate)
        report["stages"] = dict.fromkeys(report["stages"], rates)
        (folder / "report.json").write_text(json.dumps(report))
    page = next(path for path in write_comparison(tmp_path, compared(read_runs(runs))) if path.suffix == ".html")
    browser.shape(1200)
    browser.open(page)
    cut = browser.run(
        "[...document.querySelectorAll('table.dense')].map((t) => t.parentElement.scrollWidth - "
        "t.parentElement.clientWidth)"
    )
    assert cut
    assert max(cut) <= 0
