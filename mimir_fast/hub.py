"""Models on the Hugging Face Hub: put there from a run, taken from there, with a model card.

python -m mimir_fast.hub runs/digits/pgd_vit_nano --output hub/robust_digits     # look at it first
python -m mimir_fast.hub runs/digits/pgd_vit_nano --repo_id you/robust_digits    # after `hf auth login`

    from mimir_fast.hub import HubClassifier
    model = HubClassifier.from_pretrained("you/robust_digits")    # or a local folder; a Classifier in eval mode

A folder holds model.safetensors (which --init and --checkpoint of our commands take as it is), config.json (without any
path of the machine it was trained on) and README.md, the card.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import tyro
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import nn

from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.cli import parse, run
from mimir_fast.evaluation.comparison import find_results
from mimir_fast.evaluation.results import Results
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.hub_card import card, public_config
from mimir_fast.models.asking import SourceOptions
from mimir_fast.models.classifier import Classifier, classifier_of
from mimir_fast.models.facts import Asked
from mimir_fast.models.families import describe
from mimir_fast.models.file_names import to_files
from mimir_fast.models.identify import infer_architecture, record_of
from mimir_fast.models.load_report import LoadReport
from mimir_fast.models.masked_loading import masked_model_of
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.models.normalization import Statistics, choice_note, to_metadata
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights
from mimir_fast.sizes import said
from mimir_fast.training.ownership import is_run
from mimir_fast.validation import without

LICENSE = "apache-2.0"
CARD_MARK = "library_name: mimir_fast"
"""Stands in the header of every card of ours."""
KEPT = ("attacks", "robust", "tried", "norm", "eps_text")
"""Of the accuracies, those that a card shows or that say what it may show."""
Model = TypeVar("Model", bound=nn.Module)


class _OnTheHub(ModelHubMixin):
    """What both kinds of model share: `from_run`, and the mixin's saving, loading and card.

    Attributes:
        run_config: the configuration the weights were trained with, {} where it is not known.
        results: of an evaluation, for the card; may be set by hand.
        outline: the architecture in words.
        statistics: the (mean, std) inside the model, None where the weights did not say.
        report: what became of the file of weights.
    """

    kind: ClassVar[str]
    run_config: dict[str, Any]
    results: Results | None
    outline: str
    statistics: Statistics | None
    report: LoadReport

    @classmethod
    def from_run(
        cls, source: str | Path, which: WeightsChoice = "auto", results: str | Path | None = None, *, part: str = "",
        asked: Asked | None = None, statistics: Statistics | None = None,
    ) -> Self:  # fmt: skip
        """The model of a run, with what is known of it, ready for `save_pretrained` and `push_to_hub`.

        Args:
            source: a run or checkpoint folder, a .safetensors or .pth file, timm:NAME.
            which: `model`, `ema`, or `auto` for the moving average where there is one.
            results: results.json of an evaluation; the run's newest if there is one and this is None.
            part: which of several encoders in a file.
            asked: what the user says of a file.
            statistics: (mean, std) to normalise by, in place of what the weights say.
        Raises:
            WeightsError: unreadable, or a model of another kind.
            FileNotFoundError, ValueError: `results` is named and is no evaluation of ours.
        """
        return cls.of_weights(read_weights(source, which, part, asked), statistics, _results_of(source, results))

    @classmethod
    def of_weights(cls, weights: Weights, statistics: Statistics | None, results: Results | None) -> Self:
        """The same of weights that have been read, and the results of an evaluation for the card.

        Raises:
            WeightsError: a model of another kind.
        """
        architecture, _ = infer_architecture(weights)
        model, report = cls._load(weights, statistics)
        # As torch's parametrizations do: the same object with more methods, so no weight is copied.
        model.__class__ = cls
        model.report = report
        model.run_config = public_config(record_of(weights, architecture))
        model.outline = (
            f"{describe(architecture)}, patch {architecture.patch_size}, images of {said(architecture.image_size)}"
        )
        known = weights.normalization or statistics
        model.statistics = known and weights.statistics(architecture.channels, statistics)
        model.results = results
        return model

    @classmethod
    def _load(cls, weights: Weights, statistics: Statistics | None) -> tuple[Any, LoadReport]:
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        metadata = {"format": "mimir_fast", "config": json.dumps(self.run_config)}
        if self.statistics is not None:
            metadata |= to_metadata(self.statistics)
        save_tensors(to_files(self, self.state_dict()), save_directory / SAFETENSORS_SINGLE_FILE, metadata)
        (save_directory / CONFIG_NAME).write_text(json.dumps(self.run_config, indent=1) + "\n")
        if self.results is not None:
            (save_directory / "results.json").write_text(json.dumps(_without_paths(self.results), indent=1) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        folder = Path(model_id)
        if folder.is_dir():
            return cls.from_run(folder / SAFETENSORS_SINGLE_FILE, results=_beside(folder / "results.json"))
        known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        path = hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **{name: options[name] for name in known})
        return cls.from_run(path)

    def generate_model_card(self, *args: Any, repo_id: str = "model", license: str = LICENSE, **_: Any) -> ModelCard:
        """The card of this model; `repo_id` and `license` may come in `model_card_kwargs`."""
        return card(self.kind, type(self).__name__, self.outline, self.run_config, self.results, repo_id, license)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write model.safetensors, config.json and README.md into a folder; see huggingface_hub's ModelHubMixin.

        Raises:
            FileExistsError: the folder has files of these names which this method did not write.
        """
        refuse_others_files(Path(save_directory))
        return super().save_pretrained(save_directory, **_named(options, Path(save_directory).name))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload them to `user/name`, after `hf auth login`; see huggingface_hub's ModelHubMixin."""
        return super().push_to_hub(repo_id, **_named(options, repo_id))


