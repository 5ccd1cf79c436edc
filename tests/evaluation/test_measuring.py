"""Images, journals and accuracy: exact counts, the same on resume, in any batch, on a loader or in memory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_classifier import DIGITS, EPS
from torch import nn

from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import build_loader, build_source
from mimir_fast.evaluation.accuracy import Count, accuracy, measure
from mimir_fast.evaluation.images import EvaluationImages, choose_indices, load_images
from mimir_fast.evaluation.journal import Journal
from mimir_fast.evaluation.named_attacks import make_pgd, make_random_noise, make_square, step_size

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
    with pytest.raises(ValueError, match="no image to judge"):
        choose_indices(build_source(DIGITS, "test"), 0, None)
    with pytest.raises(ValueError, match="nothing to judge"):
        load_images(DIGITS, np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="no images"):
        accuracy(nn.Identity(), [])


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


def test_accuracy_over_a_loader_equals_accuracy_in_memory(small_model, digits_images: EvaluationImages) -> None:
    threat = LinfThreat(EPS, EPS / 4, 5)

    def attack(model, x, y, samples):
        return pgd(model, x, y, threat, samples=samples, mode="eval")

    record = measure(small_model, digits_images, attack, batch_size=64, device=CPU)
    count = accuracy(small_model, build_loader(DIGITS, split="test", batch_size=77), attack)
    assert count == Count(int(record.tensor("correct").sum()), 300)
    with torch.no_grad():
        right = (small_model(digits_images.images.float() / 255).argmax(1) == digits_images.labels).sum()
    assert accuracy(small_model, build_loader(DIGITS, split="test", batch_size=100)) == Count(int(right), 300)
    assert str(Count(1, 3)) == "33.33 % (1/3)"


def test_killed_measurement_goes_on_where_it_was(small_model, digits_images: EvaluationImages, tmp_path: Path) -> None:
    attack, file = make_pgd(EPS, 5, seed=0), tmp_path / "pgd.jsonl"
    images = digits_images.evenly(50)
    whole = measure(small_model, images, attack.run, batch_size=16, device=CPU)
    calls = []

    def dies(model, x, y, samples):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack.run(model, x, y, samples)

    with pytest.raises(KeyboardInterrupt):
        measure(small_model, images, dies, batch_size=16, device=CPU, journal=file, settings="s")
    file.write_text(file.read_text() + '{"start": 32, "stop": 48, "val')  # the kill came while a line was written
    rest = []

    def counts(model, x, y, samples):
        rest.append(len(x))
        return attack.run(model, x, y, samples)

    resumed = measure(small_model, images, counts, batch_size=16, device=CPU, journal=file, settings="s")
    assert rest == [16, 2]
    assert resumed.values == whole.values
    assert [json.loads(line)["stop"] for line in file.read_text().splitlines()[1:]] == [16, 32, 48, 50]


def test_journal_refuses_another_measurement(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"eps": 1}).append({"correct": torch.ones(2)})
    with pytest.raises(ValueError, match="other settings"):
        Journal(tmp_path / "j", {"eps": 2})


def test_step_sizes_are_the_papers() -> None:
    assert step_size(8 / 255, 20) == pytest.approx(2 / 255)
    assert step_size(4 / 255, 100) == pytest.approx(1 / 255)
    assert step_size(8 / 255, 1) == 8 / 255


@pytest.mark.parametrize("attack", [make_random_noise(EPS, 0), make_square(EPS, 20, 0)], ids=lambda a: a.name)
def test_attacks_without_gradients_stay_in_the_ball(small_model, digits_images: EvaluationImages, attack) -> None:
    images = digits_images.evenly(20)
    state = torch.get_rng_state()
    record = measure(small_model, images, attack.run, batch_size=20, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert record.tensor("linf").max() <= EPS + 1e-6
    again = measure(small_model, images, attack.run, batch_size=20, device=CPU)
    assert again.values == record.values
