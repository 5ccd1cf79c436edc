"""Does a representation still know what it should have forgotten? An independence test with a p-value.

    python examples/independence.py

Digits are recorded by two devices, one of which adds an offset to every pixel. Features that keep the device, that are
normalised per image, and labels that never had to do with it, are each tested against the device with `hsic_test`
(Gretton et al., "A kernel statistical test of independence", NIPS 2007). Correlation would not do: the second example
is uncorrelated and dependent.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from mimir_fast import hsic_test


def main(num_permutations: int = 500) -> dict[str, float]:
    """Print a table; name → p-value."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data[:600] / 16).float()
    labels = F.one_hot(torch.tensor(digits.target[:600])).float()
    device = torch.randint(0, 2, (600,), generator=generator)
    recorded = images + 0.05 * device[:, None]
    one_hot = F.one_hot(device).float()  # classes enter a kernel as one-hot vectors

    angle = 2 * torch.pi * torch.rand(600, generator=generator)
    x, y = angle.cos(), angle.sin()
    correlation = float(torch.corrcoef(torch.stack([x, y]))[0, 1])

    pairs = {
        "pixels, device": (recorded, one_hot),
        "pixels normalised per image, device": (F.normalize(recorded - recorded.mean(1, keepdim=True)), one_hot),
        "label, device": (labels, one_hot),
        "pixels, label": (images, labels),
        f"cos, sin of an angle (correlation {correlation:.2f})": (x, y),
    }
    p_values = {}
    for name, pair in pairs.items():
        result = hsic_test(*pair, num_permutations=num_permutations)
        p_values[name.split(" (")[0]] = float(result.p_value)
        verdict = "dependent" if result.p_value < 0.01 else "no sign of dependence"
        print(f"{name:55} HSIC {float(result.statistic):.2e}  p {float(result.p_value):.3f}  {verdict}")
    return p_values


if __name__ == "__main__":
    main()
