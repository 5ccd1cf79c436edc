"""The robust accuracy is of attacks that ran on every image; what ran on some of them has its own denominator."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_classifier import DIGITS, EPS

from mimir_fast.evaluation import comparison
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import load_images
from mimir_fast.evaluation.journal import Journal
from mimir_fast.evaluation.measure import Measurement, Records, clean, scored
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import Results, conclude
from mimir_fast.evaluation.run import evaluate
from mimir_fast.evaluation.topic import Setup
from mimir_fast.evaluation.topics import accuracy

COUNT = 100
ASKED = EvaluateConfig("a model", "table", DIGITS, eps=EPS, autoattack="no")
SETUP = Setup(ASKED, COUNT, tuple("0123456789"), False, True, lambda spec: torch.nn.Identity())


def records_of(folder: Path, *outcomes: tuple[str, list[int], set[int]]) -> Records:
    """Finished measurements: name, the samples they ran on, the samples they broke."""
    folder.mkdir(exist_ok=True)
    items = {}
    for name, samples, _ in outcomes:
        images = "all" if len(samples) == COUNT else f"few:{len(samples)}"
        items[name] = Measurement(name, scored(clean), {}, images, name.upper(), in_ball=name != "natural")
    first = [items.pop(name) for name in ("natural", "pgd20")]
    records = Records(folder, 1, {"accuracy": first, "another": list(items.values())})
    for item in records.items():
        _, samples, broken = next(entry for entry in outcomes if entry[0] == item.name)
        right, size = torch.tensor([s not in broken for s in samples]), torch.full((len(samples),), EPS)
        row = {"sample": torch.tensor(samples), "correct": right.int(), "loss": size, "linf": size}
        Journal(records.path(item, 0)).append(row)
    return records


def results_of(records: Records) -> Results:
    numbers = accuracy.summarize(SETUP, records.items("accuracy"), records)
    images = {"source": "digits", "count": COUNT, "classes": 10}
    return conclude(Results(choices={"checkpoint": "m", "norm": "linf"}, images=images, sections={"accuracy": numbers}))


EVERY, SOME = list(range(COUNT)), list(range(0, COUNT, 5))


def test_what_ran_on_some_images_lowers_nobody_elses_number(tmp_path: Path) -> None:
    """Of the whole 89 stand; of the twenty that faced more 18, and under these too 13."""
    results = results_of(records_of(
        tmp_path, ("natural", EVERY, {0}), ("pgd20", EVERY, set(range(10))), ("strong", SOME, {0, 20, 25, 30, 35, 40}),
        ("weak", SOME, set()), ("late", EVERY, {9, 11}),
    ))  # fmt: skip
    assert (results.robust["correct"], results.robust["total"]) == (89, COUNT)
    numbers = results.sections["accuracy"]
    assert numbers["tried"] == ["PGD20", "LATE"] and numbers["broken_by"]["20"] == "none"
    assert numbers["broken_by"]["0"] == "clean" and numbers["broken_by"]["11"] == "late"
    (part,) = results.partial
    assert (part["stood"], part["correct"], part["total"]) == (18, 13, 20) and part["tried"] == ["STRONG", "WEAK"]
    assert part["broken_by"] == dict.fromkeys(("20", "25", "30", "35", "40"), "strong")

    text = results.verdicts["robustness"]["text"]
    assert "89 of 100 images" in text and "(PGD20; LATE; L∞, ε = 40/255)" in text
    assert "On 20 of the images more attacks ran (STRONG; WEAK): 13 of these" in text and "18 without them" in text
    head, _, row = results.rows["markdown"].splitlines()
    assert head.endswith("| worst case | worst case (20) |") and row.endswith("| 89.0 | 65.0 |")
    assert "worst case (20)" in results.rows["latex"] and "& 89.0 & 65.0" in results.rows["latex"]
    page = render(results)
    assert "worst case of 20 images, more attacks" in page and "13/20" in page and "89/100" in page

    results.write(tmp_path / "results.json")
    (one,) = comparison.load([str(tmp_path)])
    head, row = comparison.main_table([one])
    cells = dict(zip(head, row, strict=True))
    assert (cells["worst case"], cells["with attacks on fewer images"]) == ("89.0 %", "65.0 % of 20")


def test_many_more_broken_on_some_images_make_the_number_bad(tmp_path: Path) -> None:
    whole = [("natural", EVERY, set[int]()), ("pgd20", EVERY, {1})]
    few = results_of(records_of(tmp_path / "a", *whole, ("strong", SOME, {0, 5})))
    assert few.verdicts["validity"]["kind"] == "unsure"
    many = results_of(records_of(tmp_path / "b", *whole, ("strong", SOME, {0, 5, 10, 15})))
    verdict = many.verdicts["validity"]
    assert verdict["kind"] == "bad" and "4 of 20, of 20 that faced STRONG" in verdict["text"]


@pytest.mark.parametrize(("lost", "kind", "words"), [
    (10, "good", "At least half"), (45, "unsure", "So few images do not show whether half"),
    (60, "unsure", "More than half"), (95, "bad", "no better than chance"),
])  # fmt: skip
def test_what_the_interval_leaves_open_is_not_called_good(tmp_path: Path, lost: int, kind: str, words: str) -> None:
    found = results_of(records_of(tmp_path, ("natural", EVERY, set()), ("pgd20", EVERY, set(range(lost)))))
    assert found.verdicts["robustness"]["kind"] == kind and words in found.verdicts["robustness"]["text"]


def test_where_nothing_is_right_nothing_was_checked(tmp_path: Path) -> None:
    found = results_of(records_of(tmp_path, ("natural", EVERY, set(EVERY)), ("pgd20", EVERY, set(EVERY))))
    found.sections["masking"] = {"checks": [{"name": "a check", "passed": True}]}
    assert conclude(found).verdicts["validity"]["kind"] == "unsure"
    assert found.verdicts["validity"]["large"] == "Nothing to attack"


def test_an_attack_on_every_image_is_in_it_however_it_is_named(tmp_path: Path) -> None:
    results = results_of(records_of(tmp_path, ("natural", EVERY, {0}), ("pgd20", EVERY, {1}), ("check", EVERY, {2})))
    assert results.robust["correct"] == 97 and results.partial == []
    assert results.rows["markdown"].splitlines()[0].endswith("| PGD20 | worst case |")


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.8), ("l1", 1.5)])
def test_never_above_a_direct_attack_by_more_than_its_interval(
    small_model, tmp_path: Path, norm: str, eps: float
) -> None:
    """On the same images: APGD of AutoAttack's package, which the suite did not run."""
    package = pytest.importorskip("pyautoattack.autopgd_base")
    torch.jit.script(small_model).save(str(tmp_path / "small.ts"))
    config = EvaluateConfig(
        str(tmp_path / "small.ts"), "table", DIGITS, norm=norm, eps=eps, limit=COUNT, autoattack="no",
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    results = evaluate(config, log=lambda line: None)
    images = load_images(DIGITS, np.array(results.images["indices"]))
    x, y = images.images.float() / 255, images.labels
    known = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    with torch.random.fork_rng([]):
        attack = package.APGDAttack(
            small_model, norm=known, eps=eps, n_iter=50, n_restarts=1, seed=0, device="cpu", use_largereps=norm == "l1"
        )
        found = attack.perturb(x.clone(), y.clone())
    with torch.no_grad():
        direct = float((small_model(found).argmax(1) == y).float().mean())
    assert 0.1 < direct < 0.9 and results.robust["interval"][0] <= direct


def test_an_older_file_with_another_meaning_is_refused(tmp_path: Path) -> None:
    saved = Results().as_dict() | {"version": 2}
    (tmp_path / "results.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="evaluate the model again"):
        Results.read(tmp_path / "results.json")
