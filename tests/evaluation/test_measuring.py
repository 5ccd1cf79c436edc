"""Images, journals and accuracy: exact counts, the same on resume, in any batch, on a loader or in memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_classifier import DIGITS, EPS

from mimir_fast.attacks.pgd import is_correct
from mimir_fast.data import build_loader, build_source
from mimir_fast.data.sources.base import ArraySource, evenly
from mimir_fast.evaluation.attacks import NamedAttack, make_pgd, make_random_noise, step_size
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages, Fitting, ImageSets, choose_indices, load_images
from mimir_fast.evaluation.journal import Journal
from mimir_fast.evaluation.measure import Count, ShardRun, clean, measure, score, scored
from mimir_fast.evaluation.run import one_sided
from mimir_fast.evaluation.topics.accuracy import make_targeted
from mimir_fast.evaluation.topics.masking import make_apgd, make_square

ASKED = EvaluateConfig("a model", data=DIGITS, eps=EPS)
CPU = torch.device("cpu")


def test_subset_is_spread_over_the_split_and_decoded_as_the_loader_does() -> None:
    source = build_source(DIGITS, "test")
    indices = choose_indices(source, 7, None)
    assert indices.tolist() == [i * 300 // 7 for i in range(7)]
    images = load_images(DIGITS, indices)
    batch = next(iter(build_loader(DIGITS, split="test", batch_size=300)))
    assert torch.equal(images.images, batch.images[torch.from_numpy(indices)])
    assert torch.equal(images.labels, batch.labels[torch.from_numpy(indices)])
    assert images.samples.tolist() == indices.tolist()


def test_a_limit_keeps_the_shares_of_the_classes_whatever_their_order() -> None:
    """By equal distances wherever these do, as ever: else the numbers on disk would be of other images."""
    draws, turns, pixels = np.random.default_rng(0), np.arange(2000) % 10, np.zeros((2000, 1, 2, 2), np.uint8)
    in_order, shuffled = np.sort(turns), draws.permutation(turns)
    for labels in (in_order, shuffled, turns, np.where(turns < 9, 0, 1), np.arange(2000) % 1000):
        source = ArraySource("any", pixels, labels, tuple(map(str, range(1000))))
        for limit in (1, 7, 100, 1999, 2000, 3000):
            chosen, count = choose_indices(source, limit, None), min(limit, 2000)
            assert chosen.dtype == np.int64 and len(np.unique(chosen)) == count and (np.diff(chosen) > 0).all()
            if labels is in_order or labels is shuffled:
                assert (chosen == np.arange(count) * 2000 // count).all()
            if labels is not shuffled:
                assert np.abs(np.bincount(labels[chosen], minlength=1000)
                              - np.bincount(labels, minlength=1000) * count / 2000).max() <= 1  # fmt: skip
            assert not one_sided(labels, chosen)
    # Every tenth of classes that take turns is one class.
    assert len(np.unique(turns[np.arange(100) * 20])) == 1
    (note,) = one_sided(turns, np.arange(100) * 20)
    assert "of 1 of the 10 classes" in note
    # Small parts, too, and unequal classes.
    halves = np.where(np.arange(1000) % 2, np.arange(1000) // 2 % 9 + 1, 0)
    for labels, limit in ((np.arange(600) % 10, 50), (np.arange(30) % 3, 20), (np.arange(36) % 4, 18), (halves, 50)):
        counts = np.bincount(labels)
        found = np.bincount(labels[evenly(labels, limit)], minlength=len(counts))
        assert np.abs(found - counts * limit / len(labels)).max() <= 1, (limit, found)
    images = EvaluationImages(torch.zeros(2000, 1, 2, 2), torch.from_numpy(turns), torch.arange(2000), (), "any", {})
    assert images.evenly(100).labels.bincount().tolist() == [10] * 10


def test_index_file_names_positions_or_files(tmp_path: Path) -> None:
    from PIL import Image

    from mimir_fast.data import DataConfig

    for number in range(6):
        folder = tmp_path / "val" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"image{number}.png")
    config = DataConfig(source="folder", root=str(tmp_path), image_size=8)
    source = build_source(config, "test")
    listing = tmp_path / "list.txt"
    listing.write_text("class1/image3.png 1\nclass0/image4.png 0\n")  # RobustBench's form: name, then label
    chosen = choose_indices(source, None, str(listing))
    assert [Path(source.where(int(i))).name for i in chosen] == ["image4.png", "image3.png"]
    assert load_images(config, chosen).images[:, 0, 0, 0].tolist() == [160, 120]
    listing.write_text("0\n5\n")
    assert choose_indices(source, None, str(listing)).tolist() == [0, 5]


@pytest.mark.parametrize(("text", "words"), [("", "empty"), ("900\n", "asks for image 900"), ("nobody.png\n", "lacks")])
def test_bad_index_files_are_explained(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError, match=words):
        choose_indices(build_source(DIGITS, "test"), None, str(tmp_path / "list"))


def test_empty_subsets_are_refused() -> None:
    with pytest.raises(ValueError, match="no image to evaluate"):
        choose_indices(build_source(DIGITS, "test"), 0, None)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        load_images(DIGITS, np.array([], dtype=np.int64))


def test_unreadable_files_are_left_out_and_named(tmp_path: Path) -> None:
    from PIL import Image

    from mimir_fast.data import DataConfig

    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "good.png")
    (tmp_path / "val" / "a" / "bad.png").write_bytes(b"no image")
    images = load_images(DataConfig(source="folder", root=str(tmp_path), image_size=8))
    assert len(images) == 2 and images.labels.tolist() == [0, 1]
    assert [Path(path).name for path in images.skipped] == ["bad.png"]


def test_counts_are_those_of_the_model(small_model, digits_images: EvaluationImages) -> None:
    record = measure(scored(clean), small_model, digits_images, ShardRun(77, CPU))
    with torch.no_grad():
        right = (small_model(digits_images.images.float() / 255).argmax(1) == digits_images.labels).sum()
    assert record.tensor("correct").sum() == right and record.num_images == 300
    assert str(Count(1, 3)) == "33.33 % (1/3)"


def test_killed_measurement_goes_on_where_it_was(small_model, digits_images: EvaluationImages, tmp_path: Path) -> None:
    attack, file = make_pgd(ASKED, 5), tmp_path / "pgd.jsonl"
    images = digits_images.evenly(50)
    whole = measure(scored(attack.run), small_model, images, ShardRun(16, CPU))
    calls = []

    def dies(model, x, y, samples):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack.run(model, x, y, samples)

    with pytest.raises(KeyboardInterrupt):
        measure(scored(dies), small_model, images, ShardRun(16, CPU, file, "s"))
    file.write_text(file.read_text() + '{"start": 32, "stop": 48, "val')  # the kill came while a line was written
    rest = []

    def counts(model, x, y, samples):
        rest.append(len(x))
        return attack.run(model, x, y, samples)

    resumed = measure(scored(counts), small_model, images, ShardRun(16, CPU, file, "s"))
    assert rest == [16, 2]
    assert resumed.values == whole.values
    assert [json.loads(line)["stop"] for line in file.read_text().splitlines()[1:]] == [16, 32, 48, 50]


def test_journal_refuses_another_measurement(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"eps": 1}).append({"correct": torch.ones(2)})
    with pytest.raises(ValueError, match="other settings"):
        Journal(tmp_path / "j", {"eps": 2})


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.8), ("l1", 4.0)])
def test_attacks_of_other_norms_stay_in_their_ball(small_model, digits_images, norm: str, eps: float) -> None:
    images = digits_images.evenly(20)
    asked = EvaluateConfig("a model", data=DIGITS, norm=norm, eps=eps)  # type: ignore[arg-type]
    for attack in (make_random_noise(asked), make_square(asked, 20), make_pgd(asked, 5), make_apgd(asked, 10)):
        record = measure(scored(attack.run), small_model, images, ShardRun(20, CPU))
        assert 0.5 * eps < record.tensor(norm).max() <= eps * (1 + 1e-6), attack.name


def test_restarts_and_targets_only_break_more(small_model, digits_images: EvaluationImages) -> None:
    images = digits_images.evenly(60)

    def correct(attack: NamedAttack) -> torch.Tensor:
        return measure(scored(attack.run), small_model, images, ShardRun(60, CPU)).tensor("correct")

    once, thrice = (correct(make_pgd(replace(ASKED, restarts=k), 5)) for k in (1, 3))
    assert (thrice <= once).all() and thrice.sum() < once.sum(), "a restart that finds nothing new tests nothing"
    one, many = (correct(make_targeted(ASKED, 5, targets=k)) for k in (1, 6))
    assert (many <= one).all() and many.sum() < one.sum()


def test_alpha_is_the_step_size() -> None:
    tiny = make_pgd(replace(ASKED, alpha=1e-6), 1)
    assert tiny.parameters["alpha"] == 1e-6
    with pytest.raises(ValueError, match="alpha=0, wanted more than 0"):
        replace(ASKED, alpha=0.0)


def test_wilson_intervals_are_sound_at_the_ends() -> None:
    """Against the roots of (p − x)² = z²·x(1 − x)/n, which define them."""
    for correct, total in ((0, 20), (20, 20), (7, 20), (300, 1000)):
        p, z2 = correct / total, 1.959964**2
        a, b, c = 1 + z2 / total, -(2 * p + z2 / total), p * p
        root = (b * b - 4 * a * c) ** 0.5
        assert Count(correct, total).interval == pytest.approx(((-b - root) / (2 * a), (-b + root) / (2 * a)), abs=1e-9)


@pytest.mark.parametrize("total", range(1, 200, 7))
def test_wilson_ends_are_exact_where_all_are_alike(total: int) -> None:
    assert Count(total, total).interval[1] == 1.0 and Count(0, total).interval[0] == 0.0
    assert Count(total, total).interval[0] < 1 and Count(0, total).interval[1] > 0


def test_few_images_are_the_same_for_any_number_of_shards() -> None:
    source = build_source(DIGITS, "test")
    indices = choose_indices(source, 50, None)
    chosen = []
    for shards in (1, 3):
        sets = ImageSets(source, DIGITS, indices, shards, Fitting())
        chosen.append(sorted(s for k in range(shards) for s in sets.shard("few:7", k).samples.tolist()))
    assert chosen[0] == chosen[1] and len(chosen[0]) == 7


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (41, 97)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_resizing_equals_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    """The transforms timm's preprocessing is made of."""
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    from mimir_fast.data import DataConfig

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    side, crop = 48, 0.8
    mode = transforms.InterpolationMode(interpolation)
    wanted = transforms.Compose([transforms.Resize(int(side / crop), mode), transforms.CenterCrop(side)])
    expected = np.asarray(wanted(Image.fromarray(pixels))).transpose(2, 0, 1)
    found = Fitting(crop, interpolation)(pixels, DataConfig(source="folder", image_size=side))
    assert np.array_equal(found, expected)


