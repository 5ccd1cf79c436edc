"""Take the weights out of a run: into timm, or into one safetensors file.

python -m mimir_fast.export runs/digits/mimir_vit_nano --format timm --output encoder.safetensors
python -m mimir_fast.export runs/digits/pgd_vit_nano --format safetensors --output robust.safetensors

`timm` holds what timm's model of the family has, under its names: of a pre-training run the encoder, of a fine-tuned
run the whole classifier. The Python that builds it is in the file's metadata and is printed. `safetensors` holds
all weights and the configuration; `--init` and `--checkpoint` of our commands take it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import Tensor

from mimir_fast.checkpoints.durable import PARTIAL, move
from mimir_fast.cli import parse, run
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.layers.norms import SUFFIX, is_adapter
from mimir_fast.models.families import find_family
from mimir_fast.models.loading import inspect_weights
from mimir_fast.models.normalization import check_statistics, choice_note, to_metadata
from mimir_fast.models.options import option_texts
from mimir_fast.models.weight_files import Weights, WeightsChoice, WeightsError, read_weights
from mimir_fast.versions import python_command

Domain = Literal["clean", "adversarial"]


@dataclass
class ExportConfig:
    """Write a run's weights as one file."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint folder, or any file --init takes."""
    output: str
    """The .safetensors file to write."""
    format: Literal["timm", "safetensors"] = "timm"
    """`timm`: for timm's class. `safetensors`: everything, for our own commands."""
    weights: WeightsChoice = "auto"
    """The trained weights (model), their moving average (ema), or the average where there is one (auto)."""
    part: str = ""
    """Of a file with several encoders, the name of the one to take, such as teacher."""
    domain: Literal["", "clean", "adversarial"] = ""
    """Of weights with adapters (AEMIM), whose norms and cls token; clean when not said. Format timm only."""
    mean: tuple[float, ...] | None = None
    """The mean that the model takes out of images in [0, 1], one number a channel; left out: as the weights say."""
    std: tuple[float, ...] | None = None
    """The deviation."""
    overwrite: bool = False
    """Replace an existing file."""
    imports: Imports = ()
    """Module that registers the family of the weights; a run's own are imported unasked."""

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".safetensors":
            raise ValueError(f"--output {self.output}: wanted a name that ends in .safetensors")
        check_statistics(self.mean, self.std, None)


def encoder_tensors(weights: Weights, domain: Domain) -> dict[str, Tensor]:
    """The tensors of encoder and head, of one domain where the encoder has adapters: no decoder, no mask token.

    Raises:
        WeightsError: the adversarial domain is asked for and the weights have no adapters.
    """
    tensors = {n: t for n, t in weights.tensors.items() if not n.startswith(("decoder_", "mask_token"))}
    adapters = {n.removesuffix(SUFFIX): t for n, t in tensors.items() if is_adapter(n)}
    if domain == "adversarial" and not adapters:
        raise WeightsError(f"{weights.origin} has no adapters for adversarial images: leave --domain out")
    plain = {n: t for n, t in tensors.items() if not is_adapter(n)}
    return plain | adapters if domain == "adversarial" else plain


def export(config: ExportConfig) -> Path:
    """Write the file and return its path.

    Raises:
        WeightsError: the source cannot be read or is no vision transformer of ours.
        FileExistsError: the file exists and `overwrite` is off.
    """
    from safetensors.torch import save_file

    path = Path(config.output)
    if path.exists() and not config.overwrite:
        raise FileExistsError(f"{path} exists: choose another --output, or --overwrite")
    if (path.parent / "meta.json").exists():
        raise FileExistsError(
            f"{path.parent} is a checkpoint, which another file would damage: choose another --output"
        )
    weights = read_weights(config.source, config.weights, config.part)
    domain: Domain = config.domain or "clean"
    if not config.domain and any(is_adapter(name) for name in weights.tensors):
        print(
            "these weights keep their norms for clean and for adversarial images: the clean ones are exported "
            "(--domain adversarial for the others)"
        )
    architecture, report = inspect_weights(weights)
    print(report)
    asked = (config.mean, config.std) if config.mean is not None and config.std is not None else None
    statistics = weights.statistics(architecture.channels, asked)
    if note := choice_note(weights.normalization, asked):
        print(note)
    # An assumption is not written as if it were known.
    known = to_metadata(statistics) if asked or weights.normalization else {}
    if config.format == "timm":
        timm_model = find_family(architecture.family).to_timm(encoder_tensors(weights, domain), architecture)
        tensors, arguments = timm_model.tensors, timm_model.arguments
        metadata = {"format": "pt", "timm": json.dumps(arguments), "class": timm_model.path, "code": timm_model.code}
        hint = f"\n{timm_model.code}\nmodel.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
        hint += f"\nimages in [0, 1], then mean {statistics[0]}, std {statistics[1]}"
    else:
        tensors = weights.tensors
        written = weights.config or {"model": {"options": option_texts(architecture.options)}}
        metadata = {"format": "mimir_fast", "config": json.dumps(written)}
        hint = f"{python_command()} -m mimir_fast.finetune --init {path}"
        if "head.weight" in tensors:
            hint = f"{python_command()} -m mimir_fast.evaluate --checkpoint {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + PARTIAL)  # the source may be mapped from where the result goes
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside, metadata=metadata | known)
        move(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{weights.origin}\n  -> {path}: {len(tensors)} tensors, format {config.format}\nuse: {hint}")
    return path


def main() -> None:
    """The command: export what the line names."""
    load_extensions(sys.argv[1:])
    export(parse(ExportConfig, sys.argv[1:], prog="python -m mimir_fast.export"))


if __name__ == "__main__":
    run(main)
