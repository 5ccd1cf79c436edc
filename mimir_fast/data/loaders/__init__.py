"""Ways from a source to batches on the device, behind one interface (`Loader`)."""

from mimir_fast.data.loaders.base import Loader

__all__ = ["Loader"]
