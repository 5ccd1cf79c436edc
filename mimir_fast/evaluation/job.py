"""One evaluation's standing facts: the model, the images, the folder, and how progress is cut over processes.

    OUTPUT_DIR/results.json  report.html    progress/plan.json  progress/<measurement>.<shard>of<shards>.jsonl

The number of shards is fixed by the processes of the first start; later starts deal the same shards to however many
processes there are. All processes must see the same folder.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import ImageSource
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages, load_images
from mimir_fast.evaluation.journal import Journal, fingerprint, write_atomically
from mimir_fast.evaluation.models import JudgedModel, Opaque


@dataclass
class Gathered:
    """A measurement's values over all shards, in the order of the shards: name → (N,) fp64."""

    values: dict[str, Tensor]
    seconds: float


@dataclass
class Job:
    """What every part of an evaluation needs to know.

    Attributes:
        judged: the model, on `device`.
        indices: (N,) positions in the test split.
        identity: what all numbers depend on; JSON-able.
        num_shards: parts the images are cut into; shard k has images k, k + num_shards, …
    """

    config: EvaluateConfig
    judged: JudgedModel
    source: ImageSource
    indices: np.ndarray
    identity: dict[str, Any]
    num_shards: int
    device: torch.device

    @property
    def progress(self) -> Path:
        """Where finished batches are kept."""
        return self.config.folder / "progress"

    def shard(self, number: int) -> EvaluationImages:
        """The images of a shard, decoded."""
        return load_images(self.config.data, self.indices[number :: self.num_shards])

    def path(self, name: str, shard: int, suffix: str = "jsonl") -> Path:
        """The file of a measurement's shard."""
        return self.progress / f"{name}.{shard}of{self.num_shards}.{suffix}"

    def settings(self, parameters: dict[str, Any], images: str = "all") -> dict[str, Any]:
        """Everything a measurement's numbers depend on."""
        return {**self.identity, "images": images, "batch_size": self.config.batch_size, "attack": parameters}

    def gather(self, name: str, parameters: dict[str, Any], images: str = "all") -> Gathered:
        """A finished measurement over all shards."""
        journals = [Journal(self.path(name, k), self.settings(parameters, images)) for k in range(self.num_shards)]
        names = journals[0].values
        values = {value: torch.cat([journal.tensor(value) for journal in journals]) for value in names}
        return Gathered(values, sum(journal.seconds for journal in journals))


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names and bytes of the weights; plain functions show none and cannot be told apart."""
    digest = hashlib.sha256()
    hidden = (part.weights for part in module.modules() if isinstance(part, Opaque))
    named = chain(module.state_dict().items(), *(weights.items() for weights in hidden))
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def identity_of(config: EvaluateConfig, judged: JudgedModel, indices: np.ndarray) -> dict[str, Any]:
    """What all numbers of an evaluation depend on."""
    return {
        "checkpoint": judged.name,
        "weights": weights_digest(judged.module),
        "outputs": config.outputs,
        "data": {"source": config.data.source, "size": config.data.image_size, "channels": config.data.channels},
        "indices": hashlib.sha256(indices.tobytes()).hexdigest()[:16],
        "num_images": len(indices),
    }


def open_folder(config: EvaluateConfig, identity: dict[str, Any], num_shards: int, *, main: bool) -> int:
    """Make the folder ready on the main process; returns the number of shards that holds in it.

    Raises:
        ValueError: the folder holds the evaluation of another model or of other images, or something else.
    """
    progress = config.folder / "progress"
    plan = progress / "plan.json"
    if main:
        if config.overwrite and plan.exists():
            shutil.rmtree(progress)
        if not plan.exists() and config.folder.exists() and any(config.folder.iterdir()) and not config.overwrite:
            raise ValueError(f"{config.folder} is not empty and holds no evaluation of ours: give another --output_dir")
        progress.mkdir(parents=True, exist_ok=True)
        if not plan.exists():
            write_atomically(plan, json.dumps({"num_shards": num_shards, "identity": identity}, indent=1) + "\n")
    barrier()
    saved = json.loads(plan.read_text())
    if fingerprint(saved["identity"]) != fingerprint(identity):
        changed = [name for name in identity if saved["identity"].get(name) != identity[name]]
        listing = "; ".join(f"{name}: {saved['identity'].get(name)} -> {identity[name]}" for name in changed)
        raise ValueError(
            f"{config.folder} holds the evaluation of something else ({listing}); give another --output_dir, or "
            "--overwrite to start anew there"
        )
    return int(saved["num_shards"])


def open_source(config: EvaluateConfig) -> ImageSource:
    """The whole test split; `limit` is applied by choosing positions."""
    return build_source(replace(config.data, limit=None), "test")


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