def test_rows_may_be_grids_and_words(small_model, digits_images: EvaluationImages, tmp_path: Path) -> None:
    """A loss surface is a grid an image, an example a picture: both come back from disk as they went."""

    def outcome(model, images, labels, samples):
        return {"grid": images[:, 0, :2, :2], "word": [f"image {s}" for s in samples.tolist()]}

    images = digits_images.evenly(5)
    for _ in range(2):
        record = measure(outcome, small_model, images, ShardRun(2, CPU, tmp_path / "j", 1))
        torch.testing.assert_close(record.tensor("grid"), images.images[:, 0, :2, :2].double() / 255)
        assert record.values["word"] == [f"image {s}" for s in images.samples.tolist()]


def test_step_sizes_are_the_papers() -> None:
    assert step_size(8 / 255, 20) == pytest.approx(2 / 255)
    assert step_size(4 / 255, 100) == pytest.approx(1 / 255)
    assert step_size(8 / 255, 1) == 8 / 255


@pytest.mark.parametrize("attack", [make_random_noise(ASKED), make_square(ASKED, 20)], ids=lambda a: a.name)
def test_attacks_without_gradients_stay_in_the_ball(small_model, digits_images: EvaluationImages, attack) -> None:
    images = digits_images.evenly(20)
    state = torch.get_rng_state()
    record = measure(scored(attack.run), small_model, images, ShardRun(20, CPU))
    assert torch.equal(torch.get_rng_state(), state)
    assert record.tensor("linf").max() <= EPS + 1e-6
    again = measure(scored(attack.run), small_model, images, ShardRun(20, CPU))
    assert again.values == record.values


def test_an_answer_that_is_no_number_is_wrong() -> None:
    """The argmax of NaN is 0, which is some image's label."""
    images, labels = torch.rand(4, 1, 2, 2), torch.arange(4)
    logits = torch.eye(4)
    logits[0] = torch.nan
    row = score(lambda x: logits, images, images, labels)  # type: ignore[arg-type]
    assert row["correct"].tolist() == [0, 1, 1, 1] and row["margin"][0] < -1e29
    assert is_correct(logits, labels).tolist() == [False, True, True, True]
