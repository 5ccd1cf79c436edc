"""Measure what a frozen encoder knows, without fine-tuning it.

python -m mimir_fast.probe --checkpoint runs/digits/mimir_vit_nano
torchrun --nproc_per_node 8 -m mimir_fast.probe --checkpoint mae_pretrain_vit_base.pth --probes knn linear attentive \\
    --label_fractions 0.01 0.1 1 --data.source imagenet --data.root /data/imagenet --data.image_size 224
python -m mimir_fast.probe --help
"""

import sys
from collections.abc import Sequence

from mimir_fast.callable_modules import make_callable
from mimir_fast.cli import parse, peek, run
from mimir_fast.config_file import with_config_files
from mimir_fast.evaluate import data_of
from mimir_fast.extensions import load_extensions
from mimir_fast.models.facts import Asked
from mimir_fast.models.normalization import pair
from mimir_fast.probing.config import ProbingConfig
from mimir_fast.probing.encoder import open_encoder
from mimir_fast.probing.report import write
from mimir_fast.probing.run import Outcome, Probing
from mimir_fast.world import start_world, stop_world


def config_from(args: Sequence[str]) -> ProbingConfig:
    """The run's own data, then --config, then flags."""
    typed, args = args, with_config_files(args)
    imports, checkpoint = load_extensions(args), peek(args, "--checkpoint")
    default = ProbingConfig(checkpoint, data=data_of(checkpoint), imports=imports) if checkpoint else None
    return parse(ProbingConfig, typed, default=default, prog="python -m mimir_fast.probe")


def probe(config: ProbingConfig) -> list[Outcome]:
    """Run every probe, write results.json and report.html; the outcomes."""
    world = start_world(config.device)

    def log(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    encoder, notes = open_encoder(
        config.checkpoint, config.data, config.weights, config.pool, part=config.part,
        statistics=pair(config.mean, config.std), asked=Asked(config.options),
    )  # fmt: skip
    for note in notes:
        log(note)
    against = None
    if config.against is not None:
        against, more = open_encoder(config.against, config.data)
        log("\n".join([f"against {config.against}:", *more]))
        against = against.to(world.device)
    probing = Probing(config, encoder, world, log)
    outcomes = world.on_main(probing.run)
    world.on_main(lambda: write(probing, outcomes, notes + probing.notes, against))
    log(f"report: {config.folder}/report.html")
    stop_world()
    return outcomes


def main() -> None:
    """The command: probe what the line names."""
    probe(config_from(sys.argv[1:]))


make_callable(__name__)  # mimir_fast.probe(…) is that of api.py

if __name__ == "__main__":
    run(main)
