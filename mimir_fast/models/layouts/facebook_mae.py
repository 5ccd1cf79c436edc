"""MAE (He et al., arXiv 2111.06377) as facebookresearch/mae writes it: encoder and decoder, or fine-tuned.

`mae_pretrain_*.pth` hold the encoder alone under timm's plain names and are read as these; `mae_visualize_*.pth` and
checkpoints of its training script have the decoder too, 512 wide.
"""

from mimir_fast.models.facts import facts_of_args
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.layouts.mimir_fast import is_ours
from mimir_fast.models.parts import Part

HINT = "MAE's own weights were trained on images normalised by ImageNet's mean and std: --model.normalization imagenet"


def recognise(part: Part) -> bool:
    """A decoder of 512 under MAE's names, and not a file of ours."""
    decoder = part.tensors.get("decoder_embed.weight")
    return decoder is not None and decoder.ndim == 2 and len(decoder) == 512 and not is_ours(part)


def read(part: Part) -> Read:
    """The names are ours."""
    return Read(dict(part.tensors), facts_of_args(part.beside.get("args")), hint=HINT)


register(Layout("facebook_mae", "MAE", recognise, read))
