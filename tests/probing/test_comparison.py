"""Probings side by side: paired differences against counting by hand, and what cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mimir_fast.compare import CompareConfig, compare
from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources.base import ArraySource
from mimir_fast.evaluation.content import pixels_of
from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.file_names import to_files
from mimir_fast.probe import config_from, probe
from mimir_fast.probing import comparison
from mimir_fast.probing.encoder import open_encoder

LINE = [
    "--data.source", "digits", "--data.image_size", "32", "--data.limit", "200", "--probes", "knn", "--device", "cpu",
    "--attack_images", "10", "--attack_steps", "1", "--label_fractions", "0.5", "1", "--neighbours", "3",
]  # fmt: skip


def encoder_file(folder: Path, seed: int, pool: str = "cls") -> Path:
    torch.manual_seed(seed)
    model = Classifier(ClassifierConfig(encoder="nano", patch_size=8, global_pool=pool), 32, 10)  # type: ignore[arg-type]
    path = folder / f"encoder{seed}.safetensors"
    save_file({n: t.contiguous() for n, t in to_files(model, model.state_dict()).items() if "head" not in n}, path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two encoders on the same digits, the second at another ε as well, and on half of the images."""
    folder, found = tmp_path_factory.mktemp("probed"), {}
    for name, seed, more in (
        ("first", 0, ()),
        ("other", 1, ()),
        ("easy", 1, ("--eps", "1/255", "--limit", "100", "--no_pictures")),
    ):
        found[name] = folder / name
        probe(
            config_from(
                ["--checkpoint", str(encoder_file(folder, seed)), *LINE, *more, "--output_dir", str(found[name])]
            )
        )
    return found


def test_differences_are_counted_image_by_image(folders: dict[str, Path], tmp_path: Path) -> None:
    page = compare(CompareConfig((str(folders["first"]), str(folders["other"])), str(tmp_path)))
    files = [folders[name] / "results.json" for name in ("first", "other")]
    read = [json.loads(file.read_text()) for file in files]
    models = [comparison.ProbedModel(name, file, one) for name, file, one in zip("ab", files, read, strict=True)]
    found = {difference.measure: difference for difference in comparison.differences(models)}
    assert len(found) == 4
    for outcome in (0, 1):
        mine, theirs = (one["outcomes"][outcome]["clean"]["right"] for one in read)
        share = f"{100 * read[0]['outcomes'][outcome]['fraction']:g}"
        one = found[f"nearest neighbours, {share} % of the labels, no attack"]
        pairs = list(zip(mine, theirs, strict=True))
        assert (one.only_first, one.only_other, one.total) == (pairs.count(("1", "0")), pairs.count(("0", "1")), 200)
        assert one.only_first != one.only_other, "two equal models would test nothing"
    text = (tmp_path / "comparison.md").read_text()
    assert "encoder0.safetensors" in text and "under attack" in text and "compared with" in text
    assert "Distance under attack" in page.read_text() and not comparison.warnings(models)


def test_other_images_and_attacks(folders: dict[str, Path]) -> None:
    files = [folders[name] / "results.json" for name in ("first", "easy")]
    models = [comparison.ProbedModel(file.parent.name, file, json.loads(file.read_text())) for file in files]
    found = comparison.differences(models)
    assert [one.total for one in found] == [100, 100] and all("no attack" in one.measure for one in found)
    first, easy = (model.right(model.found["outcomes"][0], "attacked") for model in models)
    assert list(first) == [20 * k for k in range(10)] and list(easy) == [20 * k for k in range(10)]
    assert "Distance under attack" not in comparison.html(comparison.load(files[1:]))
    said = " ".join(comparison.warnings(models))
    assert "100 of 200" in said and "not comparable" in said


def test_other_pictures_of_one_name_are_not_paired(folders: dict[str, Path], tmp_path: Path) -> None:
    """Two folders of images have one source name and may have equally many images."""
    file = folders["first"] / "results.json"
    other = json.loads(file.read_text()) | {"images": "others"}
    other["choices"]["neighbours"] = 5
    models = [comparison.ProbedModel("a", file, json.loads(file.read_text())), comparison.ProbedModel("b", file, other)]
    said = " ".join(comparison.warnings(models))
    assert not comparison.differences(models)
    assert "different images" in said and "another --neighbours than a" in said
    labels, pixels = np.arange(4) % 2, np.zeros((4, 3, 8, 8), np.uint8)
    sources = [ArraySource("folder", images, labels, ("a", "b")) for images in (pixels, pixels + 1, pixels)]
    one, two, again = map(pixels_of, sources)
    assert one == again != two


def test_evaluations_and_probings_do_not_mix(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": "mimir_fast.evaluation"}')
    with pytest.raises(ValueError, match="folders of one kind"):
        compare(CompareConfig((str(tmp_path), str(folders["first"]))))


def test_a_run_folder_stands_for_its_probing(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "probing").symlink_to(folders["first"])
    compare(CompareConfig((str(tmp_path / "run"), str(folders["other"])), str(tmp_path / "out")))
    assert (tmp_path / "out" / "comparison.html").is_file()


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    path = str(encoder_file(tmp_path, 0))
    for data in (DataConfig(source="digits", image_size=64), DataConfig(source="digits", image_size=32, channels=1)):
        with pytest.raises(ValueError, match=r"--data.image_size 32 --data.channels 3"):
            open_encoder(path, data)


def test_one_image_a_class_and_fewer_images_than_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--checkpoint", str(encoder_file(tmp_path, 0)), *LINE, "--label_fractions", "0.01", "--neighbours", "40"]
    line += ["--probes", "knn", "linear", "--epochs", "2", "--no_pictures"]
    outcomes = probe(config_from([*line, "--output_dir", str(tmp_path / "out")]))
    assert [outcome.train_images for outcome in outcomes] == [10, 10] and outcomes[1].clean.accuracy > 0.15
    said = capsys.readouterr().out
    assert "fewer than the 40 --neighbours" in said and "one image a class" in said
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["notes"]) >= 3


class OneVector(torch.nn.Module):
    """A model of somebody: one vector an image, no attribute that timm's have."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.body, self.head, self.ndim = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Linear(8, 10), ndim

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.body(images)
        return maps if self.ndim == 4 else maps.mean(dim=(2, 3)) if self.ndim == 2 else maps[None]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))


def vectors() -> OneVector:
    return OneVector(2)


def maps() -> OneVector:
    return OneVector(4)


def strange() -> OneVector:
    return OneVector(5)


def diverged() -> OneVector:
    model = OneVector(2)
    torch.nn.init.constant_(model.body.weight, torch.nan)
    return model


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN or infinity for 200 of 200 train images"):
        probe(config_from(["--checkpoint", f"{__name__}:diverged", *LINE, "--output_dir", str(tmp_path)]))


def test_models_that_tell_nothing_of_themselves() -> None:
    data, images = DataConfig(source="digits", image_size=32), torch.rand(3, 3, 32, 32)
    for make, tokens in ((vectors, 1), (maps, 4)):
        encoder, _ = open_encoder(f"{__name__}:{make.__name__}", data)
        assert encoder.tokens(images).shape == (3, tokens, 8) and encoder.token_width == 8
        torch.testing.assert_close(encoder(images), encoder.model.body(images).mean(dim=(2, 3)))
    with pytest.raises(ValueError, match=r"wanted a tensor \(B, D\)"):
        open_encoder(f"{__name__}:strange", data)
