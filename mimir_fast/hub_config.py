"""Of a run's configuration, what is published with its weights."""

from typing import Any

# Of a saved configuration, what a reader needs: no folders, no files.
_PUBLIC = {
    "recipe": None, "method": None, "preset": None, "model": None, "objective": None, "optim": None,
    "data": ("source", "image_size", "channels", "augment", "crop_padding", "flip", "generated_ratio"),
    "run": ("epochs", "max_steps", "warmup_epochs", "batch_size", "accum_iter", "seed", "precision", "ema_decay"),
}  # fmt: skip


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that tells nothing of the machine it ran on."""
    found = {}
    for name, parts in _PUBLIC.items():
        if name in config:
            value = config[name]
            found[name] = value if parts is None else {part: value[part] for part in parts if part in value}
    return found
