"""Pre-train a robust masked autoencoder.

python -m mimir_fast.pretrain --recipe digits/mimir_vit_nano
torchrun --nproc_per_node 8 -m mimir_fast.pretrain --recipe imagenet/mimir_vit_base --data.root /data/imagenet
python -m mimir_fast.pretrain --help
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from mimir_fast.cli import parse, peek, run
from mimir_fast.extensions import load_extensions
from mimir_fast.recipes import find_recipe
from mimir_fast.training.pretraining import PretrainConfig, pretrain, with_method, with_preset


def config_from(args: Sequence[str]) -> PretrainConfig:
    """Recipe, then method, then preset, then flags; the options are those of the method."""
    named = peek(args, "--recipe")
    recipe = PretrainConfig.recipe if named is None else named
    imports = load_extensions(args, f"runs/{recipe}")
    default = replace(find_recipe(PretrainConfig, recipe), imports=imports)
    if (method := peek(args, "--method")) is not None:
        default = with_method(default, method)
    if preset := peek(args, "--preset"):
        default = with_preset(default, preset)
    return parse(PretrainConfig, args, default=default, prog="python -m mimir_fast.pretrain")


def main() -> None:
    """The command: pre-train as the line says."""
    pretrain(config_from(sys.argv[1:]))


if __name__ == "__main__":
    run(main)
