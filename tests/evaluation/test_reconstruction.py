"""The masked autoencoder behind a classifier: loaded from a file, attacked, and looked through."""

from pathlib import Path

import pytest
import torch
from file_state import file_state
from safetensors.torch import save_file

from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.topics.reconstruction import load_masked_autoencoder, reconstruct
from mimir_fast.methods.mae import MaeConfig
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, build_masked_model


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


def test_visible_patches_stay_and_true_patches_come_back(
    autoencoder: MaskedModel, digits_images: EvaluationImages
) -> None:
    images = digits_images.images[:6].float() / 255
    pictures = reconstruct(autoencoder, MaeConfig(), images, torch.arange(6), seed=0)
    kept = (pictures.view(6, 4, 2, 4, 2) == images.view(6, 4, 2, 4, 2)).all(dim=2).all(dim=-1).sum(dim=(1, 2))
    assert (kept >= 4).all(), "a quarter of 16 patches is visible"
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(pictures, reconstruct(autoencoder, MaeConfig(), images, torch.arange(6), seed=0))
