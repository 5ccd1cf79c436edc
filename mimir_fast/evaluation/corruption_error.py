"""What a benchmark of common corruptions comes to: mean errors, and what they are the mean of.

    CE_c          Σ_s E_{s,c} / Σ_s E_{s,c}(AlexNet)                          mCE: its mean over 15 corruptions c
    relative CE_c Σ_s (E_{s,c} − E) / Σ_s (E_{s,c}(AlexNet) − E(AlexNet))     E: the error without corruption

Hendrycks & Dietterich, arXiv 1903.12261, §4.2 and Table 1. Both are of ImageNet-C and nothing else: for other images no
error of AlexNet is published, and their mean error is not normalised.
"""

from collections.abc import Collection

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
# AlexNet's top-1 errors, the yardstick: under each corruption, and without one; percent.
ALEXNET_ERROR = dict(zip(
    CORRUPTIONS, (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7), strict=True
))  # fmt: skip
ALEXNET_CLEAN = 43.5

Errors = dict[str, dict[int, float]]
"""Corruption → severity → top-1 error, 0 … 1."""


def is_whole(error: Errors) -> bool:
    """Whether these are all corruptions of the benchmark at all severities."""
    return set(error) == set(CORRUPTIONS) and all(set(levels) == set(SEVERITIES) for levels in error.values())


def mean_error(levels: dict[int, float]) -> float:
    """Of one corruption over its severities."""
    return sum(levels.values()) / len(levels)


def mean_corruption_error(error: Errors) -> float | None:
    """mCE in percent, relative to AlexNet's, from all 15 ImageNet-C corruptions; else None."""
    if not is_whole(error):
        return None
    return sum(100 * 100 * mean_error(error[name]) / ALEXNET_ERROR[name] for name in CORRUPTIONS) / len(CORRUPTIONS)


def relative_corruption_error(error: Errors, clean: float) -> float | None:
    """Relative mCE in percent: by how much more the error grows than AlexNet's does; None as for mCE.

    Args:
        clean: error without corruption, 0 … 1.
    """
    if not is_whole(error):
        return None
    ratios = [
        100 * (mean_error(error[name]) - clean) / (ALEXNET_ERROR[name] - ALEXNET_CLEAN) for name in CORRUPTIONS
    ]  # fmt: skip
    return 100 * sum(ratios) / len(ratios)


def share_of(corruptions: Collection[str]) -> str:
    """How many of the benchmark's corruptions a mean is of, in words."""
    return f"{len(corruptions)} of {len(CORRUPTIONS)} corruptions"


def mean_of(error: Errors) -> str:
    """What a mean is of, in words: how many of the benchmark's corruptions, at which severities."""
    levels = {tuple(sorted(found)) for found in error.values()}
    severities = f"severities {' '.join(map(str, min(levels)))}" if len(levels) == 1 else "different severities"
    return f"{share_of(error)}, {severities}" + ("" if is_whole(error) else ": not the benchmark's mean")
