"""Pre-train a robust masked autoencoder.

python -m mimir_fast.pretrain --recipe digits/mimir_vit_nano
torchrun --nproc_per_node 8 -m mimir_fast.pretrain --recipe imagenet/mimir_vit_base --data.root /data/imagenet
python -m mimir_fast.pretrain --help
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from mimir_fast.callable_modules import make_callable
from mimir_fast.cli import parse, peek, run
from mimir_fast.config_file import with_config_files
from mimir_fast.extensions import load_extensions
from mimir_fast.recipes import find_recipe
from mimir_fast.recipes.following import after_pretraining
from mimir_fast.training.pretraining import PretrainConfig, pretrain, with_method, with_preset

COMMON = (
    "recipe", "preset", "method", "init", "output_dir", "data.source", "data.root", "data.image_size", "data.limit",
    "model.family", "model.encoder", "model.patch_size", "mask_ratio", "attack.eps", "attack.num_steps", "epochs",
    "max_steps", "batch_size", "micro_batch", "blr", "precision", "device", "save_every", "overwrite", "dry_run",
)  # fmt: skip
"""What --help shows, of those that the method has."""


def config_from(args: Sequence[str]) -> PretrainConfig:
    """Recipe, then method, then preset, then --config, then flags; the options are those of the method."""
    typed, args = args, with_config_files(args)
    named = peek(args, "--recipe")
    recipe = PretrainConfig.recipe if named is None else named
    imports = load_extensions(args, f"runs/{recipe}")
    default = replace(find_recipe(PretrainConfig, recipe), imports=imports)
    if (method := peek(args, "--method")) is not None:
        default = with_method(default, method)
    if preset := peek(args, "--preset"):
        default = with_preset(default, preset)
    return parse(PretrainConfig, typed, default=default, prog="python -m mimir_fast.pretrain", common=COMMON)


def main() -> None:
    """The command: pre-train as the line says."""
    config = config_from(sys.argv[1:])
    pretrain(config, after_pretraining(config))


make_callable(__name__)  # mimir_fast.pretrain(…) is that of api.py

if __name__ == "__main__":
    run(main)
