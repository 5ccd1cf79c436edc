"""What is exported: a classifier or an encoder out of weights, as a function of images in [0, 1].

Shapes: B images, C channels, H = W pixels, K classes, T = prefix + N tokens, D width.
"""

from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import SUFFIX, is_adapter
from mimir_fast.models.classifier import Classifier, load_classifier
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.families import Architecture, build_encoder
from mimir_fast.models.file_names import DECODER
from mimir_fast.models.identify import infer_architecture
from mimir_fast.models.loading import fill
from mimir_fast.models.normalization import Normalizer, Statistics, to_metadata
from mimir_fast.models.weight_files import Weights, WeightsError
from mimir_fast.ops.patches import patchify
from mimir_fast.sizes import height_width

Domain = Literal["clean", "adversarial"]


class Tokens(nn.Module):
    """A pre-trained encoder on whole images, with the normalisation in front."""

    def __init__(self, encoder: Encoder, statistics: Statistics) -> None:
        super().__init__()
        self.encoder, self.normalizer = encoder, Normalizer(statistics)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, T, D) after the encoder's norm: the cls token first where there is one, then patches in raster order."""
        return self.encoder(patchify(self.normalizer(images_BCHW), self.encoder.mask_unit), None)


class Original:
    """Weights, and the function of images that they stand for.

    Args:
        weights: as `read_weights` gave them.
        domain: of weights with adapters (AEMIM), whose norms and cls token.
        asked: (mean, std) to normalise by, in place of what the weights say.
    Raises:
        WeightsError: the adversarial domain is asked for and the weights have no adapters.
    """

    def __init__(self, weights: Weights, domain: Domain = "clean", asked: Statistics | None = None) -> None:
        self.weights, self.asked = weights, asked
        adapters = {n.removesuffix(SUFFIX): t for n, t in weights.tensors.items() if is_adapter(n)}
        if domain == "adversarial" and not adapters:
            raise WeightsError(f"{weights.origin} has no adapters for adversarial images: leave --domain out")
        plain = {n: t for n, t in weights.tensors.items() if not is_adapter(n)}
        self.tensors: dict[str, Tensor] = plain | adapters if domain == "adversarial" else plain
        """Of this domain, under the names of files, decoder and all."""

    @property
    def without_decoder(self) -> dict[str, Tensor]:
        """The tensors of encoder and head."""
        return {n: t for n, t in self.tensors.items() if not n.startswith(DECODER)}

    @property
    def plain_weights(self) -> Weights:
        """The weights of this domain, decoder and all."""
        return replace(self.weights, tensors=self.tensors)

    @cached_property
    def architecture(self) -> Architecture:
        """Of the encoder; raises WeightsError where it is none of ours."""
        return infer_architecture(self.weights)[0]

    @property
    def num_classes(self) -> int | None:
        """Of the head; None for an encoder."""
        head = self.tensors.get("head.weight")
        return None if head is None else len(head)

    @property
    def output(self) -> str:
        """The name of what comes out."""
        return "tokens" if self.num_classes is None else "logits"

    @cached_property
    def statistics(self) -> Statistics:
        """(mean, std) that is taken out of images in [0, 1], inside the model."""
        return self.weights.statistics(self.architecture.channels, self.asked)

    @property
    def known_statistics(self) -> dict[str, str]:
        """As a file's metadata; {} where they are an assumption, which is not written as if it were known."""
        return to_metadata(self.statistics) if self.asked or self.weights.normalization else {}

    @cached_property
    def model(self) -> Classifier | Tokens:
        """In eval mode: images (B, C, H, W) in [0, 1] to logits (B, K), or to tokens (B, T, D) without a head."""
        weights = replace(self.weights, tensors=self.without_decoder)
        if self.num_classes is not None:
            return load_classifier(weights, statistics=self.asked)
        with torch.random.fork_rng([]):
            encoder = build_encoder(self.architecture)
        fill(encoder, weights, whole=True)
        return Tokens(encoder, self.statistics).eval()

    def images(self, batch: int) -> Tensor:
        """(B, C, H, W) random ones in [0, 1], the same ones each time."""
        size, generator = self.architecture.image_size, torch.Generator().manual_seed(batch)
        return torch.rand(batch, self.architecture.channels, *height_width(size), generator=generator)
