"""Time to a robust model: both sides train the same thing, on images that no one is judged by; and what is read off."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from benchmarks import cli, record, robust, robust_report
from benchmarks.ceilings import Ceilings
from benchmarks.plain_robust import schedule
from benchmarks.record import Record
from benchmarks.robust import TINY, Setting, Variant, time_to
from benchmarks.robust_ours import finetuning, source_of
from mimir_fast.data import DataConfig, build_source
from mimir_fast.models.file_names import to_files
from mimir_fast.versions import environment

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbps=1.0, tflops={"fp32": 1.0})


def test_both_sides_train_the_same() -> None:
    """Without a radius, and with all images in each batch, nothing is left to chance; Adam enlarges rounding."""
    pytest.importorskip("torchattacks")
    recipe = replace(TINY, eps=0.0, batch_size=32, steps=10, weight_decay=0.5)
    setting, variant = Setting("digits", recipe, 32, 16, 1, 1), Variant()
    one, other = (list(islice(side(setting, recipe, 0, variant), 8))[-1] for side in (robust._ours, robust._plain))
    start = next(robust._ours(setting, recipe, 0, variant))
    ours, theirs, before = to_files(one, one.state_dict()), other.state_dict(), to_files(start, start.state_dict())
    for name, value in theirs.items():
        moved = float((value - before[name]).abs().max())
        torch.testing.assert_close(ours[name], value, rtol=0, atol=max(0.05 * moved, 1e-6))


def test_learning_rates_are_equal() -> None:
    recipe = replace(TINY, steps=40)
    config = finetuning(recipe, "digits", 64, 0, bf16=False)
    warmup = config.run.warmup_steps(64)
    assert warmup == recipe.warmup == 4
    for step in range(40):
        rate = config.optim.lr_at(step, batch_size=8, total_steps=40, warmup_steps=warmup)
        assert recipe.lr * schedule(step, recipe) == pytest.approx(rate)


def test_judges_images_are_of_the_training_split_and_not_trained_on() -> None:
    def keys(images: np.ndarray) -> set[bytes]:
        return {image.tobytes() for image in images}

    trained, held = (keys(source_of("digits", TINY, 2000, split)[0]) for split in ("train", "test"))
    config = DataConfig(source="digits", image_size=8, channels=1)
    whole, tested = (keys(build_source(config, split).images) for split in ("train", "test"))  # type: ignore[attr-defined]
    assert not trained & held and trained | held == whole and not held & tested


def test_time_to_the_target_lies_between_the_points_around_it() -> None:
    curve = [{"pgd20": p, "wall_s": 10.0 * (i + 1)} for i, p in enumerate((0.2, 0.4, 0.8, 0.6))]
    assert time_to(curve, 0.5, "wall_s") == pytest.approx(22.5)
    assert time_to(curve, 0.1, "wall_s") == pytest.approx(5.0)
    assert time_to(curve, 0.4, "wall_s") == pytest.approx(20.0)
    assert time_to(curve, 0.9, "wall_s") is None


@pytest.mark.slow
def test_tiny_run_writes_every_training_and_goes_on(monkeypatch, tmp_path, capsys) -> None:
    pytest.importorskip("torchattacks")
    monkeypatch.setattr(record, "environment_once", lambda: environment() | {"commit": "c0ffee"})
    first = list(islice(robust.records(CPU, "tiny", CEILINGS), 2))
    speeds, raced = first
    assert {r.impl for r in speeds} == {f"{side} {v}" for side in ("plain", "mimir_fast") for v in ("fp32", "bf16")}
    (setting,) = robust.SETTINGS["tiny"]
    arms = robust.arms_of(setting, 1, Variant(), Variant())
    assert {r.impl for r in raced} == set(arms)
    for r in raced:
        assert [point["step"] for point in r.curve] == [2, 4]
        assert 0 < r.curve[0]["cpu_s"] < r.curve[1]["cpu_s"] and 0 < r.curve[0]["wall_s"] < r.curve[1]["wall_s"]
        assert r.extra["target"] == pytest.approx(0.95 * max(p["pgd20"] for p in raced[0].curve))
    path = tmp_path / "robust.jsonl"
    for records in first:
        record.append(path, records)
    few = {name: arms[name] for name in ("plain", "mimir_fast fast")}
    monkeypatch.setattr(robust, "arms_of", lambda *given: few)
    ((*again,),) = list(robust.records(CPU, "tiny", CEILINGS, before=record.read(path)))
    assert {r.params["seed"] for r in again} == {1}, "what is there is not run again"
    record.append(path, again)
    assert cli.main(["robust", "--draw", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "| mimir_fast fast |" in capsys.readouterr().out


def raced(name: str, seed: int, seconds: float | None, best: float) -> Record:
    """A training that took so long to the target."""
    params = {"data": "digits", "attack": "PGD-7", "seed": seed}
    found = {} if seconds is None else {"cpu_s to target": seconds, "wall_s to target": seconds / 2}
    ms = {"median": 1.0, "disturbed": 0.0}
    return Record("robust", name, params, 0.0, ms=ms, extra={"target": 0.5, "best pgd20": best} | found)


def test_table_pairs_by_seed_and_counts_what_was_reached() -> None:
    cases = [
        [raced("plain", 0, 60.0, 0.6), raced("mimir_fast pgd", 0, 20.0, 0.62), raced("mimir_fast fast", 0, None, 0.4)],
        [raced("plain", 1, 40.0, 0.7), raced("mimir_fast pgd", 1, 10.0, 0.70), raced("mimir_fast fast", 1, 5.0, 0.7)],
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in robust_report.tables(cases).splitlines()]
    plain, pgd, fast = rows[2:5]
    assert plain[:3] == ["plain", "50.0", ""] and plain[-1] == "2 of 2"
    assert pgd[1] == "15.0" and pgd[2].startswith("3.50 × (0.00 to") and pgd[5].startswith("+1.0 (")
    assert fast[1:3] == ["5.0", "8.00 ×"] and fast[-1] == "1 of 2"
    cases[1][1].ms["disturbed"] = 0.2
    row = robust_report.tables(cases).splitlines()[3].split("|")
    assert row[3].strip().startswith("3.50 ×") and row[4].strip() == "3.00 ×", "of the quiet seed"
