"""The commands from Python, and a finished run asked for single images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mimir_fast
from mimir_fast import api
from mimir_fast.checkpoints.durable import point
from mimir_fast.data import DataConfig
from mimir_fast.data.sources import build_source
from mimir_fast.evaluation.adapters import load_model
from mimir_fast.evaluation.images import load_images
from mimir_fast.predict import PredictConfig, predict
from mimir_fast.predicting import Attacked, Prediction

SMALL = {"device": "cpu", "precision": "fp32", "batch_size": 16, "log_every": 1, "save_every": 50}
DIGITS = DataConfig(image_size=32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pre-training and a fine-tuning of one step."""
    folder = tmp_path_factory.mktemp("api runs")
    pretrained = mimir_fast.pretrain(
        data={"source": "digits", "limit": 32}, recipe="digits/mimir_vit_nano", max_steps=1, output_dir=folder / "a",
        attack={"eps": "4/255"}, **SMALL,
    )  # fmt: skip
    tuned = mimir_fast.finetune(
        pretrained, data="digits", method="natural", max_steps=1, probe={"num_images": 0}, warmup_epochs=0, **SMALL
    )
    return pretrained, tuned


def test_training(runs: tuple[Path, Path]) -> None:
    pretrained, tuned = runs
    assert pretrained.name == "a" and tuned == Path(f"{pretrained}-natural")
    assert '"eps": 0.01568' in (pretrained / "config.json").read_text()


def test_judging(runs: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"suite": "table", "autoattack": "no", "limit": 30, "eps": "1/255"}
    results = mimir_fast.evaluate(runs[1], output_dir=tmp_path, **options)
    assert results.sections["accuracy"]["attacks"]["natural"]["total"] == 30 and (tmp_path / "report.html").is_file()
    outcomes = mimir_fast.probe(runs[0], probes=["knn"], attack_images=0, limit=30, pictures=False, output_dir=tmp_path)
    assert len(outcomes) == 1
    model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), torch.zeros(4, 1, 8, 8)
    given = mimir_fast.evaluate(
        model, images, torch.tensor([0, 1, 0, 1]), suite="table", autoattack="no", eps="8/255", targets=1
    )  # fmt: skip
    assert given.sections["accuracy"]["attacks"]["natural"]["accuracy"] == 0.5
    with pytest.raises(ValueError, match="targets=50, wanted at most 1 "):
        mimir_fast.evaluate(model, images, [0, 1, 0, 1], suite="table", autoattack="no", targets=50)
    for wrong in ({"model": model}, {"model": runs[1], "images": images}):
        with pytest.raises(ValueError, match="in memory"):
            mimir_fast.evaluate(**wrong)


def test_a_digit(runs: tuple[Path, Path], tmp_path: Path) -> None:
    model = mimir_fast.load(runs[1])
    images = load_images(DIGITS)
    x = images.images[:6].expand(-1, 3, -1, -1) if images.images.shape[1] == 1 else images.images[:6]
    found = [model.predict(image) for image in x]
    judged = load_model(str(runs[1]), num_classes=10, device=torch.device("cpu"), image_size=32)
    with torch.no_grad():
        logits = judged.module(x.float() / 255)
    ordered = logits.sort(descending=True)
    assert [said.index for said in found] == ordered.indices[:, 0].tolist()
    assert [said.name for said in found] == [str(said.index) for said in found]
    assert [said.runner_up for said in found] == [str(index) for index in ordered.indices[:, 1].tolist()]
    margins, best = ordered.values[:, 0] - ordered.values[:, 1], logits.softmax(1).amax(1)
    torch.testing.assert_close(torch.tensor([said.margin for said in found]), margins, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.tensor([said.probability for said in found]), best)
    pixels = x[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "x.png")
    # The same image as a file, an array and floats, and of one channel.
    for same in (tmp_path / "x.png", pixels, x[0].float() / 255, pixels[:, :, 0], x[0, :1],
                 Image.fromarray(pixels), (tmp_path / "x.png").read_bytes()):  # fmt: skip
        assert model.predict(same) == found[0]
    between = (x[0].float() + 0.4).clamp(max=255) / 255
    assert torch.equal(model.attack(between, eps="1/255").clean, between), "floats are not rounded to 8 bits"
    with torch.inference_mode():
        assert model.predict(x[0]) == found[0] and model.attack(x[0], eps="16/255").after == both_after(model, x[0])
    both = model.attack(x[0], eps=16 / 255)
    assert (both.before == found[0] and both.after.index != both.before.index) or both.after.margin < both.before.margin
    distance = (both.adversarial - both.clean).abs().max()
    assert 8 / 255 < distance <= 16 / 255 + 1e-7 and torch.equal(both.clean, x[0].float() / 255)
    assert torch.equal(model.attack(x[0], eps=16 / 255).adversarial, both.adversarial)
    features = model.embed(pixels, x[1])
    assert features.shape == (2, 96) and torch.equal(features[:1], model.embed(x[0]))


def both_after(model: mimir_fast.predicting.LoadedModel, image: torch.Tensor) -> Prediction:
    return model.attack(image, eps=16 / 255).after


