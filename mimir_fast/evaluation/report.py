"""The report: two verdicts, a section for each topic, how to repeat it. Results in, one HTML page out."""

import json
import traceback
from html import escape
from typing import Any

from mimir_fast.evaluation.html import listing, page, paragraph
from mimir_fast.evaluation.options import NORM_WORDS
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.topic import Numbers, Topic, all_topics

HEADS = {"markdown": "Markdown", "latex": "LaTeX"}
QUESTIONS = {"robustness": "How robust is it?", "validity": "Can the number be trusted?"}


def render(results: Results) -> str:
    """The page; a function of the results alone."""
    name = str(results.choices.get("checkpoint", "model"))
    parts = [
        f"<h1>Robustness of {escape(name)}</h1>",
        paragraph(_subtitle(results), "soft"),
        f'<div class="verdicts">{"".join(_verdict(k, v) for k, v in results.verdicts.items())}</div>',
        *(paragraph(note, "note") for note in results.notes),
    ]
    for topic in all_topics():
        if (numbers := results.sections.get(topic.name)) and (body := _section(topic, numbers)):
            parts.append(f'<section id="{topic.name}"><h2>{escape(topic.title)}</h2>{body}</section>')
    parts.append(_repeat(results))
    return page(f"Robustness of {name}", "\n".join(parts), results.as_dict())


def _section(topic: Topic, numbers: Numbers) -> str:
    """A topic's part of the page; what it raises is said in its place, for the others' parts are worth reading."""
    try:
        return topic.render(numbers)
    except Exception as error:
        traceback.print_exception(error)
        words = f"This section cannot be shown ({type(error).__name__}: {error}); its numbers are in results.json."
        return paragraph(words, "note")


def _subtitle(results: Results) -> str:
    images, choices = results.images, results.choices
    weights = f", {choices['weights_judged']}" if choices.get("weights_judged") else ""
    unharmed = "accuracy" in results.sections and not (results.attacked or results.partial)
    ball = "" if unharmed else f"{NORM_WORDS[choices['norm']]} attacks with ε = {choices.get('eps_text')}, "
    return f"{images.get('count')} test images of {images.get('source')}, {ball}suite {choices.get('suite')}{weights}"


def _verdict(name: str, verdict: dict[str, str]) -> str:
    return (
        f'<div class="verdict {verdict["kind"]}"><h2>{QUESTIONS[name]}</h2>'
        f'<p class="large">{escape(verdict["large"])}</p>{paragraph(verdict["text"])}</div>'
    )


def _repeat(results: Results) -> str:
    """How to get the same again, how to cite it, and what it was made with."""
    images = {key: value for key, value in results.images.items() if key not in ("indices", "digests")}
    shown: dict[str, Any] = {"choices": results.choices, "images": images, "environment": results.environment}
    attacks = results.sections.get("accuracy", {}).get("attacks", {})
    shown["attacks"] = {n: e["parameters"] for n, e in attacks.items()}
    return (
        '<section id="repeat"><h2>Reproduce and cite</h2>'
        + f'<pre tabindex="0" aria-label="The command">{escape(results.command)}</pre>'
        + "".join(listing(f"As a row of a {HEADS[kind]} table", row) for kind, row in results.rows.items())
        + listing("Choices, versions, seeds", json.dumps(shown, indent=1, ensure_ascii=False))
        + paragraph("All numbers, image by image, are in results.json beside this page, and in it (#results).", "soft")
        + "</section>"
    )
