"""One self-contained HTML report: verdict first, then tables, pictures, and everything needed to repeat it.

Pictures are embedded, nothing is loaded from anywhere. One column; wide tables scroll inside their own frame, so the
page itself never does, on a desk or on a phone.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mimir_fast.evaluation.journal import write_atomically
from mimir_fast.evaluation.results import Results

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --good: #1d6b3a; --bad: #a32a22; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); }
.verdict { border-left: .35rem solid var(--soft); padding: .3rem 0 .3rem 1rem; margin: 1.2rem 0; font-size: 1.1rem; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.note { background: #fdf3dc; padding: .6rem .9rem; border-radius: .4rem; }
.frame { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td:first-child { white-space: nowrap; } td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; } th.good { color: var(--good); } th.bad { color: var(--bad); }
figure { margin: 1rem 0; max-width: 36rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .92rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
details { margin: 1rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .82rem; background: #f5f7f9; padding: .8rem; border-radius: .4rem; }
@media (max-width: 30rem) { table { font-size: .82rem; } th, td { padding: .35rem .4rem .35rem 0; } }
"""


@dataclass
class Picture:
    """A figure of the report: section it belongs to, PNG bytes, what it shows."""

    section: str
    png: bytes
    caption: str


def write_report(path: Path, results: Results, pictures: Sequence[Picture]) -> None:
    """Write the page, in one step."""
    write_atomically(path, render(results, pictures))


