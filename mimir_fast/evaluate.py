"""Evaluate the robustness of any classifier.

python -m mimir_fast.evaluate --checkpoint runs/digits/pgd_vit_nano --suite quick
torchrun --nproc_per_node 8 -m mimir_fast.evaluate --checkpoint robust.pth --suite full --eps 4/255 \\
    --data.source imagenet --data.root /data/imagenet --data.image_size 224 --index_file robustbench
python -m mimir_fast.evaluate --checkpoint timm:resnet50 --norm l2 --eps 0.5 --restarts 5 --targets 9 \\
    --save_adversarial --data.source imagenet --data.root /data/imagenet --shifts /data/imagenet-a /data/imagenet-r
python -m mimir_fast.evaluate --help

Several reports side by side: python -m mimir_fast.compare.
"""

import shlex
import sys
from collections.abc import Sequence

from mimir_fast.callable_modules import make_callable
from mimir_fast.cli import parse, peek, run
from mimir_fast.config_file import with_config_files
from mimir_fast.data.config import DataConfig
from mimir_fast.evaluation.adapters import timm_settings
from mimir_fast.evaluation.config import EvaluateConfig, config_type
from mimir_fast.evaluation.run import evaluate
from mimir_fast.extensions import load_extensions
from mimir_fast.training.saved_run import data_of as data_of_run
from mimir_fast.versions import python_command


def data_of(checkpoint: str) -> DataConfig:
    """The data a run was trained on, so that a run folder needs no data flags; the image size of a timm model and of
    most of RobustBench's for ImageNet; else the defaults."""
    if checkpoint.startswith(("timm:", "hf-hub:")):
        size = timm_settings(checkpoint).get("image_size")
        return DataConfig(image_size=size) if size else DataConfig()
    if checkpoint.startswith("robustbench:imagenet/"):
        return DataConfig(image_size=224)
    return data_of_run(checkpoint)


COMMON = (
    "checkpoint", "suite", "norm", "eps", "limit", "data.source", "data.root", "data.image_size", "output_dir",
    "batch_size", "restarts", "targets", "autoattack", "autoattack_images", "corruptions", "shifts", "transfer_from",
    "smoothing", "minimal", "strongest", "weights", "mean", "std", "device", "overwrite",
)  # fmt: skip
"""What --help shows."""


def config_from(args: Sequence[str]) -> EvaluateConfig:
    """The run's own data, then --config, then flags; the options are those of every registered topic."""
    typed, args = args, with_config_files(args)
    imports = load_extensions(args)
    checkpoint, kind = peek(args, "--checkpoint"), config_type()
    default = kind(checkpoint, data=data_of(checkpoint), imports=imports) if checkpoint else None
    if default is None and {"-h", "--help"} & set(args):
        default = kind("")
    return parse(kind, typed, default=default, prog="python -m mimir_fast.evaluate", common=COMMON)


def main() -> None:
    """The command: evaluate what the line names, and say what to compare it with."""
    config = config_from(sys.argv[1:])
    if evaluate(config).sections:  # of the main process
        command = shlex.join([python_command(), "-m", "mimir_fast.compare", str(config.folder)])
        print(f"next: {command} … (the folder of another evaluation)", flush=True)


make_callable(__name__)  # mimir_fast.evaluate(…) is that of api.py

if __name__ == "__main__":
    run(main)
