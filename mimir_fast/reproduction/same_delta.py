"""Do latents of several arms hold the same perturbation? One δ for all, which the cells' own measure has not.

    python -m mimir_fast.reproduction.same_delta FOLDER STAGE SOURCE ROW [ROW …]

FOLDER is that of `mi_question`, with the cells of some seeds still in it. δ is made on the model of SOURCE, of the same
seed as each model it is looked for in. `latent_facts` attacks every model by itself: its "delta_r2" is about attacks as
well as about latents, and does not compare rows. Written after the question's records were read: it decides nothing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from mimir_fast.evaluation.images import load_images
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.reproduction.ablation import Row, read_results, whole_seeds
from mimir_fast.reproduction.contrasts import contrast
from mimir_fast.reproduction.latent_facts import attacked, explained, latent_of, pretrained
from mimir_fast.reproduction.mi_plan import Plan, QuestionData, plan_of, rows_of

Probed = dict[str, dict[int, dict[str, float]]]


def same_delta(plan: Plan, stage: Path, rows: Sequence[Row], source: Row) -> Probed:
    """{row: {seed: {"attacked", "clean", "difference"}}}: R² of δ from the tokens of the attacked images, from those of
    the clean ones, which δ never entered, and from the attacked less the clean ones."""
    found: Probed = {row.name: {} for row in rows}
    seeds = sorted({cell.seed for cell in whole_seeds(read_results(stage / "results.jsonl"))})
    kept = [s for s in seeds if all(row.pretrained_in(stage / "cells", s).is_dir() for row in (source, *rows))]
    images = load_images(plan.finetune.data).evenly(plan.facts_images)
    for seed in kept:
        models = {row.name: _model_of(row, stage, seed) for row in (source, *rows)}
        step = attacked(models[source.name], images, plan.rules.eps)
        clean = patchify_gather(step.batch.images, step.mask.keep, step.bare.patch_size)
        for row in rows:
            model = models[row.name]
            seen, unseen = (latent_of(model, x, step.mask) for x in (step.visible, clean))
            parts = {"attacked": seen, "clean": unseen, "difference": seen - unseen}
            prefix = model.encoder.num_prefix
            found[row.name][seed] = {
                name: explained(latent[:, prefix:], step.visible - clean) for name, latent in parts.items()
            }
    return found


def _model_of(row: Row, stage: Path, seed: int) -> MaskedModel:
    if row.pretrain is None:
        raise ValueError(f"row {row.name} has no pre-training, so no latent")
    return pretrained(row.pretrain, row.pretrained_in(stage / "cells", seed))


def lines_of(found: Probed, source: str) -> list[str]:
    """A row and a measure a line, with the difference from the source over seeds and its 95 % interval."""
    lines = []
    for row, seeds in found.items():
        for measure in next(iter(seeds.values())):
            values = [cell[measure] for cell in seeds.values()]
            c = contrast([seeds[s][measure] - found[source][s][measure] for s in seeds], margin=1.0)
            low, high = c.interval
            mean = sum(values) / len(values)
            lines.append(f"{row:24} {measure:10} {mean:.4f}   {c.mean:+.4f} ({low:+.4f} to {high:+.4f})")
    return lines


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """`folder`, `stage`, `source`, `rows`, `data` and `data_root`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the --output_dir of mi_question")
    parser.add_argument("stage", help="arms, assay_1, …")
    parser.add_argument("source", help="the row on whose models the perturbation is made")
    parser.add_argument("rows", nargs="+", help="rows in whose latents it is looked for, beside the source's own")
    parser.add_argument(
        "--data", choices=get_args(QuestionData), default="fashion", help="as it was given to mi_question"
    )
    parser.add_argument("--data_root", default="data", help="as it was given to mi_question")
    return parser.parse_args(args)


def main() -> None:
    """Print the lines, and write all values beside the stage's records."""
    args = parse()
    plan = plan_of("reduced", args.data, root=args.data_root)
    torch.set_num_threads(1)
    rows = rows_of(plan, 1, plan.learning_rates[0], plan.shares[0])  # the model and the data are all that is read
    picked = [rows[name] for name in (args.source, *args.rows)]
    found = same_delta(plan, args.folder / args.stage, picked, rows[args.source])
    (args.folder / args.stage / f"same_delta_{args.source}.json").write_text(json.dumps(found, indent=1))
    print("\n".join(lines_of(found, args.source)))


if __name__ == "__main__":
    main()