def test_features_of_a_model_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's extractor under no_grad: features and classes need no gradient, an attack does."""
    (tmp_path / "extractor_of_mine.py").write_text(
        "import torch\n\n\n"
        "class Extractor(torch.nn.Module):\n"
        "    @torch.no_grad()\n"
        "    def forward_features(self, x):\n"
        "        return x.flatten(1)[:, :12] + x.mean()\n\n"
        "    @torch.no_grad()\n"
        "    def forward(self, x):\n"
        "        return self.forward_features(x)\n\n\n"
        "def build():\n"
        "    return Extractor()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, image = mimir_fast.load("extractor_of_mine:build"), np.zeros((32, 32, 3), np.uint8)
    assert model.embed(image).shape == (1, 12) and isinstance(model.predict(image), Prediction)
    with pytest.raises(ValueError, match="gives no gradient"):
        model.attack(image)


def test_images_that_are_none(runs: tuple[Path, Path], tmp_path: Path) -> None:
    model = mimir_fast.load(runs[1])
    (tmp_path / "x.png").write_text("no image")
    for wrong in (tmp_path / "x.png", np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8)), torch.zeros(3, 8, 8),
                  2 * torch.ones(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.int64)):  # fmt: skip
        with pytest.raises(ValueError):
            model.predict(wrong)
    for missing in ("", tmp_path, tmp_path / "no.png"):
        with pytest.raises(FileNotFoundError, match="is no file, wanted an image"):
            model.predict(missing)
    for wrong in (None, [1, 2], 3):
        with pytest.raises(TypeError, match="an image is a file, its bytes, a PIL image, an array or a tensor, got"):
            model.embed(wrong)
    for checkpoint, options, words in (
        (None, {}, "got NoneType"), (b"x", {}, "got bytes"), (Image.new("L", (8, 8)), {}, "got Image"),
        ("", {}, "names no model"), (runs[1], {"weights": "bset"}, "wanted one of auto, last, best, ema"),
        (runs[1], {"device": "gpu"}, "wanted cpu, cuda"), (runs[1], {"device": "meta"}, "wanted cpu, cuda"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            mimir_fast.load(checkpoint, **options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda:0', wanted cpu.*sees no CUDA GPU here"):
            mimir_fast.load(runs[1], device="cuda:0")
    encoder = mimir_fast.load(runs[0])
    assert encoder.embed(torch.zeros(3, 32, 32)).shape == (1, 96)
    with pytest.raises(ValueError, match="no classification head"):
        encoder.predict(torch.zeros(3, 32, 32))


def test_the_command(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_source(DIGITS, "test")
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, name in enumerate(names):
        Image.fromarray(source.pixels(i).squeeze()).save(name)
    (first, _) = predict(PredictConfig(str(runs[1]), tuple(names)))
    assert isinstance(first, Prediction)
    assert f"{names[0]}: {first.name} ({100 * first.probability:.1f} %), by a margin of" in capsys.readouterr().out
    attacked = predict(PredictConfig(str(runs[1]), tuple(names), attack=True, output=str(tmp_path / "p.png")))
    said = capsys.readouterr().out
    assert said.count("under PGD-20, L∞, ε = 8/255: ") == 2 and f"picture: {tmp_path / 'p.png'}" in said
    assert isinstance(attacked[0], Attacked) and attacked[0].before == first
    assert Image.open(tmp_path / "p.png").size[0] > 500


def test_errors_are_exceptions(tmp_path: Path) -> None:
    for options, words in (
        ({"recipe": "digits/no"}, "unknown recipe"), ({"data": "nowhere"}, "wanted a folder of images or one of"),
        ({"no_such_option": 3}, "no_such_option"), ({"batch_size": "many"}, "batch_size"),
        ({"data": {"root": "here"}}, "data.root does nothing while data.source is digits"),
        ({"batch_sise": 3}, "Unrecognized options: batch_sise=3; did you mean batch_size"),
        ({"mi": {"shar": 0.1}}, "Unrecognized options: mi.shar=0.1; did you mean mi.share"),
        ({"precision": "fp17"}, "invalid choice 'fp17' for argument 'precision'. Expected one of"),
        ({"data": {"source": "digits", "image_size": 1_000_000}}, "image_size must be at most 8192 pixels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            mimir_fast.pretrain(output_dir=tmp_path / "run", **options)
        assert not set("│╭╮╰╯─\n") & set(str(caught.value)) and "--" not in str(caught.value), str(caught.value)
    assert api._configured("pretrain", {"source": "digits", "root": None}).data.root is None, "as YAML's `root: ~`"
    model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"give eps, such as 0\.5"):
        mimir_fast.evaluate("runs/none", norm="l2")
    for options, words in (({"suit": "table"}, "did you mean suite"), ({"eps": "8/"}, "a fraction such as 8/255")):
        with pytest.raises(ValueError, match=words):
            mimir_fast.evaluate(model, images, [0, 1, 0, 1], **options)
    with pytest.raises(TypeError, match="data=list, wanted a source's name"):
        mimir_fast.pretrain(data=["digits"], output_dir=tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_run_that_a_signal_stopped_is_no_result(tmp_path: Path) -> None:
    """The next line of a program would fine-tune an unfinished encoder."""
    (tmp_path / "environment.json").write_text('{"ended": "interrupted"}')
    config = api._configured("pretrain", "digits")
    with pytest.raises(InterruptedError, match="the same call goes on"):
        api._finished(tmp_path, config)
    (tmp_path / "environment.json").write_text('{"ended": "finished"}')
    assert api._finished(tmp_path, config) == tmp_path


def test_weights_are_chosen_for_features_too(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = mimir_fast.finetune(
        runs[0], data="digits", method="natural", max_steps=2, probe={"num_images": 0}, warmup_epochs=0, lr="1e-2",
        output_dir=tmp_path / "run", **SMALL | {"save_every": 1},
    )  # fmt: skip
    point(run / "checkpoints" / "best", "step-00000001")
    x = torch.rand(3, 32, 32)
    best, last = (mimir_fast.load(run, weights=which).embed(x) for which in ("best", "last"))
    assert not torch.equal(best, last)


def test_a_data_config_says_what_is_not_as_usual() -> None:
    config = api._configured("pretrain", DataConfig(limit=8), recipe="digits/mimir_vit_nano")
    assert (config.data.source, config.data.limit) == ("digits", 8)
