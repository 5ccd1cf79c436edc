"""RobustBench's claim form for finished evaluations: its issue "New Model(s)" and the JSON files of its `model_info`.

    claim.md                              the issue
    model_info/DATA/THREAT/NAME.json      one leaderboard entry a model and threat model

Both have what an evaluation knows. What only the authors know is left as a blank in angle brackets: a form with a guess
in it would be believed. Forms: github.com/RobustBench/robustbench, .github/ISSUE_TEMPLATE/new-model.md and README.md
("Adding a new model"), commit 78fcc9e48a07.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimir_fast.evaluation.comparison import PUBLISHED, Evaluation
from mimir_fast.evaluation.options import NORM_NAMES
from mimir_fast.evaluation.results import listed
from mimir_fast.models.families import all_families

BALLS = {
    ("cifar10", "Linf"): "8/255", ("cifar10", "L2"): "0.5", ("cifar100", "Linf"): "8/255", ("imagenet", "Linf"): "4/255"
}  # fmt: skip
"""Leaderboards of perturbations → their ε."""
IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5000}
"""Data of the leaderboards → how many images they are of."""
CORRUPTIONS = "corruptions"
PAPER = {"link": "<paper URL>", "name": "<paper title>", "authors": "<paper authors>"}
ZOO = """# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [ ] I use an architecture that is included among those
  [here](https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures) or in `timm`. If
  not, I added the link to the architecture implementation so that it can be added.
- [ ] I agree to release my model(s) under MIT license (check if true) **OR** under a custom license, located here:
  <URL of the license>
"""


@dataclass
class Claim:
    """An entry of a leaderboard.

    Attributes:
        name: of its file; RobustBench's form is <Name><Year><FirstWordOfTheTitle>.
        threat: Linf, L2 or corruptions.
        info: the JSON file.
        method: how it was evaluated, in words.
        notes: what stands between it and the leaderboard.
    """

    name: str
    threat: str
    info: dict[str, Any]
    method: str
    weights: str
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Of the JSON file, from the folder of the claim."""
        return Path("model_info") / self.info["dataset"] / self.threat / f"{self.name}.json"

    @property
    def robust(self) -> str:
        """The claimed accuracy, in per cent, or a blank."""
        found: str = self.info["corruptions_acc" if self.threat == CORRUPTIONS else "autoattack_acc"]
        return found


def claims_of(evaluation: Evaluation) -> list[Claim]:
    """What an evaluation can claim: robustness to perturbations, to common corruptions, or both.

    Raises:
        ValueError: RobustBench has no leaderboard for its data, norm and corruptions.
    """
    results, found = evaluation.results, list[Claim]()
    data, threat = results.images["source"], NORM_NAMES[results.sections["accuracy"]["norm"]]
    if results.attacked and (data, threat) in BALLS:
        found.append(_perturbed(evaluation, threat))
    corrupted = results.sections.get(CORRUPTIONS, {}).get("accuracy")
    if corrupted and data in IMAGES:
        found.append(_corrupted(evaluation))
    if not found:
        known = ", ".join(f"{name} {ball}" for name, ball in BALLS)
        raise ValueError(
            f"{evaluation.name}: RobustBench has no leaderboard for {data}, {threat} and what was measured there; it "
            f"has {known}, and published common corruptions of {', '.join(IMAGES)}"
        )
    return found


def _perturbed(evaluation: Evaluation, threat: str) -> Claim:
    results = evaluation.results
    numbers, attack = results.sections["accuracy"], results.sections.get("autoattack")
    claim = _claim(evaluation, threat, numbers["eps_text"])
    wanted = BALLS[results.images["source"], threat]
    if numbers["eps_text"] != wanted:
        claim.notes.append(f"ε is {numbers['eps_text']}, that of the leaderboard {wanted}.")
    if attack and attack["whole"] and attack["version"] == "standard" and attack["total"] == attack["images"]:
        claim.info["reported"] = claim.info["autoattack_acc"] = _percent(attack["accuracy"])
        package = results.environment["packages"]["pyautoattack"]
        claim.method = f"AutoAttack, version standard (pyautoattack {package}), {claim.method}"
    else:
        claim.info["reported"] = claim.info["autoattack_acc"] = "<accuracy under AutoAttack, per cent>"
        claim.method = f"<AutoAttack was not run on every image>, {claim.method}"
        claim.notes.append("AutoAttack, version standard, did not run on every image: evaluate with --autoattack yes.")
    others = [name for name in numbers["tried"] if not attack or name != attack["title"]]
    if attack and others and results.robust["accuracy"] < attack["accuracy"]:
        external = _percent(results.robust["accuracy"])
        claim.info |= {"external": external, "footnote": f"{external}% robust accuracy with {listed(others)} as well."}
    if results.verdicts["validity"]["kind"] == "bad":
        claim.notes.append(results.verdicts["validity"]["text"])
    return claim


