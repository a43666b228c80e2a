"""The report page's style sheet: light and dark, narrow and printed, no font or image from elsewhere."""

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
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
.s1 { background: var(--series-1); } .s2 { background: var(--series-2); }
.s3 { background: var(--series-3); } .s4 { background: var(--series-4); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 0; } figure svg { display: block; width: 100%; max-width: 29rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .6rem 0; }
summary { cursor: pointer; padding: .55rem .9rem; overflow-wrap: anywhere; }
details > div, details > pre { padding: 0 .9rem .8rem; }
details details { background: var(--ground); }
.probe { border-top: 1px solid var(--line); padding: .7rem 0 .3rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .7rem;
  margin: .5rem 0; }
.answers > div { background: var(--panel); border-radius: .4rem; padding: .5rem .7rem; min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; max-width: none; }
.verdict { font-size: .85rem; color: var(--soft); } .verdict.wrong { color: var(--bad); font-weight: 600; }
pre { overflow-x: auto; margin: 0; font: .85rem/1.45 ui-monospace, monospace; }
blockquote { margin: .6rem 0; padding: .1rem 1rem; border-left: 3px solid var(--series-3); }
ul { padding-left: 1.2rem; }
@media (max-width: 40rem) { main { padding: 1.2rem .9rem 3rem; } th, td { padding: .4rem .5rem; font-size: .9rem; }
  td small { display: block; font-size: .72rem; } .scroll th { white-space: normal; } }
@media print { :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f3f3f3;
  --grid: #ddd; --good: #0b6b4c; --bad: #a83a00; --open: #735a00; --series-1: #3f7fc1; --series-2: #d9662b;
  --series-3: #1f9d78; --series-4: #8a6bbd; }
  main { padding: 0; max-width: none; } .scroll { overflow: visible; border: 0; } th, td { padding: .25rem .4rem; }
  h2 { break-after: avoid; } figure, tr, .probe { break-inside: avoid; } pre { white-space: pre-wrap; } }
"""
