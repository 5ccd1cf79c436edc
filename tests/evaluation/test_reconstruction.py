"""The masked autoencoder behind a classifier: loaded from a file, attacked, and looked through."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import file_state
from safetensors.torch import save_file
from small_classifier import DIGITS, EPS

from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import ShardRun
from mimir_fast.evaluation.topic import Setup
from mimir_fast.evaluation.topics import information
from mimir_fast.evaluation.topics.reconstruction import load_masked_autoencoder, reconstruct
from mimir_fast.methods.mae import MaeConfig
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, build_masked_model
from mimir_fast.ops.patches import patchify, unpatchify


@pytest.fixture(scope="module")
def autoencoder() -> MaskedModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return build_masked_model(ModelConfig(encoder="tiny", patch_size=2), 8, 1).eval()


def test_sizes_come_from_the_tensors(autoencoder: MaskedModel, tmp_path: Path) -> None:
    save_file(dict(file_state(autoencoder)), tmp_path / "mae.safetensors")
    loaded, trained = load_masked_autoencoder(tmp_path / "mae.safetensors")
    assert trained == MaeConfig() and not loaded.training
    assert (loaded.encoder.image_size, loaded.patch_size, loaded.channels) == (8, 2, 1)
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in autoencoder.state_dict().items())


def test_an_encoder_without_decoder_is_refused(autoencoder: MaskedModel, tmp_path: Path) -> None:
    encoder = {name: t for name, t in file_state(autoencoder).items() if not name.startswith(("decoder", "mask"))}
    save_file(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="pre-training run"):
        load_masked_autoencoder(tmp_path / "encoder.safetensors")


def test_the_reconstruction_is_made_of_the_code_alone(
    autoencoder: MaskedModel, digits_images: EvaluationImages
) -> None:
    images, samples = digits_images.images[:6].float() / 255, torch.arange(6)
    latent, pictures = reconstruct(autoencoder, MaeConfig(), images, samples, seed=0)
    assert latent.shape == (6, 5, 192) and pictures.shape == images.shape
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert all(map(torch.equal, (latent, pictures), reconstruct(autoencoder, MaeConfig(), images, samples, seed=0)))
    # Hidden patches change neither; visible ones change the picture through the code only.
    _, masked = MaeConfig().draw(autoencoder, samples, seed=0, step=0)
    patches = patchify(images, 2)
    hidden = patches.scatter(1, masked.unsqueeze(-1).expand(-1, -1, 4), 1.0)
    again = reconstruct(autoencoder, MaeConfig(), unpatchify(hidden, 2), samples, seed=0)
    assert all(map(torch.equal, (latent, pictures), again))
    blind = copy.deepcopy(autoencoder)
    for parameter in blind.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    codes, same = reconstruct(blind, MaeConfig(), images, samples, seed=0)
    assert (codes == codes[:1]).all(), "the code is constant"
    assert torch.equal(same, reconstruct(blind, MaeConfig(), torch.rand_like(images), samples, seed=0)[1])


def test_pixels_get_the_mean_and_deviation_that_the_model_takes_out(digits_images: EvaluationImages) -> None:
    def pictures(**options: Any) -> torch.Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = build_masked_model(ModelConfig(encoder="nano", patch_size=2, **options), 8, 1).eval()
        torch.nn.init.zeros_(model.decoder.decoder_pred.weight)  # type: ignore[union-attr]
        images = digits_images.images[:2].float() / 255
        return reconstruct(model, MaeConfig(), images, torch.arange(2), seed=0)[1]

    assert (pictures() == 0.5).all()
    torch.testing.assert_close(pictures(mean=(0.3,), std=(0.2,)), torch.full((2, 1, 8, 8), 0.3))


def test_the_reported_bound_of_a_constant_code_is_zero(small_model, digits_images: EvaluationImages) -> None:
    """Through the measurement itself, where it once said 2 bits of a code that was the same for all images."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build_masked_model(ModelConfig(encoder="nano", patch_size=2), 8, 1).eval()
    for parameter in model.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    config = EvaluateConfig("m", "full", DIGITS, eps=EPS, pretrained="mae")
    setup = Setup(config, 200, tuple("0123456789"), True, True, lambda spec: small_model)
    setup.once("autoencoder", lambda: (model, MaeConfig(), []))
    clean, *_ = information.measurements(setup)
    record = clean.run(small_model, digits_images.evenly(200), ShardRun(100, torch.device("cpu")))
    seen = [torch.tensor(record.values[name]) for name in ("attacked", "reconstructed")]
    found = information.bounds_of(*seen, 10)
    assert found.entropy > 3 and found.lower < 0.05
    assert max(record.values["renyi_bits"]) == 0
