"""Data: sources (what images there are), order (which comes when), loaders (how they reach the device).

    config = DataConfig(source="fashion_mnist", image_size=32)
    loader = build_loader(config, split="train", batch_size=128, device="cpu", seed=0)
    for batch in loader: ...          # endless; batch.images is uint8 (B, C, H, W)

Importing this package costs nothing; numpy and image libraries are imported by `build_loader`.
"""

from typing import TYPE_CHECKING, Any

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig

if TYPE_CHECKING:
    from mimir_fast.data.build import build_loader
    from mimir_fast.data.loaders import Loader
    from mimir_fast.data.sources import build_source

__all__ = ["Batch", "DataConfig", "Loader", "build_loader", "build_source"]


def __getattr__(name: str) -> Any:
    if name == "build_loader":
        from mimir_fast.data.build import build_loader

        return build_loader
    if name == "Loader":
        from mimir_fast.data.loaders import Loader

        return Loader
    if name == "build_source":
        from mimir_fast.data.sources import build_source

        return build_source
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
