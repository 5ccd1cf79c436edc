"""Writes hyppo.json: what hyppo's Hsic (https://hyppo.neurodata.io) says of small data sets, for test_independence.py.

    python -m venv aside && aside/bin/pip install hyppo==0.5.2 && aside/bin/python tests/golden/independence/make.py

hyppo is not a dependency of the tests: it pins nothing of ours, but brings numba.
"""

import json
from pathlib import Path

import hyppo
import numpy as np
from hyppo.independence import Hsic

REPS = 10_000


def data(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of 50."""
    x = rng.normal(size=(50, 2))
    if name == "independent":
        return x, rng.normal(size=(50, 3))
    if name == "weak":
        return x, 0.7 * x[:, :1] + rng.normal(size=(50, 1))
    angle = rng.uniform(0, 2 * np.pi, size=(50, 1))  # uncorrelated, and yet dependent
    return np.cos(angle) + 0.2 * rng.normal(size=(50, 1)), np.sin(angle) + 0.2 * rng.normal(size=(50, 1))


def main() -> None:
    """Statistics and p-values; gamma is given, because hyppo takes that of x for y, too."""
    cases = []
    for name in ("independent", "weak", "circle"):
        x, y = (z.round(4) for z in data(name, np.random.default_rng(7)))
        sigma = 1.25
        found = {}
        for kind, bias in (("biased", True), ("unbiased", False)):
            test = Hsic(compute_kernel="rbf", bias=bias, gamma=1 / (2 * sigma**2))
            statistic = test.statistic(x, y)
            np.random.seed(0)
            _, p_value = test.test(x, y, reps=REPS, auto=False)
            found[kind] = {"statistic": float(statistic), "p_value": float(p_value)}
        cases.append({"name": name, "x": x.tolist(), "y": y.tolist(), "sigma": sigma, **found})
    made = {"made_by": f"hyppo {hyppo.__version__}, numpy {np.__version__}", "reps": REPS, "cases": cases}
    Path(__file__).with_name("hyppo.json").write_text(json.dumps(made) + "\n")
    for case in cases:
        print(case["name"], case["biased"], case["unbiased"])


if __name__ == "__main__":
    main()
