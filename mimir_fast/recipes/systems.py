"""What is implemented: the systems of the papers, where each is run, tested, and how large it was really run here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row of docs/systems.md.

    Attributes:
        recipe: of pretrain or finetune.
        test: file under the repository's root.
        largest: what was run by this project, and on what; two CPU cores where nothing else is said.
    """

    name: str
    source: str
    recipe: str
    test: str
    largest: str


_DIGITS = "ViT-nano/8, 1,497 digits, 468 steps of 128"
_NANO = "nano, 1,497 digits"

SYSTEMS = (
    System(
        "MAE",
        "He et al., arXiv 2111.06377",
        "imagenet/mae_vit_base_800ep",
        "tests/methods/test_pretraining_methods.py",
        _DIGITS,
    ),
)
