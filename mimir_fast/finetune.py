"""Fine-tune a pre-trained encoder into a robust classifier.

python -m mimir_fast.finetune --recipe digits/pgd_vit_nano --init runs/digits/mimir_vit_nano
torchrun --nproc_per_node 8 -m mimir_fast.finetune --recipe imagenet/fast_vit_base --init checkpoint-799.pth
python -m mimir_fast.finetune --help
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from mimir_fast.cli import parse, peek, run
from mimir_fast.extensions import load_extensions
from mimir_fast.recipes import find_recipe
from mimir_fast.training.finetuning import FinetuneConfig, finetune


def config_from(args: Sequence[str]) -> FinetuneConfig:
    """Recipe, then method, then flags; the options are those of the method."""
    named = peek(args, "--recipe")
    recipe = FinetuneConfig.recipe if named is None else named
    imports = load_extensions(args, f"runs/{recipe}")
    default = replace(find_recipe(FinetuneConfig, recipe), imports=imports)
    if (method := peek(args, "--method")) is not None:
        default = replace(default, method=method)
    return parse(FinetuneConfig, args, default=default, prog="python -m mimir_fast.finetune")


def main() -> None:
    """The command: fine-tune as the line says."""
    finetune(config_from(sys.argv[1:]))


if __name__ == "__main__":
    run(main)
