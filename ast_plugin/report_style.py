"""The style sheet of the HTML report.

Eight colours in one set for light pages and one for dark: each has a contrast of 3 or more to its background, and any
two differ by 14 or more in CIELAB for normal sight, protanopia, deuteranopia and tritanopia alike. The shapes of the
marks tell the sub-nets apart as well.
"""

from __future__ import annotations

LIGHT = {
    "page": "#f5f6f8",
    "surface": "#ffffff",
    "ink": "#17212b",
    "muted": "#586573",
    "grid": "#dde2e8",
    "note": "#fff8e1",
    "note-edge": "#d99a00",
    "heat": "0 114 178",
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#009e73",
    "series-4": "#362673",
    "series-5": "#5c1b0a",
    "series-6": "#a31aff",
    "series-7": "#674c67",
    "series-8": "#9980ff",
}

DARK = {
    "page": "#0f1419",
    "surface": "#182029",
    "ink": "#e9eef3",
    "muted": "#a0adba",
    "grid": "#303b47",
    "note": "#2b2613",
    "note-edge": "#d9a520",
    "heat": "64 156 224",
    "series-1": "#4aa3df",
    "series-2": "#ff8a3d",
    "series-3": "#2fc79b",
    "series-4": "#c6d5ec",
    "series-5": "#cc2900",
    "series-6": "#a31aff",
    "series-7": "#756f57",
    "series-8": "#ffcc00",
}

_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
.over { margin: 0; color: var(--muted); font-size: .85rem; letter-spacing: .02em; }
h1 { margin: 2px 0 4px; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 40px 0 10px; font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 0 0 6px; font-size: 1rem; line-height: 1.35; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 46rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 20px 0 16px; }
.tile { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; padding: 12px 16px; }
.tile strong { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
.one { white-space: nowrap; }
.tile > span { color: var(--muted); font-size: .875rem; line-height: 1.35; display: block; }
.note {
  background: var(--note); border-left: 4px solid var(--note-edge); border-radius: 6px; padding: 10px 16px;
  margin: 0 0 12px; max-width: none;
}
.card { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; padding: 16px 18px; margin: 0; }
.card > :last-child { margin-bottom: 0; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; align-items: start; }
.single { display: grid; grid-template-columns: minmax(0, 620px); }
.stay { position: sticky; top: 16px; }
.tall { max-height: min(86vh, 1100px); overflow-y: auto; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; }
figure svg text { font-family: inherit; font-variant-numeric: inherit; }
figcaption { margin-top: 8px; }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 0 0 12px; padding: 0; font-size: .9rem;
}
.legend .muted { white-space: nowrap; }
.legend li, .name { display: inline-flex; align-items: center; gap: 7px; overflow-wrap: anywhere; }
th .name { max-width: 15rem; white-space: normal; line-height: 1.3; }
.mark { flex: none; width: 14px; height: 14px; overflow: visible; }
.symbols { position: absolute; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, .tall:focus-visible, summary:focus-visible {
  outline: 2px solid rgb(var(--heat)); outline-offset: 2px;
}
table { border-collapse: collapse; width: 100%; font-size: .925rem; }
caption { text-align: left; padding-bottom: 8px; }
th, td {
  padding: 7px 12px; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; vertical-align: top;
}
th { font-weight: 600; }
thead th { color: var(--muted); font-size: .85rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
details tbody th {
  font-weight: 500; overflow-wrap: anywhere; white-space: normal; min-width: 9.5rem; max-width: 26rem;
}
details th, details td { padding-top: 5px; padding-bottom: 5px; }
tbody th:first-child { position: sticky; left: 0; background: var(--surface); }
td small { display: block; color: var(--muted); font-size: .8rem; line-height: 1.25; }
tr.dense > * { color: var(--muted); font-weight: 400; border-top: 2px solid var(--grid); }
td.off { color: var(--ink); font-weight: 650; box-shadow: inset 0 -3px 0 var(--note-edge); }
.heat { width: auto; }
.heat td { min-width: 4.4rem; text-align: center; border: 2px solid var(--surface); border-radius: 6px;
  background: rgb(var(--heat) / var(--share)); }
.heat thead th, .heat tbody th { text-align: center; border: 0; color: var(--ink); font-size: .9rem; }
.heat thead th, .heat tbody th { white-space: normal; overflow-wrap: anywhere; max-width: 9rem; line-height: 1.3; }
.heat tbody th { text-align: left; }
.heat.many { width: 100%; font-size: .8rem; }
.heat.many td, .heat.many th { padding: 6px 3px; min-width: 2.9rem; font-size: inherit; }
.heat tfoot > tr > * {
  color: var(--muted); font-weight: 400; font-size: .85rem; border: 0; text-align: center; padding-top: 10px;
}
.heat tfoot th { text-align: left; white-space: normal; width: 7.5rem; line-height: 1.3; }
details {
  background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; padding: 0 18px; margin: 12px 0;
}
summary { cursor: pointer; padding: 12px 0; font-weight: 600; }
details[open] { padding-bottom: 14px; }
.wrap td, .wrap th { white-space: normal; overflow-wrap: anywhere; text-align: left; }
.wrap > * > tr > :last-child { color: var(--muted); white-space: nowrap; overflow-wrap: normal; }
.changed > :nth-child(-n+2) { font-weight: 650; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .85rem; padding-top: 24px; padding-bottom: 40px; }
footer p { max-width: none; }
@media (max-width: 820px) {
  .pair { grid-template-columns: minmax(0, 1fr); }
  .stay { position: static; }
}
@media (max-width: 520px) {
  main, header, footer { padding-left: 12px; padding-right: 12px; }
  header { padding-top: 22px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile strong { font-size: 1.2rem; }
  .card { padding: 12px; border-radius: 8px; }
  th, td { padding: 6px 8px; }
  .wrap { font-size: .84rem; }
  figure svg text { font-size: 12.5px !important; }
  th .name, .heat thead th, .heat tbody th { max-width: 7rem; }
  .heat td { min-width: 3.6rem; }
  .heat tfoot th { width: 6rem; }
}
@media print {
  .tall { max-height: none; }
  .card, .tile { break-inside: avoid; }
}
"""


def style_sheet() -> str:
    """Return the whole style sheet."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in tints.items()) for tints in (LIGHT, DARK))
    scheme = f":root {{ color-scheme: light dark; {light} }}"
    return f"{scheme}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_RULES}"