def render(results: Results, pictures: Sequence[Picture]) -> str:
    """The page as HTML."""
    name = str(results.choices.get("checkpoint", "model"))
    parts = [
        f"<h1>Is it robust? {escape(name)}</h1>",
        f'<p class="soft">{escape(_subtitle(results))}</p>',
        _verdict(results),
        *(f'<p class="note">{escape(note)}</p>' for note in results.notes),
        _section("Accuracy", _accuracy_table(results), pictures),
        _section("AutoAttack", _autoattack_table(results), pictures),
        _section("Are the gradients honest?", _checks_table(results), pictures),
        _section("How accuracy falls with ε", _curve_table(results), pictures),
        _section("Common corruptions", _corruption_table(results), pictures),
        _section("Reconstruction", _reconstruction_table(results), pictures),
        _section("Mutual information", _mi_text(results), pictures),
        _section("Loss surface", "", pictures),
        _section("Examples", "", pictures),
        _repeat(results),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Robustness of {escape(name)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _subtitle(results: Results) -> str:
    images, choices = results.images, results.choices
    return (
        f"{images.get('count')} test images of {images.get('source')}, L∞ attacks with ε = {choices.get('eps_text')}, "
        f"suite {choices.get('suite')}"
    )


def _verdict(results: Results) -> str:
    failed = any(not check["passed"] for check in results.checks)
    kind = "bad" if failed else "good" if results.checks else ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in results.verdict)
    return f'<div class="verdict {kind}">{lines}</div>'


def _section(title: str, content: str, pictures: Sequence[Picture]) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(p.caption)}" src="data:image/png;base64,{base64.b64encode(p.png).decode()}">'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in pictures
        if p.section == title
    )
    if not content and not figures:
        return ""
    return f'<h2>{escape(title)}</h2>{content}<div class="figures">{figures}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """An HTML table in its scrolling frame; `numbers` are the columns set flush right; cells are text, not HTML."""

    def cells(row: Sequence[str], tag: str) -> str:
        marks = (' class="number"' if i in numbers else "" for i in range(len(row)))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(row, marks, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="frame"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def percent(value: float) -> str:
    """0.4567 as "45.7 %"."""
    return f"{100 * value:.1f} %"


def _accuracy_table(results: Results) -> str:
    rows = [
        [e["label"], percent(e["accuracy"]), f"± {100 * e['standard_error']:.1f}", f"{e['correct']}/{e['total']}",
         f"{e['mean_loss']:.3f}", f"{e['seconds']:.0f} s"]
        for e in results.accuracy.values()
    ]  # fmt: skip
    if not rows:
        return ""
    return table(["attack", "accuracy", "s.e.", "right", "mean loss", "time"], rows, numbers=range(1, 6))


def _autoattack_table(results: Results) -> str:
    entry = results.autoattack
    if entry is None:
        return '<p class="soft">Not run in this suite; --suite paper or --autoattack yes runs it.</p>'
    rows = [
        [
            name,
            percent(standing / entry["total"]),
            f"{standing}/{entry['total']}",
            f"{entry['seconds'].get(name, 0):.0f} s",
        ]
        for name, standing in entry["after"].items()
    ]
    warnings = "".join(f'<p class="note">{escape(text)}</p>' for text in entry["warnings"])
    words = (
        f"<p>Version {escape(entry['version'])}, fp32, by the authors' package; each attack runs on what the ones "
        "before left standing.</p>"
    )
    return words + table(["after", "accuracy", "standing", "time"], rows, numbers=range(1, 4)) + warnings


def _checks_table(results: Results) -> str:
    if not results.checks:
        return ""
    rows = "".join(
        f'<tr><th class="{"good" if c["passed"] else "bad"}">{"passed" if c["passed"] else "FAILED"}</th>'
        f"<td><b>{escape(c['name'])}</b><br>{escape(c['sentence'])}</td></tr>"
        for c in results.checks
    )
    return f'<div class="frame"><table><tbody>{rows}</tbody></table></div>'


def _curve_table(results: Results) -> str:
    if not results.curve:
        return ""
    columns = zip(results.curve["eps"], results.curve["accuracy"], results.curve["noise"], strict=True)
    rows = [[f"{255 * eps:.4g}/255", percent(under), percent(noise)] for eps, under, noise in columns]
    return table(["ε", "under PGD", "under random noise"], rows, numbers=(1, 2))


def _corruption_table(results: Results) -> str:
    found = results.corruptions
    if found is None:
        return ""
    severities = sorted({s for levels in found["accuracy"].values() for s in levels}, key=int)
    rows = [
        [
            name,
            *(percent(levels[s]) if s in levels else "" for s in severities),
            percent(sum(levels.values()) / len(levels)),
        ]
        for name, levels in found["accuracy"].items()
    ]
    mce = "" if found.get("mce") is None else f" Mean corruption error relative to AlexNet: {found['mce']:.1f} %."
    words = f"<p>{escape(found['words'])} Mean accuracy {percent(found['mean'])}.{mce}</p>"
    return words + table(["corruption", *map(str, severities), "mean"], rows, numbers=range(1, len(severities) + 2))


def _reconstruction_table(results: Results) -> str:
    found = results.extras.get("reconstruction")
    if not found:
        return ""
    rows = [
        [name, f"{found[name]:.4f}", f"{found[name] / found['clean']:.2f} ×"]
        for name in ("clean", "random", "attacked")
    ]
    words = "<p>Error of the masked autoencoder on masked patches, when the visible ones are perturbed.</p>"
    return words + table(["visible patches", "mean squared error", "relative"], rows, numbers=(1, 2))


def _mi_text(results: Results) -> str:
    found = results.extras.get("mi")
    if not found:
        return ""
    return (
        "<p>Fano's inequality says how many bits the features must carry about the attacked image for so few errors; "
        f"the paper's upper bound is an approximation, here with {escape(found['upper_from'])}.</p>"
    )


def _repeat(results: Results) -> str:
    """Everything recorded but the long lists."""
    images = {key: value for key, value in results.images.items() if key != "indices"}
    shown: dict[str, Any] = {"choices": results.choices, "images": images, "environment": results.environment}
    parameters = {name: entry["parameters"] for name, entry in results.accuracy.items()}
    shown["attacks"] = parameters
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    return f"<details><summary>Choices, versions, seeds</summary><pre>{escape(text)}</pre></details>"
