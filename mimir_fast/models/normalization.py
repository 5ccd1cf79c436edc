"""What is subtracted from and divided out of images in [0, 1] before the first layer, inside the classifier."""

from typing import Literal

NormalizationName = Literal["none", "half", "imagenet"]

# name: (mean, std). `none` is how our pre-training and the authors' feed the encoder.
NORMALIZATIONS: dict[NormalizationName, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
