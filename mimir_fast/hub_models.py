"""Models with the methods of the Hugging Face Hub: from a run, to and from a folder or a repository.

A folder holds model.safetensors (which --init and --checkpoint of our commands take as it is), config.json (by which
timm and transformers build a classifier; without any path of the machine it was trained on) and README.md, the card.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import nn

from mimir_fast.checkpoints.reading import refuse_checkpoints
from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.exporting.timm_hub import timm_config
from mimir_fast.hub_config import public_config
from mimir_fast.models.classifier import Classifier, classifier_of
from mimir_fast.models.facts import Asked
from mimir_fast.models.families import Architecture, describe
from mimir_fast.models.file_names import to_files
from mimir_fast.models.identify import infer_architecture, record_of
from mimir_fast.models.load_report import LoadReport
from mimir_fast.models.masked_loading import masked_model_of
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.models.normalization import Statistics, to_metadata
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights
from mimir_fast.sizes import said
from mimir_fast.training.ownership import is_run

# What reads evaluations and parses command lines is imported where it is needed: loading a model needs neither.
if TYPE_CHECKING:
    from mimir_fast.evaluation.results import Results

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
        architecture: of the encoder.
        report: what became of the file of weights.
    """

    kind: ClassVar[str]
    run_config: dict[str, Any]
    results: "Results | None"
    outline: str
    statistics: Statistics | None
    architecture: Architecture
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
        return cls.of_weights(read_weights(source, which, part, asked), statistics, results_of(source, results))

    @classmethod
    def of_weights(cls, weights: Weights, statistics: Statistics | None, results: "Results | None") -> Self:
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
        model.architecture = architecture
        model.statistics = known and weights.statistics(architecture.channels, statistics)
        model.results = results
        return model

    @classmethod
    def _load(cls, weights: Weights, statistics: Statistics | None) -> tuple[Any, LoadReport]:
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        metadata = {"format": "pt", "made_by": "mimir_fast", "config": json.dumps(self.run_config)}
        if self.statistics is not None:
            metadata |= to_metadata(self.statistics)
        save_tensors(to_files(self, self.state_dict()), save_directory / SAFETENSORS_SINGLE_FILE, metadata)
        config = self.timm_config() | {"mimir_fast": self.run_config}
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
        if self.results is not None:
            (save_directory / "results.json").write_text(json.dumps(_without_paths(self.results), indent=1) + "\n")

    def timm_config(self) -> dict[str, Any]:
        """The part of config.json by which timm and transformers load the folder; {} where they cannot."""
        if self.kind != HubClassifier.kind:
            return {}
        assert isinstance(self, nn.Module)
        augment = (self.run_config.get("data") or {}).get("augment")
        return timm_config(to_files(self, self.state_dict()), self.architecture, self.statistics, augment)

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
        from mimir_fast.hub_card import card

        names = self.kind, type(self).__name__, self.outline
        return card(*names, self.run_config, self.results, repo_id, license, self.timm_config())

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
    """Raises FileExistsError where saving would replace files that no earlier saving wrote, or damage a checkpoint."""
    refuse_checkpoints(folder)
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


def results_of(source: str | Path, named: str | Path | None) -> "Results | None":
    """Those named, else the newest of a run's folder; None for none."""
    if named is None and not Path(source).is_dir():
        return None
    from mimir_fast.evaluation.comparison import find_results
    from mimir_fast.evaluation.results import Results

    if named is not None:
        return Results.read(find_results(Path(named)))
    try:
        return Results.read(find_results(Path(source)))
    except (OSError, ValueError):  # never evaluated, or by an older version
        return None


def _without_paths(results: "Results") -> dict[str, Any]:
    """What the card shows of it, and where it was made; not where the checkpoint and the data lay."""
    from mimir_fast.evaluation.results import Results

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
