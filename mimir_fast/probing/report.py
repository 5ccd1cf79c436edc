"""results.json and report.html of a probing: a table, the sweep of learning rates, and pictures."""

import json
from dataclasses import asdict
from html import escape
from typing import Any

import torch

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.content import pixels_of
from mimir_fast.evaluation.finite import finite
from mimir_fast.evaluation.html import figure, listing, page, paragraph, percent, span, table, tiles
from mimir_fast.evaluation.images import EvaluationImages, load_from
from mimir_fast.evaluation.measure import strict_fp32
from mimir_fast.evaluation.options import radius_text
from mimir_fast.evaluation.topics.examples import png
from mimir_fast.probing.encoder import FrozenEncoder
from mimir_fast.probing.neighbours import nearest
from mimir_fast.probing.picture import all_pictures
from mimir_fast.probing.run import WORDS, Outcome, Probing
from mimir_fast.versions import environment

FORMAT = "mimir_fast.probing"
SHOWN, BESIDE = 6, 5


def write(probing: Probing, outcomes: list[Outcome], notes: list[str], against: FrozenEncoder | None = None) -> None:
    """Both files, into the configuration's folder, and what became of a file of weights."""
    config = probing.config
    if probing.encoder.report is not None:
        probing.encoder.report.save(config.folder)
    found: dict[str, Any] = {
        "format": FORMAT, "choices": json.loads(json.dumps(asdict(config))), "pool": probing.encoder.pool,
        "width": probing.train.values.shape[1], "train_images": len(probing.train), "test_images": len(probing.test),
        "split_images": len(probing.test_source), "source": probing.test_source.name,
        "images": pixels_of(probing.test_source), "outcomes": [outcome.as_dict() for outcome in outcomes],
        "notes": notes, "environment": environment(),
    }  # fmt: skip
    found["pictures"], shown = pictures(probing, against) if config.pictures else ({}, [])
    found = finite(found)
    write_text(config.folder / "results.json", json.dumps(found, indent=1) + "\n")
    write_text(config.folder / "report.html", html(probing, outcomes, notes, found, shown))


def pictures(probing: Probing, against: FrozenEncoder | None) -> tuple[dict[str, Any], list[str]]:
    """Numbers of each picture by name, and their parts of the page."""
    view, numbers, shown = probing.view(against), {}, []
    with strict_fp32(view.device):
        for picture in all_pictures():
            if (found := picture.look(view)) is not None:
                numbers[picture.name] = found[0]
                shown.append(f"<h2>{escape(picture.title)}</h2>{found[1]}")
    return numbers, shown


def html(probing: Probing, outcomes: list[Outcome], notes: list[str], found: dict[str, Any], shown: list[str]) -> str:
    """The page."""
    config = probing.config
    words = (
        f"Nothing of the encoder was trained: {len(probing.test):,} test images of {probing.test_source.name}, one "
        f"vector of {probing.train.values.shape[1]} numbers an image ({probing.encoder.pool})."
    )
    attack = f"PGD-{config.attack_steps}, ε = {radius_text(config.eps, 'linf')}"
    head = ["probe", "labels", "accuracy", "95 % interval", f"under attack ({attack})", "95 % interval"]
    rows = []
    for outcome in outcomes:
        under = outcome.attacked
        rows.append([
            WORDS[outcome.probe], f"{outcome.train_images:,}", percent(outcome.clean.accuracy),
            span(outcome.clean.interval),
            *((percent(under.accuracy), span(under.interval)) if under else ("—", "—")),
        ])  # fmt: skip
    parts = [f"<h1>What {escape(config.checkpoint)} knows</h1>", paragraph(words, "soft")]
    parts += [paragraph(note, "note") for note in notes]
    parts.append(table(head, rows, numbers=(1, 2, 3, 4, 5)))
    sweeps = [o for o in outcomes if o.sweep]
    if sweeps:
        lines = [
            Line(f"{o.train_images:,} labels", [(torch.tensor(rate).log10().item(), 100 * a) for rate, a in o.sweep])
            for o in sweeps
        ]
        chart = line_chart(
            lines, "accuracy of the linear probe over learning rates", x_label="learning rate, power of ten",
            y_label="accuracy on held-out training images, %",
        )  # fmt: skip
        words = "All rates are trained together; the best one on held-out training images is in the table."
        parts += ["<h2>Learning rates of the linear probe</h2>", figure(chart, words)]
    parts += ["<h2>Nearest training images</h2>", neighbours(probing), *shown]
    parts.append(listing("Settings", json.dumps(found["choices"], indent=1)))
    return page(f"{config.checkpoint}: probes", "\n".join(parts), found)


def neighbours(probing: Probing) -> str:
    """Rows of pictures: a test image, and the training images that are most like it."""
    count, beside = min(SHOWN, len(probing.test)), min(BESIDE, len(probing.train))
    queries = torch.arange(count) * len(probing.test) // count
    _, index = nearest(probing.test.values[queries], probing.train.values, beside)

    def load(source: object, samples: torch.Tensor) -> EvaluationImages:
        order = samples.argsort()  # images are loaded in ascending order
        loaded = load_from(source, probing.config.data, samples[order].numpy())  # type: ignore[arg-type]
        return loaded.take(order.argsort())

    rows = []
    for query, near in zip(queries, index, strict=True):
        shown = [load(probing.test_source, probing.test.samples[query][None])]
        shown.append(load(probing.train_source, probing.train.samples[near]))
        rows.append(tiles([
            (images.classes[label], png(image.float() / 255))
            for images in shown for image, label in zip(images.images, images.labels.tolist(), strict=True)
        ]))  # fmt: skip
    words = "First in each row a test image, then the training images nearest to it by the cosine of their features."
    return paragraph(words, "soft") + "".join(rows)