def _corrupted(evaluation: Evaluation) -> Claim:
    found = evaluation.results.sections[CORRUPTIONS]
    claim = _claim(evaluation, CORRUPTIONS, None)
    claim.info["reported"] = claim.info["corruptions_acc"] = _percent(found["mean"])
    if found["mce"] is not None:
        claim.info["corruptions_mce"] = f"{found['mce']:.2f}"
        claim.notes.append(
            "corruptions_mce is relative to AlexNet's published errors; RobustBench divides by those on its own 5000 "
            "images, which differ by up to 0.7 points."
        )
    claim.method = f"mean accuracy of {found['mean_of']}, {claim.method}"
    if found["kind"] == "generated":
        claim.notes.append("The corruptions were generated, and are not the published ones of the leaderboard.")
    if "not the benchmark" in found["mean_of"]:
        claim.notes.append(f"The leaderboard wants the whole benchmark: the mean is of {found['mean_of']}.")
    return claim


def _claim(evaluation: Evaluation, threat: str, eps: str | None) -> Claim:
    """The parts that claims of all threat models have in common."""
    results, choices = evaluation.results, evaluation.results.choices
    data, count = results.images["source"], results.images["count"]
    passes = 1 if choices["model_kind"] in ("mimir_fast", "timm") and choices["sanity"]["deterministic"] else None
    info = {
        **PAPER, "additional_data": "<true or false>",
        "number_forward_passes": passes or "<passes through a network that an answer takes>", "dataset": data,
        "venue": "<venue and year>", "architecture": architecture_of(choices), "eps": eps,
        "clean_acc": _percent(results.clean["accuracy"]),
    }  # fmt: skip
    packages = results.environment["packages"]
    method = f"{count} test images, fp32, seed {choices['seed']}, mimir-fast {packages['mimir-fast']}"
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(str(choices["checkpoint"])).name) or "model"
    claim = Claim(name, threat, info, method, str(choices["weights_sha256"]))
    if count != IMAGES[data]:
        hint = " (--index_file robustbench)" if data == "imagenet" else ""
        claim.notes.append(f"It was evaluated on {count} images, the leaderboard is of {IMAGES[data]}{hint}.")
    elif data == "imagenet" and choices["index_file"] != "robustbench":
        claim.notes.append("The leaderboard is of a list of its own images (--index_file robustbench).")
    if not choices["sanity"]["deterministic"]:
        claim.notes.append("The answers are random: RobustBench wants models that are deterministic.")
    return claim


def architecture_of(choices: dict[str, Any]) -> str:
    """What is known of it: a run's config.json, the name of a timm model, RobustBench's own word; else a blank."""
    spec = str(choices["checkpoint"])
    scheme, _, name = spec.partition(":")
    if scheme in ("timm", "hf-hub"):
        return name.partition("@")[0]
    if scheme == "robustbench":
        last = name.rpartition("/")[2]
        known = json.loads(PUBLISHED.read_text())["models"]
        return next((str(model["architecture"]) for model in known if model["name"] == last), "<architecture>")
    if (config := Path(spec) / "config.json").is_file():
        model = json.loads(config.read_text()).get("model", {})
        if {"family", "encoder", "patch_size"} <= model.keys():
            family = all_families().get(model["family"])
            return f"{family.title if family else model['family']}-{model['encoder']}/{model['patch_size']}"
    return "<architecture>"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def issue(claims: Sequence[Claim]) -> str:
    """The text of the issue; the notes stand in a comment, which GitHub does not show."""
    parts = [
        "<!-- Title: [New Model] <Name><Year><FirstWordOfTheTitle>. Fill in what is in angle brackets. -->\n",
        "# Paper Information\n",
        "\n".join(
            f"- **Paper {label}**: {PAPER[key]}"
            for label, key in (("Title", "name"), ("URL", "link"), ("authors", "authors"))
        ) + "\n",
        "# Leaderboard Claim(s)\n",
    ]  # fmt: skip
    for number, claim in enumerate(claims, 1):
        info = claim.info
        fields = {
            "Architecture": info["architecture"],
            "Dataset": info["dataset"],
            "Threat Model": "Common Corruptions" if claim.threat == CORRUPTIONS else claim.threat,
            "eps": info["eps"] or "N/A",
            "Clean accuracy": info["clean_acc"],
            "Robust accuracy": claim.robust,
            "Additional data": info["additional_data"],
            "Evaluation method": claim.method,
            "Checkpoint and code": f"<URL of the checkpoint and of the code> (weights: {claim.weights})",
        }
        lines = [f"- **{label}**: {value}" for label, value in fields.items()]
        parts.append(f"## Model {number}\n\n" + "\n".join(lines) + "\n")
        if claim.notes:
            parts.append("<!-- Before this is sent:\n" + "\n".join(f"- {note}" for note in claim.notes) + "\n-->\n")
    return "\n".join([*parts, ZOO])
