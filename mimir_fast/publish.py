"""The command `python -m mimir_fast.hub`: a run's model onto the Hugging Face Hub, or into a folder like one."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from mimir_fast._tyro import tyro
from mimir_fast.cli import parse
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.hub_models import LICENSE, HubClassifier, HubMaskedModel, results_of
from mimir_fast.models.asking import SourceOptions
from mimir_fast.models.identify import infer_architecture
from mimir_fast.models.normalization import choice_note
from mimir_fast.validation import without


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
    model = kind.of_weights(weights, config.statistics, results_of(config.source, config.results))
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
