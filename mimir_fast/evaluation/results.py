"""results.json: every number with everything it depends on.

{"format": "mimir_fast.evaluation", "verdict": …, "choices": {…}, "environment": {…}, "images": {…},
 "accuracy": {"natural": {…}, "pgd20": {…}}, "autoattack": {…}, "checks": […], …}
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mimir_fast.evaluation.journal import write_atomically
from mimir_fast.versions import environment, version_of

FORMAT = "mimir_fast.evaluation"
VERSION = 1
PACKAGES = ("pyautoattack", "numpy", "matplotlib", "corrupt-tta", "robustbench")


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
        verdict: the conclusion in plain words, one sentence a line.
        choices: the resolved configuration, preprocessing and attack parameters.
        environment: versions, machine, commit.
        images: data set, number, indices in the split, skipped files.
        accuracy: attack → {"label", "correct", "total", "accuracy", "standard_error", "mean_loss", "parameters",
            "seconds"}.
        autoattack: {"version", "correct", "total", "after", "seconds", "warnings", …}, or None when it was left out.
        checks: gradient-masking verdicts.
        curve: {"eps": […], "accuracy": […], "noise": […]}.
        corruptions: {"kind", "accuracy": {corruption: {severity: …}}, "mean", "mce"}, or None.
        extras: loss surface, MI bounds, reconstruction.
        notes: what the reader must know before believing a number.
    """

    verdict: list[str] = field(default_factory=list)
    choices: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    autoattack: dict[str, Any] | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)
    curve: dict[str, Any] = field(default_factory=dict)
    corruptions: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Save as JSON, in one step."""
        write_atomically(path, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Load what `write` wrote.

        Raises:
            ValueError: not such a file, or of a newer version.
        """
        saved = json.loads(path.read_text())
        if saved.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no results.json of an evaluation")
        version = saved.pop("version")
        if version > VERSION:
            raise ValueError(f"{path} is version {version}, this code reads up to {VERSION}: update mimir-fast")
        return cls(**saved)


def birth_certificate() -> dict[str, Any]:
    """Versions, machine and commit, with the packages only evaluation uses."""
    certificate = environment()
    certificate["packages"] |= {package: version_of(package) for package in PACKAGES}
    return certificate


def headline(results: Results) -> list[str]:
    """The verdict in plain words: accuracies first, then whether to believe them."""
    lines: list[str] = []
    eps = results.choices.get("eps_text", "ε")
    natural = results.accuracy.get("natural")
    attacked = {name: entry for name, entry in results.accuracy.items() if entry.get("bounds_robustness")}
    if natural:
        lines.append(
            f"Without attack the model is right on {100 * natural['accuracy']:.1f} % of {natural['total']} images."
        )
    if results.autoattack:
        entry = results.autoattack
        lines.append(
            f"Under AutoAttack at ε = {eps} it stays right on {100 * entry['accuracy']:.1f} % of {entry['total']}."
        )
    elif attacked:
        worst = min(attacked.values(), key=lambda entry: entry["accuracy"])
        lines.append(
            f"Under the strongest attack tried ({worst['label']}, ε = {eps}) it stays right on "
            f"{100 * worst['accuracy']:.1f} %. AutoAttack was not run: the true robust accuracy can only be lower."
        )
    failed = [check["name"] for check in results.checks if not check["passed"]]
    if failed:
        lines.append(
            f"Do not trust the robust numbers yet: {len(failed)} of {len(results.checks)} checks show signs of hidden "
            f"gradients ({'; '.join(failed)})."
        )
    elif results.checks:
        lines.append(
            f"None of {len(results.checks)} checks shows signs of hidden gradients: the attacks could do their work."
        )
    return lines
