"""Several probings side by side: one column a model, paired differences, curves of the pictures that have some.

As with evaluations, nothing is measured here: all comes from results.json, and models that were probed on the same
images are compared image by image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mimir_fast.evaluation.comparison import Difference, difference_table, html_differences, markdown_table, told_apart
from mimir_fast.evaluation.html import page, paragraph, percent, span, table
from mimir_fast.evaluation.options import radius_text
from mimir_fast.evaluation.results import read_object
from mimir_fast.probing.picture import all_pictures
from mimir_fast.probing.report import FORMAT
from mimir_fast.probing.run import WORDS

MEASURES = {"clean": "no attack", "attacked": "under attack"}


@dataclass
class ProbedModel:
    """One probing, under the name it bears in the tables; `found` is its results.json."""

    name: str
    path: Path
    found: dict[str, Any]

    @property
    def outcomes(self) -> dict[tuple[str, float], dict[str, Any]]:
        """By probe and share of the labels."""
        return {(outcome["probe"], outcome["fraction"]): outcome for outcome in self.found["outcomes"]}

    @property
    def images(self) -> str:
        """Which images, in words."""
        return f"{self.found['test_images']} of {self.found['split_images']} test images of {self.found['source']}"

    @property
    def attack(self) -> str:
        """In words."""
        choices = self.found["choices"]
        return f"PGD-{choices['attack_steps']}, ε = {radius_text(choices['eps'], 'linf')}"

    def right(self, outcome: dict[str, Any], measure: str) -> dict[int, bool]:
        """Position in the split → right, of the clean or of the attacked test images; empty where it is not known."""
        total, split = self.found["test_images"], self.found["split_images"]
        bits = (outcome[measure] or {}).get("right", "")
        places = (place * total // len(bits) for place in range(len(bits)))
        return {place * split // total: bit == "1" for place, bit in zip(places, bits, strict=True)}


def is_probing(path: Path) -> bool:
    """Whether a results.json is of a probing."""
    return read_object(path).get("format") == FORMAT


def load(paths: Sequence[Path]) -> list[ProbedModel]:
    """Of several results.json, named by what tells them apart.

    Raises:
        ValueError: one is of an older version.
    """
    read = [read_object(path) for path in paths]
    if older := [str(path) for path, found in zip(paths, read, strict=True) if "images" not in found]:
        raise ValueError(f"{older[0]} was written by an older version: probe the model again")
    names = told_apart([found["choices"] for found in read], paths)
    return [ProbedModel(*one) for one in zip(names, paths, read, strict=True)]


def markdown(models: Sequence[ProbedModel]) -> str:
    """The tables for a README or an issue."""
    parts = [markdown_table(main_table(models))]
    if paired := difference_table(models[0].name, differences(models)):
        parts.append(markdown_table(paired))
    return "\n".join(parts + [f"- {warning}\n" for warning in warnings(models)])


def main_table(models: Sequence[ProbedModel]) -> list[list[str]]:
    """Head, and one line for each probe, share of the labels, and clean or attacked."""
    lines = [["probe", "labels", "measure", *(model.name for model in models)]]
    for key in dict.fromkeys(key for model in models for key in model.outcomes):
        for measure, words in MEASURES.items():
            counts = [(model.outcomes.get(key) or {}).get(measure) for model in models]
            cells = [f"{percent(c['accuracy'])} ({span(c['interval'])})" if c else "—" for c in counts]
            if any(counts):
                lines.append([WORDS.get(key[0], key[0]), f"{100 * key[1]:g} %", words, *cells])
    return lines


def differences(models: Sequence[ProbedModel]) -> list[Difference]:
    """Every other model against the first, probe by probe, on the images that both saw under the same attack."""
    first, found = models[0], []
    for other in models[1:]:
        if _data_of(first) != _data_of(other):
            continue
        for key, outcome in first.outcomes.items():
            for measure, words in MEASURES.items():
                if key not in other.outcomes or (measure == "attacked" and first.attack != other.attack):
                    continue
                rights = first.right(outcome, measure), other.right(other.outcomes[key], measure)
                what = f"{WORDS.get(key[0], key[0])}, {100 * key[1]:g} % of the labels, {words}"
                if difference := Difference.of(what, other.name, *rights):
                    found.append(difference)
    return found


def warnings(models: Sequence[ProbedModel]) -> list[str]:
    """What makes the numbers incomparable."""
    first, found = models[0], []
    for other in models[1:]:
        if first.images != other.images:
            found.append(f"{other.name} was probed on {other.images}, {first.name} on {first.images}.")
        elif _data_of(first) != _data_of(other):
            found.append(f"{other.name} and {first.name} were probed on different images of {first.found['source']}.")
        if differ := [words for words, a, b in _settings(first, other) if a != b]:
            found.append(f"{other.name} was probed with another {', '.join(differ)} than {first.name}.")
        if first.attack != other.attack:
            found.append(
                f"{other.name} was attacked by {other.attack}, {first.name} by {first.attack}: not comparable."
            )
        if (mine := first.found["train_images"]) != (theirs := other.found["train_images"]):
            found.append(f"{other.name} had {theirs} training images, {first.name} {mine}.")
    return found


def _data_of(model: ProbedModel) -> tuple[str, ...]:
    return model.found["source"], str(model.found["split_images"]), model.found["images"]


def _settings(*models: ProbedModel) -> Iterator[tuple[str, Any, Any]]:
    """(Flag, value of one, of the other) of what changes a probe but not the encoder."""
    one, other = (model.found for model in models)
    for name in ("neighbours", "epochs", "attentive_epochs", "seed"):
        yield f"--{name}", one["choices"][name], other["choices"][name]
    yield "--pool", one["pool"], other["pool"]
    yield "--data.image_size", one["choices"]["data"]["image_size"], other["choices"]["data"]["image_size"]


def html(models: Sequence[ProbedModel]) -> str:
    """One page."""
    few = ", ".join(model.name for model in models)
    title = f"Probes: {few}" if len(few) <= 80 else f"Probes of {len(models)} models"
    head, *body = main_table(models)
    caption = f"{models[0].images}; attack of {models[0].name}: {models[0].attack}. Wilson's 95 % intervals in brackets"
    parts = [
        f"<h1>{escape(title)}</h1>", *(paragraph(warning, "note") for warning in warnings(models)), "<h2>Accuracy</h2>",
        table(head, body, numbers=range(3, len(head)), caption=caption),
        *html_differences(models[0].name, differences(models)),
    ]  # fmt: skip
    for picture in all_pictures():
        every = [(model.name, model.found.get("pictures", {}).get(picture.name)) for model in models]
        known = [(name, numbers) for name, numbers in every if numbers]
        if known and (shown := picture.compare(known)):
            parts.append(f"<h2>{escape(picture.title)}</h2>{shown}")
    return page(title, "\n".join(parts), {"compared": {model.name: str(model.path) for model in models}}, wide=True)
