"""Fine-tune a pre-trained encoder into a robust classifier.

python -m mimir_fast.finetune --recipe digits/pgd_vit_nano --init runs/digits/mimir_vit_nano
torchrun --nproc_per_node 8 -m mimir_fast.finetune --recipe imagenet/fast_vit_base --init checkpoint-799.pth
python -m mimir_fast.finetune --init runs/mine     # its images and its encoder
python -m mimir_fast.finetune --help
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from mimir_fast.callable_modules import make_callable
from mimir_fast.cli import parse, peek, run
from mimir_fast.config_file import with_config_files
from mimir_fast.extensions import load_extensions
from mimir_fast.methods.registry import DEFAULT
from mimir_fast.recipes import find_recipe
from mimir_fast.recipes.following import after_finetuning, starting_from
from mimir_fast.training.finetuning import FinetuneConfig, finetune
from mimir_fast.training.saved_run import find_saved_run

COMMON = (
    "recipe", "method", "init", "output_dir", "data.source", "data.root", "data.image_size", "data.limit",
    "model.family", "model.encoder", "model.patch_size", "attack.eps", "attack.alpha", "attack.num_steps", "epochs",
    "max_steps", "batch_size", "micro_batch", "blr", "layer_decay", "precision", "device", "save_every", "overwrite",
    "dry_run",
)  # fmt: skip
"""What --help shows, of those that the method has."""


def config_from(args: Sequence[str]) -> FinetuneConfig:
    """Recipe, then method, then --config, then flags; the options are those of the method.

    Without a recipe the images and the encoder are those of the run behind --init.
    """
    typed, args = args, with_config_files(args)
    named, method = peek(args, "--recipe"), peek(args, "--method")
    recipe = FinetuneConfig.recipe if named is None else named
    imports = load_extensions(args, f"runs/{recipe}")
    run = find_saved_run(peek(args, "--init") or "") if named is None else None
    start = starting_from(*run, method or DEFAULT["finetune"]) if run else find_recipe(FinetuneConfig, recipe)
    default = replace(start, imports=imports)
    if method is not None:
        default = replace(default, method=method)
    return parse(FinetuneConfig, typed, default=default, prog="python -m mimir_fast.finetune", common=COMMON)


def main() -> None:
    """The command: fine-tune as the line says."""
    config = config_from(sys.argv[1:])
    finetune(config, after_finetuning(config))


make_callable(__name__)  # mimir_fast.finetune(…) is that of api.py

if __name__ == "__main__":
    run(main)
