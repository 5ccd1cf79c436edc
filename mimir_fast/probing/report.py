"""results.json and report.html of a probing: a table, the sweep of learning rates, and pictures of neighbours."""

import json
from dataclasses import asdict
from html import escape

import torch

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, listing, page, paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages, load_from
from mimir_fast.evaluation.options import radius_text
from mimir_fast.evaluation.topics.examples import png
from mimir_fast.probing.neighbours import nearest
from mimir_fast.probing.run import Outcome, Probing, as_dict
from mimir_fast.versions import environment

FORMAT = "mimir_fast.probing"
WORDS = {"knn": "nearest neighbours", "linear": "linear probe", "logistic": "logistic regression",
         "attentive": "attentive probe"}  # fmt: skip
SHOWN, BESIDE = 6, 5


def write(probing: Probing, outcomes: list[Outcome], notes: list[str]) -> None:
    """Both files, into the configuration's folder, and what became of a file of weights."""
    config = probing.config
    if probing.encoder.report is not None:
        probing.encoder.report.save(config.folder)
    found = {
        "format": FORMAT, "choices": json.loads(json.dumps(asdict(config))), "pool": probing.encoder.pool,
        "width": probing.train.values.shape[1], "train_images": len(probing.train), "test_images": len(probing.test),
        "source": probing.test_source.name, "outcomes": [as_dict(o) for o in outcomes], "notes": notes,
        "environment": environment(),
    }  # fmt: skip
    write_text(config.folder / "results.json", json.dumps(found, indent=1) + "\n")
    write_text(config.folder / "report.html", html(probing, outcomes, notes, found))


def html(probing: Probing, outcomes: list[Outcome], notes: list[str], found: dict[str, object]) -> str:
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
    parts += ["<h2>Nearest training images</h2>", neighbours(probing)]
    parts.append(listing("Settings", json.dumps(found["choices"], indent=1)))
    return page(f"{config.checkpoint}: probes", "\n".join(parts), found)


def neighbours(probing: Probing) -> str:
    """Rows of pictures: a test image, and the training images that are most like it."""
    count, beside = min(SHOWN, len(probing.test)), min(BESIDE, len(probing.train))
    queries = torch.arange(count) * len(probing.test) // count
    _, index = nearest(probing.test.values[queries], probing.train.values, beside)

    def pictures(source: object, samples: torch.Tensor) -> EvaluationImages:
        order = samples.argsort()  # images are loaded in ascending order
        loaded = load_from(source, probing.config.data, samples[order].numpy())  # type: ignore[arg-type]
        return loaded.take(order.argsort())

    rows = []
    for query, near in zip(queries, index, strict=True):
        shown = [pictures(probing.test_source, probing.test.samples[query][None])]
        shown.append(pictures(probing.train_source, probing.train.samples[near]))
        cells = "".join(
            f'<figure><img alt="{escape(images.classes[label])}" src="data:image/png;base64,'
            f'{png(image.float() / 255)}"><figcaption>{escape(images.classes[label])}</figcaption></figure>'
            for images in shown for image, label in zip(images.images, images.labels.tolist(), strict=True)
        )  # fmt: skip
        rows.append(f'<div class="trio">{cells}</div>')
    words = "First in each row a test image, then the training images nearest to it by the cosine of their features."
    return paragraph(words, "soft") + f'<div class="neighbours">{"".join(rows)}</div>'
