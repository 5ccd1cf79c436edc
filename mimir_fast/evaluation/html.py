"""One self-contained HTML page: style, the frame of the page, tables. Nothing is loaded from anywhere.

One column; wide tables and figures scroll inside their own frame, so the page itself never does, on a desk or on a
phone; light or dark as the reader's system is.
"""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

LONG = 36
"""Characters of a row's name from which on it is broken into lines, such as the path of a run."""
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #525c6b; --line: #d5dbe3; --paper: #fff; --shade: #f4f6f9;
        --good: #17603a; --bad: #a32a22; --unsure: #7a5200; --note: #fdf3dc; --series-1: #1f5fa8; --series-2: #b3372f;
        --series-3: #5b7c1a; --series-4: #7d4fa3; --series-5: #00767c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #a9b4c2; --line: #3a4350; --paper: #14181e; --shade: #1e242c; --good: #6fd19a;
          --bad: #ff9d94; --unsure: #f0c060; --note: #3a3018; --series-1: #6aa9f0; --series-2: #f08a7f;
          --series-3: #a9cc5c; --series-4: #c39be6; --series-5: #4fc3c9; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); overflow-wrap: break-word;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; } p { margin: .5rem 0; } .soft { color: var(--soft); }
a { color: var(--series-1); }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
            margin: 1.2rem 0; }
.verdict { border-left: .35rem solid var(--soft); background: var(--shade); padding: .6rem 1rem .7rem; }
.verdict h2 { margin: 0 0 .2rem; font-size: 1rem; color: var(--soft); font-weight: 600; }
.verdict .large { font-size: 1.45rem; font-weight: 650; line-height: 1.3; margin: .1rem 0 .3rem; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict.unsure { border-color: var(--unsure); }
.good > .large, td.good, .is-good { color: var(--good); } .bad > .large, td.bad, .is-bad { color: var(--bad); }
.unsure > .large, .is-unsure { color: var(--unsure); }
.note { background: var(--note); padding: .6rem .9rem; border-radius: .4rem; }
.frame { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .92rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } tbody th { font-weight: 500; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; } thead .number { white-space: normal; }
th.long { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
main.wide { max-width: 80rem; }
figure { margin: 1rem 0; max-width: 36rem; } figcaption { color: var(--soft); font-size: .92rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.chart { display: block; width: 100%; height: auto; font: 14px system-ui, sans-serif; }
.chart text { fill: var(--ink); } .chart .grid { stroke: var(--line); } .chart .whisker { stroke: var(--ink); }
.chart .mark { stroke: var(--series-2); stroke-dasharray: 2 3; stroke-width: 2; }
details { margin: 1rem 0; } summary { cursor: pointer; padding: .2rem 0; }
pre { overflow-x: auto; font-size: .82rem; background: var(--shade); padding: .8rem; border-radius: .4rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.examples details { margin: 0; background: var(--shade); padding: .5rem; border-radius: .4rem; }
.examples details[open] { grid-column: 1 / -1; }
.examples img { width: 100%; max-width: 14rem; image-rendering: pixelated; display: block; }
.examples summary { font-size: .88rem; list-style: none; }
.examples summary::-webkit-details-marker { display: none; }
.trio { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .5rem; } .trio figure { margin: 0; max-width: 14rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0; } .tiles figure { margin: 0; width: 7rem; }
.tiles img { width: 100%; image-rendering: pixelated; display: block; } .tiles figcaption { font-size: .8rem; }
@media (max-width: 30rem) { table { font-size: .82rem; } th, td { padding: .35rem .4rem .35rem 0; } }
"""


def page(title: str, body: str, data: dict[str, Any] | None = None, wide: bool = False) -> str:
    """The whole document; `data` is embedded as JSON in `#results`; `wide` is for tables with a column a measure."""
    embedded = ""
    if data is not None:
        # `</script>` inside a string would end the element.
        text = json.dumps(data).replace("<", "\\u003c")
        embedded = f'<script type="application/json" id="results">{text}</script>'
    room = ' class="wide"' if wide else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main{room}>\n{body}\n</main>{embedded}"
        "</body></html>\n"
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), caption: str = "",
    marks: Sequence[str] = (),
) -> str:  # fmt: skip
    """An HTML table in its scrolling frame; the first cell of a row names it; cells are text, not HTML.

    Args:
        numbers: columns set flush right.
        marks: a CSS class for each row, or "".
    """

    def kind(column: int) -> str:
        return ' class="number"' if column in numbers else ""

    def name_of(cell: str, scope: str, column: int) -> str:
        look = ' class="long"' if len(cell) > LONG else kind(column)
        return f'<th scope="{scope}"{look}>{escape(cell)}</th>'

    heads = "".join(
        f'<th scope="col"{kind(i)}>{escape(cell)}</th>' if i else name_of(cell, "col", 0) for i, cell in enumerate(head)
    )
    lines = []
    for number, row in enumerate(rows):
        mark = f' class="{marks[number]}"' if number < len(marks) and marks[number] else ""
        first, *rest = row
        cells = "".join(f"<td{kind(i + 1)}>{escape(cell)}</td>" for i, cell in enumerate(rest))
        lines.append(f"<tr{mark}>{name_of(first, 'row', 0)}{cells}</tr>")
    heading = f"<caption>{escape(caption)}</caption>" if caption else ""
    # A frame that scrolls must be reachable from the keyboard.
    label = escape(caption or " · ".join(filter(None, head)))
    return (
        f'<div class="frame" tabindex="0" role="region" aria-label="{label}"><table>{heading}'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(chart: str, caption: str) -> str:
    """A figure with its caption."""
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(*parts: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(parts)}</div>'


def tiles(cells: Sequence[tuple[str, str]]) -> str:
    """A row of small pictures.

    Args:
        cells: (caption, PNG file in base64).
    """
    shown = "".join(
        f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
        for words, picture in cells
    )
    return f'<div class="tiles">{shown}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def listing(summary: str, text: str) -> str:
    """Text set as typed, folded away."""
    return (
        f'<details><summary>{escape(summary)}</summary><pre tabindex="0" aria-label="{escape(summary)}">'
        f"{escape(text)}</pre></details>"
    )


def percent(value: float) -> str:
    """A share as text: 0.4567 as "45.7 %"."""
    return f"{100 * value:.1f} %"


def span(interval: Sequence[float]) -> str:
    """An interval of shares in per cent."""
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