class HubClassifier(_OnTheHub, Classifier):
    """A classifier: images (B, C, H, W) in [0, 1], or uint8, to logits (B, K)."""

    kind = "classifier"

    @classmethod
    def _load(cls, weights: Weights, statistics: Statistics | None) -> tuple[Classifier, LoadReport]:
        return classifier_of(weights, statistics=statistics)


class HubMaskedModel(_OnTheHub, MaskedModel):
    """A pre-trained masked autoencoder: encoder, decoder and mask token."""

    kind = "masked autoencoder"

    @classmethod
    def _load(cls, weights: Weights, statistics: Statistics | None) -> tuple[MaskedModel, LoadReport]:
        return masked_model_of(weights, statistics=statistics)


def refuse_others_files(folder: Path) -> None:
    """Raises FileExistsError where saving would replace files that no earlier saving wrote."""
    if folder.is_dir() and CARD_MARK in _text_of(folder / "README.md") and not is_run(folder):
        return
    found = [
        name for name in (SAFETENSORS_SINGLE_FILE, CONFIG_NAME, "README.md", "results.json") if (folder / name).exists()
    ]
    if found:
        what = "is the folder of a run" if is_run(folder) else "was not written by this command"
        raise FileExistsError(f"{folder} {what} and has {', '.join(found)}: choose another --output")


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _named(options: dict[str, Any], name: str) -> dict[str, Any]:
    return options | {"model_card_kwargs": {"repo_id": name} | (options.get("model_card_kwargs") or {})}


def _beside(path: Path) -> Path | None:
    return path if path.is_file() else None


def _results_of(source: str | Path, named: str | Path | None) -> Results | None:
    if named is not None:
        return Results.read(find_results(Path(named)))
    if not Path(source).is_dir():
        return None
    try:
        return Results.read(find_results(Path(source)))
    except (OSError, ValueError):  # never evaluated, or by an older version
        return None


def _without_paths(results: Results) -> dict[str, Any]:
    """What the card shows of it, and where it was made; not where the checkpoint and the data lay."""
    checkpoint = str(results.choices.get("checkpoint", ""))
    accuracy = results.sections["accuracy"]
    public = Results(
        verdicts=results.verdicts,
        choices={"checkpoint": Path(checkpoint).name},
        images={name: results.images[name] for name in ("source", "split", "count", "classes")},
        sections={"accuracy": {name: accuracy[name] for name in KEPT if name in accuracy}},
        notes=results.notes,
        environment=results.environment,
        rows={"markdown": results.rows["markdown"]},
    )
    found: dict[str, Any] = json.loads(json.dumps(public.as_dict()).replace(checkpoint, Path(checkpoint).name))
    return found


@dataclass
class HubConfig(SourceOptions):
    """Put a run's model on the Hugging Face Hub, or into a folder as it would be there, with a model card."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint folder, or any file --init takes."""
    output: str = ""
    """The folder to write; empty writes none."""
    repo_id: str = ""
    """user/name on the Hub, to upload to; needs `hf auth login`. Empty uploads nothing."""
    private: bool = False
    """Make a repository that does not exist yet a private one."""
    results: str | None = None
    """results.json of an evaluation for the card; left out: the run's newest."""
    license: str = LICENSE
    """Of the weights, as the Hub writes it."""
    imports: Imports = ()
    """Module that registers the family of the weights; a run's own are imported unasked."""

    def __post_init__(self) -> None:
        if not self.output and not self.repo_id:
            raise ValueError("name a folder (--output hub/NAME) or a repository (--repo_id you/NAME)")
        super().__post_init__()

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.repo_id, "--repo_id is empty", "private")


def publish(config: HubConfig) -> None:
    """Write the folder, upload, or both.

    Raises:
        WeightsError: the source cannot be read.    OSError: the folder cannot be written, the Hub not be reached.
    """
    kind: type[HubClassifier] | type[HubMaskedModel]
    weights = config.read(config.source)
    _, num_classes = infer_architecture(weights)
    kind = HubMaskedModel if "decoder_pred.weight" in weights.tensors or num_classes is None else HubClassifier
    model = kind.of_weights(weights, config.statistics, _results_of(config.source, config.results))
    print(model.report)
    if note := choice_note(weights.normalization, config.statistics):
        print(note)
    words = {"license": config.license} | ({"repo_id": config.repo_id} if config.repo_id else {})
    if config.output:
        model.save_pretrained(config.output, model_card_kwargs=words)
        named = model.report.origin.replace(config.source, Path(config.source).name)  # no path of this machine
        replace(model.report, origin=named).save(Path(config.output))
        print(f"{config.output}: {', '.join(sorted(path.name for path in Path(config.output).iterdir()))}")
        print(f'use: mimir_fast.hub.{kind.__name__}.from_pretrained("{config.output}")')
    if config.repo_id:
        print(model.push_to_hub(config.repo_id, private=config.private or None, model_card_kwargs=words))


def main() -> None:
    """The command: publish what the line names."""
    load_extensions(sys.argv[1:])
    publish(parse(HubConfig, sys.argv[1:], prog="python -m mimir_fast.hub"))


if __name__ == "__main__":
    run(main)
