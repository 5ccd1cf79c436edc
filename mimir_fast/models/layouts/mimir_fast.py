"""Our own: checkpoints, exported files, and the state dict of a live model, which shows its parts."""

import json

from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.parts import Part

# What a live model has beside its encoder; its decoder stands under a prefix of its own.
_BESIDE = ("head.weight", "head.bias", "head_dist.", "fc_norm.", "mask_token")
_DECODER = "decoder.decoder_"


def is_ours(part: Part) -> bool:
    """By the header of an exported file, the record of a checkpoint, or the parts of a live model."""
    live = part.path[-1:] == ("encoder",) and any(n.startswith((_DECODER, *_BESIDE)) for n in part.siblings)
    return bool(part.beside.get("mimir_fast")) or live


def read(part: Part) -> Read:
    """Under the names that files have."""
    taken = [name for name in part.siblings if name.startswith((_DECODER, "decoder.mask_token", *_BESIDE))]
    tensors = part.tensors | {name.removeprefix("decoder."): part.siblings[name] for name in taken}
    return Read(under_our_names(tensors), taken=taken)


def config_of(metadata: dict[str, str]) -> dict[str, object] | None:
    """The configuration in the header of a file of ours; None in others.

    Raises:
        ValueError: the header says that it is ours and holds none.
    """
    # Of a folder for the Hub `format` is "pt", as transformers opens no other.
    if "mimir_fast" not in (metadata.get("format"), metadata.get("made_by")):
        return None
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"metadata `config` is missing or damaged ({error})") from error
    if not isinstance(config, dict):
        raise ValueError("metadata `config` is no table of options")
    return config


register(Layout("mimir_fast", "mimir_fast", is_ours, read))
