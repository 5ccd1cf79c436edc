"""How large a weight: the λ at which a penalty's gradient is a tenth of the reconstruction's, measured.

python -m mimir_fast.reproduction.penalty_weight docs/images docs/results/penalty_weight.json

For each data size, batch size, estimator and bandwidth, one step of MIMIR with a fresh ViT-nano on crops of
scikit-learn's two photographs, and ‖∇I‖ / ‖∇MSE‖ over the encoder's weights (`gradient_share` at λ = 1).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.methods.mutual_information import MutualInformationConfig
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.reproduction.gradient_share import gradient_share
from mimir_fast.versions import environment

SIZES = {32: 4, 64: 8, 224: 16}
"""Image size → patch size."""
BATCHES = (32, 128)
SHARE = 0.1
ESTIMATORS: dict[str, dict[str, Any]] = {
    "hsic, reference σ = 5 (MIMIR's)": {"estimator": "hsic", "bandwidth": "reference"},
    "hsic, reference σ = 0.5": {"estimator": "hsic", "bandwidth": "reference", "sigma": 0.5},
    "hsic, median": {"estimator": "hsic", "bandwidth": "median"},
    "nhsic, σ = 5 (the authors')": {"estimator": "nhsic"},
    "nhsic, σ = 0.5": {"estimator": "nhsic", "sigma": 0.5},
    "renyi, reference σ = 5": {"estimator": "renyi", "bandwidth": "reference"},
    "renyi, median": {"estimator": "renyi", "bandwidth": "median"},
}


@dataclass
class Weight:
    """One measurement: λ = SHARE / share."""

    image_size: int
    batch: int
    penalty: str
    share: float
    """‖∇I‖ / ‖∇MSE‖."""

    @property
    def weight(self) -> float:
        """The λ of the title."""
        return SHARE / self.share if self.share else float("inf")


def crops(image_size: int, count: int, seed: int = 0) -> Tensor:
    """(count, 3, image_size, image_size) uint8, random square crops of the two photographs, brought to size."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(image).permute(2, 0, 1) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    taken = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(torch.randint(96, 400, (), generator=generator))
        top, left = (int(torch.randint(size - side, (), generator=generator)) for size in photograph.shape[1:])
        crop = photograph[None, :, top : top + side, left : left + side].float()
        resized = torch.nn.functional.interpolate(crop, (image_size, image_size), mode="bilinear", antialias=True)
        taken.append(resized[0].round().clamp(0, 255).to(torch.uint8))
    return torch.stack(taken)


def measure(image_size: int, batch_size: int, options: dict[str, Any], seed: int = 0) -> float:
    """‖∇I‖ / ‖∇MSE‖ at the first step of a fresh ViT-nano."""
    torch.manual_seed(seed)
    model = build_masked_model(ModelConfig(encoder="nano", patch_size=SIZES[image_size]), image_size=image_size)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    batch = Batch(
        crops(image_size, batch_size, seed),
        labels,
        torch.arange(batch_size),
        torch.zeros(batch_size, dtype=torch.int64),
    )
    return gradient_share(MimirConfig(mi=MutualInformationConfig(weight=1.0, **options)), model, batch, seed=seed)


def draw(weights: list[Weight], image_size: int, path: Path) -> None:
    """The weights of one image size, one mark for each batch size, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 2.9), layout="constrained")
    names = list(reversed(ESTIMATORS))
    for batch, mark in zip(BATCHES, "os", strict=True):
        found = {w.penalty: w.weight for w in weights if (w.image_size, w.batch) == (image_size, batch)}
        axes.plot([found[name] for name in names], range(len(names)), mark, label=f"{batch} images", alpha=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlim=(3e-6, 1e5), xlabel=f"λ at which the penalty has {SHARE:.0%} of the gradient")
    axes.set_title(f"images of {image_size}² pixels, first step")
    axes.axvline(1e-5, color="#777777", linestyle=":", label="λ of MIMIR's paper")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.62))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(args: Sequence[str]) -> tuple[Path, Path]:
    """Where the pictures and the results go; ends the program where these are not two paths."""
    parser = argparse.ArgumentParser(prog="python -m mimir_fast.reproduction.penalty_weight")
    parser.add_argument("pictures", type=Path, help="folder")
    parser.add_argument("results", type=Path, help="JSON file")
    found = parser.parse_args(args)
    return found.pictures, found.results


def main() -> None:
    """Measure everything, write the JSON and one picture for each image size."""
    pictures, results = parse(sys.argv[1:])
    weights = []
    for image_size in SIZES:
        for batch in BATCHES:
            for name, options in ESTIMATORS.items():
                weights.append(Weight(image_size, batch, name, measure(image_size, batch, options)))
                print(f"{image_size:4}² {batch:4} {name:32} share {weights[-1].share:.1e}  λ {weights[-1].weight:.1e}",
                      flush=True)  # fmt: skip
        draw(weights, image_size, pictures / f"penalty-weight-{image_size}.png")
    rows = [asdict(weight) | {"weight": weight.weight} for weight in weights]
    results.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
