"""The page of a report: HTML and style."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --text: #1d2126; --soft: #69717b; --line: #dfe3e8; --page: #fff; --panel: #f6f7f9;
  --good: #1a7f4b; --bad: #b3372b; --trained: #d9822b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #98a1ab; --line: #343a42; --page: #16191d;
  --panel: #1f2329; --good: #58c48b; --bad: #ef8377; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
h3 { font-size: 1.05rem; margin: 0 0 .6rem; font-weight: 600; }
h4 { font-size: .85rem; margin: 0 0 .25rem; color: var(--soft); font-weight: 500; }
p { margin: 0 0 .7rem; max-width: 46rem; }
section { margin-top: 2.6rem; }
small { color: var(--soft); font-weight: 400; font-size: .82em; }
.mark { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .45em;
  background: var(--soft); }
.mark.good { background: var(--good); } .mark.bad { background: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.8rem; margin: 1rem 0 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
p.evidence { font-size: 1.05rem; }
.wide { overflow-x: auto; margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .32rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
thead th:nth-child(7) { text-align: left; }
tbody th { padding-top: 1.1rem; font-size: .85rem; font-weight: 600; }
tbody.trained td { background: color-mix(in srgb, var(--trained) 9%, transparent); }
td.words { font-size: .87rem; color: var(--soft); white-space: normal; min-width: 7rem; }
td.good { color: var(--good); } .bad, td.bad { color: var(--bad); }
figure svg { width: 100%; min-width: 36rem; height: auto; font-family: inherit; }
article { background: var(--panel); border-radius: 10px; padding: 1rem 1.1rem; margin-top: 1rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.1rem; }
img { display: block; width: 100%; height: 8.5rem; border-radius: 5px; }
audio { display: block; width: 100%; height: 2.2rem; margin-top: .5rem; }
.scores { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .45rem 0 0; font-size: .88rem; color: var(--soft); }
.scores b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
.reference { display: flex; align-items: center; gap: 1rem; margin-top: .6rem; font-size: .88rem; color: var(--soft); }
.reference span { flex: none; } .reference audio { margin: 0; max-width: 22rem; }
pre { overflow-x: auto; background: var(--panel); padding: .9rem 1.1rem; border-radius: 10px; font-size: .85rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
</style></head><body>
{body}
</body></html>
"""
