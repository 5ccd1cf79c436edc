"""What the pre-training recipes of all data sets share, so that each file says only what is its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from mimir_fast.data import DataConfig
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.models.masked_autoencoder import EncoderName, ModelConfig
from mimir_fast.recipes import register
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig

METHOD_NOTES: dict[Literal["mae", "adv_mae", "mimir"], str] = {
    "mae": "MAE on clean images",
    "adv_mae": "MAE on adversarial images",
    "mimir": "MIMIR, preset paper",
}


def register_pretraining(
    group: str, encoders: tuple[EncoderName, ...], patch_size: int, data: Callable[[], DataConfig],
    run: Callable[[], RunConfig], note: str, blr: float = 1.5e-4,
) -> None:  # fmt: skip
    """GROUP/{mae,adv_mae,mimir}_vit_SIZE for each encoder size."""
    for encoder in encoders:
        for method, what in METHOD_NOTES.items():

            def build(
                encoder: EncoderName = encoder, method: Literal["mae", "adv_mae", "mimir"] = method
            ) -> PretrainConfig:
                return PretrainConfig(
                    method=method,
                    model=ModelConfig(encoder=encoder, patch_size=patch_size),
                    data=data(),
                    objective=MimirConfig(),
                    optim=OptimizerConfig(blr=blr),
                    run=replace(run()),
                )

            register(f"{group}/{method}_vit_{encoder}", PretrainConfig, build, f"{what}; {note}")
