"""Take a model out of a run: for timm, transformers, ONNX, torch.export, TorchScript, DCP, or as a safetensors file.

python -m mimir_fast.export runs/digits/mimir_vit_nano --format timm --output encoder.safetensors
python -m mimir_fast.export runs/digits/pgd_vit_nano --format onnx --output robust.onnx
python -m mimir_fast.export runs/digits/pgd_vit_nano --format hf --output hub/robust

Of a fine-tuned run the whole classifier, images in [0, 1] to logits, with the normalisation inside; of a pre-training
run the encoder, images to tokens (`hf`: a ViT's decoder too). Nothing is written before it was read back by the
format's own library and gave what the original gives, on random images in batches of another size than it was recorded
with. `safetensors` and `dcp` hold all weights and the configuration; `--init` and `--checkpoint` of our commands take
both.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mimir_fast._tyro import tyro
from mimir_fast.checkpoints.durable import PARTIAL, move, remove, sync
from mimir_fast.checkpoints.reading import refuse_checkpoints
from mimir_fast.cli import parse, run
from mimir_fast.exporting.compare import BATCHES, TOLERANCE
from mimir_fast.exporting.formats import FORMATS, Format
from mimir_fast.exporting.original import Domain, Original
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.layers.norms import is_adapter
from mimir_fast.models.asking import SourceOptions
from mimir_fast.models.loading import inspect_weights
from mimir_fast.models.normalization import choice_note
from mimir_fast.validation import without


@dataclass
class ExportConfig(SourceOptions):
    """Write a run's model as a file, or a folder, of another library."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint folder, or any file --init takes."""
    output: str
    """The file to write, .safetensors, .onnx, .pt2 or .ts after its format; for hf and dcp a folder."""
    format: str = "timm"
    """`timm`: for timm's class. `hf`: a folder for transformers. `onnx`, `pt2` (torch.export), `torchscript`: a program
    for any number of images in [0, 1]. `safetensors`: all weights, for our own commands. `dcp`: the same as a folder of
    torch.distributed.checkpoint."""
    domain: Literal["", "clean", "adversarial"] = ""
    """Of weights with adapters (AEMIM), whose norms and cls token; clean when not said. safetensors, dcp: both."""
    overwrite: bool = False
    """Replace an existing file, or a folder of the format's files."""
    imports: Imports = ()
    """Module that registers the family of the weights; a run's own are imported unasked."""

    def __post_init__(self) -> None:
        FORMATS.find(self.format).check_name(Path(self.output))
        super().__post_init__()

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(not FORMATS.find(self.format).keeps_all, f"--format {self.format} keeps both", "domain")


def export(config: ExportConfig) -> Path:
    """Write the file or folder and return its path.

    Raises:
        WeightsError: the source cannot be read or is no encoder of ours.
        FileExistsError: it exists and `overwrite` is off, or is not ours to replace.
        ImportError: a package of the format is missing.
        ValueError: the format has no place for this model, or what was written is another function.
    """
    form, path = FORMATS.find(config.format), Path(config.output)
    form.check_installed()
    _check_free(form, path, config.overwrite)
    weights = config.read(config.source)
    domain: Domain = config.domain or "clean"
    if not config.domain and not form.keeps_all and any(is_adapter(name) for name in weights.tensors):
        print(
            "these weights keep their norms for clean and for adversarial images: the clean ones are exported "
            "(--domain adversarial for the others)"
        )
    _, report = inspect_weights(weights)
    print(report)
    if note := choice_note(weights.normalization, config.statistics):
        print(note)
    original = Original(weights, domain, config.statistics)
    largest = _write(form, original, path)
    same = "its tensors are the original's"
    if not form.keeps_all:
        batches = " and ".join(map(str, BATCHES))
        same = f"its {original.output} are the original's up to {largest:.1e} of the largest (batches of {batches})"
    print(f"{weights.origin}\n  -> {path} written, format {form.name}: {same}\nuse: {form.use(original, path)}")
    return path


def _check_free(form: Format, path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another --output, or --overwrite")
    refuse_checkpoints(path.parent)
    if path.is_dir() and form.suffix:
        raise FileExistsError(f"{path} is a folder: choose another --output")
    if path.is_file() and not form.suffix:
        raise FileExistsError(f"{path} is a file, and --format {form.name} writes a folder: choose another --output")
    if path.is_dir() and (inside := {inside.name for inside in path.iterdir()}):
        if others := inside - form.holds:
            raise FileExistsError(f"{path} holds {', '.join(sorted(others)[:3])} too: choose another --output")
        if not form.wrote(path):
            raise FileExistsError(
                f"{path} was not written by this command (or by an older one): choose another --output, or delete it"
            )


def _write(form: Format, original: Original, path: Path) -> float:
    """Aside, since the source may be mapped from where the result goes; there only once it was compared."""
    new = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    room = path.with_name(path.name + PARTIAL)
    remove(room)
    try:
        room.mkdir()
        aside = room / path.name
        largest = form.write(original, aside)
        if not largest <= TOLERANCE:
            raise ValueError(
                f"--format {form.name}: what was written differs from the original by {largest:.1e} of its largest "
                f"output (up to {TOLERANCE} is rounding), so it is deleted"
            )
        for file in [aside] if aside.is_file() else aside.iterdir():
            sync(file)
        if path.is_dir():
            remove(path)
        move(aside, path)
    except BaseException:
        remove(room)
        with suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise
    remove(room)
    return largest


def main() -> None:
    """The command: export what the line names."""
    load_extensions(sys.argv[1:])
    export(parse(ExportConfig, sys.argv[1:], prog="python -m mimir_fast.export"))


if __name__ == "__main__":
    run(main)
