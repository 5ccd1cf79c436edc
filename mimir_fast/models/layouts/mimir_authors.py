"""The MIMIR authors' checkpoints (arXiv 2312.04960): {model, optimizer, epoch, scaler, args}; the decoder is 128 wide.

Their released classifiers stand under `model_state_dict` with a prefix, and their normalisation, where they have one,
beside the encoder (as RobustBench's models: `normalize.mean`, `normalize.std`, or `mu` and `sigma`).
"""

from mimir_fast.models.facts import Facts, facts_of_args
from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.layouts.mimir_fast import is_ours
from mimir_fast.models.layouts.timm import without_derived
from mimir_fast.models.parts import Part


def recognise(part: Part) -> bool:
    """A light decoder, and not a file of ours."""
    decoder = part.tensors.get("decoder_embed.weight")
    if is_ours(part) or decoder is None or decoder.ndim != 2:
        return False
    return len(decoder) != 512


def read(part: Part) -> Read:
    """The names are ours. They train on images in [0, 1]."""
    tensors, left_out = without_derived(part.tensors)
    facts = facts_of_args(part.beside.get("args"))
    return Read(under_our_names(tensors), Facts().over(facts), left_out)


register(Layout("mimir_authors", "MIMIR authors", recognise, read))
