"""The pages' style sheet (light and dark, narrow and printed, no font or image from elsewhere) and their script."""

CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2430; --soft: #5a6675; --line: #d6dce4;
  --panel: #f5f7fa; --grid: #e1e6ec; --good: #0b6b4c; --bad: #a83a00; --open: #735a00;
  --series-1: #3f7fc1; --series-2: #d9662b; --series-3: #1f9d78; --series-4: #8a6bbd; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --ink: #e4e9f0; --soft: #9aa7b6; --line: #333d4a;
  --panel: #1a2028; --grid: #2c3541; --good: #5fd3a8; --bad: #ff9a66; --open: #e6c65c;
  --series-1: #6aa5e0; --series-2: #f08a52; --series-3: #3fbf98; --series-4: #ad92dc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p { max-width: 46rem; margin: .6rem 0; }
.soft, caption, .n { color: var(--soft); }
.soft { font-size: .9rem; }
.word { display: inline-block; margin: .5rem 0 .2rem; padding: .1rem .7rem; border: 2px solid currentColor;
  border-radius: 1rem; font-weight: 600; }
.word.good { color: var(--good); } .word.bad { color: var(--bad); } .word.open { color: var(--open); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr + tr > *, tbody tr > * { border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--panel); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
td small { color: var(--soft); }
.scroll:has(> .pairs) { width: fit-content; max-width: 100%; }
table.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.dense small { display: block; } table.dense thead th { white-space: normal; min-width: 3.6rem; }
table.dense th, table.dense td { padding: .4rem .45rem; font-size: .88rem; }
table.wordy td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
table.wordy thead th { text-align: left; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11.5rem), 1fr)); gap: .7rem;
  margin: 1rem 0; }
.numbers > div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.numbers b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers .soft { display: block; line-height: 1.35; }
pre.box { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; margin-top: .7rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.count { display: none; color: var(--soft); }
main:has(> section table.dense) { max-width: 96rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
.s1 { background: var(--series-1); } .s2 { background: var(--series-2); }
.s3 { background: var(--series-3); } .s4 { background: var(--series-4); }
.figures { columns: 26rem; column-gap: 1.5rem; }
figure { margin: 0 0 1.5rem; break-inside: avoid; }
figure svg { display: block; width: 100%; max-width: 29rem; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: .9rem; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .6rem 0; }
summary { cursor: pointer; padding: .55rem .9rem; overflow-wrap: anywhere; }
details > div, details > pre { padding: 0 .9rem .8rem; }
details details { background: var(--ground); }
th button { all: unset; cursor: pointer; } th button::after { content: "\\a0↕"; color: var(--soft); opacity: .55; }
th button:focus-visible { outline: 2px solid var(--series-1); outline-offset: 2px; border-radius: .2rem; }
th[aria-sort="ascending"] button::after { content: "\\a0↑"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\a0↓"; opacity: 1; }
.fold .soft { display: block; }
.probe { border-top: 1px solid var(--line); padding: .7rem 0 .3rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .7rem;
  margin: .5rem 0; }
.answers > div { background: var(--panel); border-radius: .4rem; padding: .5rem .7rem; min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; max-width: none; unicode-bidi: isolate; }
.verdict { font-size: .85rem; color: var(--soft); } .verdict.wrong { color: var(--bad); font-weight: 600; }
pre { overflow-x: auto; margin: 0; font: .85rem/1.45 ui-monospace, monospace; }
blockquote { margin: .6rem 0; padding: .1rem 1rem; border-left: 3px solid var(--series-3); }
ul { padding-left: 1.2rem; }
@media (max-width: 40rem) { main { padding: 1.2rem .9rem 3rem; } th, td { padding: .4rem .5rem; font-size: .9rem; }
  td small { display: block; font-size: .72rem; } .scroll th { white-space: normal; }
  thead th:not(:first-child) { white-space: nowrap; } .count { display: block; font-size: .72rem; }
  table.counts tr > :last-child, table.counts th:not([aria-sort]) button::after { display: none; }
  table.counts :is(th, td) { padding: .35rem .3rem; font-size: .8rem; } table.counts td small { font-size: .66rem; }
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); } .numbers b { font-size: .95rem; }
  .numbers > div { padding: .5rem .55rem; } }
@media print { :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f3f3f3;
  --grid: #ddd; --good: #0b6b4c; --bad: #a83a00; --open: #735a00; --series-1: #3f7fc1; --series-2: #d9662b;
  --series-3: #1f9d78; --series-4: #8a6bbd; }
  main { padding: 0; max-width: none; } .scroll { overflow: visible; border: 0; } th, td { padding: .25rem .4rem; }
  h2 { break-after: avoid; } figure, tr, .probe { break-inside: avoid; } pre { white-space: pre-wrap; }
  th button::after { content: none !important; } details.printed::details-content { content-visibility: visible;
  block-size: auto; } .figures { columns: 2; } }
"""

# Heads become buttons here, not in the page: without a script they would do nothing.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  const key = (row, column) => {
    const cell = row.cells[column], shown = cell.dataset.sort ?? cell.textContent.trim().replace(/^[<+]/, "");
    return shown === "" || isNaN(shown) ? shown : Number(shown);
  };
  const empty = (value) => value === "" || value === "-";
  const before = (a, b) => typeof a === typeof b
    ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => empty(a) - empty(b) || (empty(a) ? 0 : way * before(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
"""
