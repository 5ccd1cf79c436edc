"""results.json: every number with everything it depends on.

{"format": "mimir_fast.evaluation", "verdicts": {"robustness": {…}, "validity": {…}}, "choices": {…}, "images": {…},
 "sections": {"accuracy": {…}, "autoattack": {…}, "masking": {…}, …}, "environment": {…}, "command": "…", …}
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.data.config import DataConfig
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.html import percent, span
from mimir_fast.evaluation.options import NORM_WORDS
from mimir_fast.evaluation.statistics import Count
from mimir_fast.evaluation.topic import all_topics
from mimir_fast.versions import environment, version_of

FORMAT = "mimir_fast.evaluation"
VERSION = 3
WORST = "worst case"
"""Head of the column of the robust accuracy."""
MUCH = 0.05
"""Share of the images that attacks on a part of them may break beyond the others, at the 95 % interval's lower end."""
PACKAGES = ("pyautoattack", "numpy", "scipy", "robustbench", "safetensors", "pillow")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds something else; names the file.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{path} is no results.json: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no results.json: it holds no JSON object")
    return found


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
        verdicts: `robustness` (how much of it) and `validity` (can it be trusted): {"kind": good, unsure or bad,
            "large": the headline, "text": why}.
        choices: the resolved configuration, preprocessing, weights.
        images: data set, number, indices in the split, unreadable files by path.
        sections: a topic's name → its numbers (topics/NAME.py).
        notes: what the reader must know before believing a number.
        environment: versions, machine, commit.
        command: what to type to repeat it.
        rows: the result as a row of a Markdown and of a LaTeX table.
    """

    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    rows: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The content of results.json."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Save as JSON, in one step."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Load what `write` wrote.

        Raises:
            ValueError: not such a file, or of another version.
        """
        saved = read_object(path)
        if saved.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no results.json of an evaluation")
        version = saved.pop("version")
        if version != VERSION:
            fix = "update mimir-fast" if version > VERSION else "evaluate the model again"
            raise ValueError(f"{path} is version {version}, this code reads version {VERSION}: {fix}")
        return cls(**saved)

    @property
    def clean(self) -> dict[str, Any]:
        """`correct`, `total`, `accuracy` and `interval` without attack."""
        found: dict[str, Any] = self.sections["accuracy"]["attacks"]["natural"]
        return found

    @property
    def ball(self) -> str:
        """Norm and radius, as L∞, ε = 8/255."""
        numbers = self.sections["accuracy"]
        return f"{NORM_WORDS[numbers['norm']]}, ε = {numbers['eps_text']}"

    @property
    def robust(self) -> dict[str, Any]:
        """The same, of images that are correct under every attack that ran on all of them."""
        found: dict[str, Any] = self.sections["accuracy"]["robust"]
        return found

    @property
    def attacked(self) -> bool:
        """Whether an attack ran on all images; else `robust` is without attack, and no robust accuracy."""
        return bool(self.sections["accuracy"].get("tried", True))  # a hub's results.json may not have it

    @property
    def partial(self) -> list[dict[str, Any]]:
        """Counts of those images on which more attacks ran, an entry a set: `stood`, correct under the attacks on all
        images, `correct`, under those of the set too, and what these are: `tried`."""
        found: list[dict[str, Any]] = self.sections["accuracy"]["partial"]
        return found


def birth_certificate() -> dict[str, Any]:
    """Versions, machine and commit, with the packages only evaluation uses."""
    certificate = environment()
    certificate["packages"] |= {package: version_of(package) for package in PACKAGES}
    return certificate


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names one after the other, of many the first and how many more."""
    more = len(names) - most
    return "; ".join(names) if more <= 0 else "; ".join(names[:most]) + f"; and {more} more"


def robustness_verdict(results: Results) -> dict[str, str]:
    """How much robustness: per image, under all attacks that ran on every image; others with their own number."""
    clean, robust = results.clean, results.robust
    share, chance = robust["accuracy"], 1 / results.images["classes"]
    text = f"No attack ran on every image. Natural accuracy: {percent(clean['accuracy'])}. "
    if results.attacked:
        text = (
            f"{robust['correct']} of {robust['total']} images are classified correctly without attack and under every "
            f"attack that ran on all of them ({listed(results.sections['accuracy']['tried'])}; {results.ball}); 95 % "
            f"interval {span(robust['interval'])} %. Natural accuracy: {percent(clean['accuracy'])}. "
        )
    for part in results.partial:
        text += (
            f"On {part['total']} of the images more attacks ran ({listed(part['tried'])}): {part['correct']} of these "
            f"are correct under them too ({percent(part['accuracy'])}, 95 % interval {span(part['interval'])} %), "
            f"{part['stood']} without them. "
        )
    if not results.attacked:
        end = "This says nothing of perturbations that are made to break the model."
        return {"kind": "unsure", "large": "Not attacked", "text": text + end}
    if share <= chance:
        kind, end = "bad", "The robust accuracy is no better than chance."
    elif robust["interval"][0] <= chance:
        kind, end = "unsure", "So few images do not tell the robust accuracy from chance."
    elif share < clean["accuracy"] / 2:
        kind, end = "unsure", "More than half of the natural accuracy is lost under attack."
    elif robust["interval"][0] < clean["accuracy"] / 2:
        kind, end = "unsure", "So few images do not show whether half of the natural accuracy is kept under attack."
    else:
        kind, end = "good", "At least half of the natural accuracy is kept under attack."
    return {"kind": kind, "large": f"{100 * share:.1f} % robust accuracy", "text": text + end}


def overstated(part: Mapping[str, Any]) -> bool:
    """Whether attacks on a part of the images break so many more that the robust accuracy of all is no estimate."""
    return Count(part["stood"] - part["correct"], part["total"]).interval[0] > MUCH


def validity_verdict(results: Results) -> dict[str, str]:
    """Whether the robust accuracy can be trusted: the gradient-masking checks, and which attacks were run."""
    checks = results.sections.get("masking", {}).get("checks", [])
    failed = [check["name"] for check in checks if not check["passed"]]
    found = results.sections.get("autoattack")
    strongest = results.sections.get("strongest", {}).get("complete", False)
    whole = strongest or (found is not None and found["whole"] and found["total"] == found["images"])
    if results.choices.get("sanity", {}).get("batch_difference"):
        return {
            "kind": "bad", "large": "Answers depend on the batch",
            "text": "The model looks at the other images of a batch: the robust accuracy is one of batches of "
            f"{results.choices['batch_size']}, and may be another in others.",
        }  # fmt: skip
    if not results.choices.get("sanity", {}).get("deterministic", True):
        said = (
            f" {len(failed)} of {len(checks)} gradient-masking checks failed ({'; '.join(failed)})." if failed else ""
        )
        return {
            "kind": "bad", "large": "Answers are random",
            "text": "Every attack judges an image by one fresh answer of the model, so the robust accuracy over "
            f"{len(results.sections['accuracy']['tried'])} attacks falls by chance alone, and is no bound.{said}",
        }  # fmt: skip
    if not results.clean["correct"]:
        return {
            "kind": "unsure", "large": "Nothing to attack",
            "text": "No image is classified correctly without attack, so no check and no attack had anything to do.",
        }  # fmt: skip
    if failed:
        lower = " The true robust accuracy may be far lower." if results.robust["correct"] else ""
        return {
            "kind": "bad", "large": "Gradient masking suspected",
            "text": f"{len(failed)} of {len(checks)} gradient-masking checks failed: {'; '.join(failed)}.{lower}",
        }  # fmt: skip
    passed = f"All {len(checks)} gradient-masking checks passed. " if checks else "No gradient-masking check was run. "
    if worse := [part for part in results.partial if overstated(part)]:
        counts = "; ".join(
            f"{part['stood'] - part['correct']} of {part['stood']}, of {part['total']} that faced "
            f"{listed(part['tried'])}"
            for part in worse
        )
        return {
            "kind": "bad", "large": "More attacks break far more",
            "text": f"{passed}But of the images that count as robust, attacks that ran on a part of them break many "
            f"({counts}): run these on every image before quoting the robust accuracy.",
        }  # fmt: skip
    if strongest:
        rest = "The strongest attacks ran on every image until it was broken."
    elif found is None:
        known = results.attacked and results.robust["correct"]
        lower = ": the true robust accuracy can only be lower" if known else ""
        rest = f"AutoAttack was not run{lower}."
    elif not found["whole"]:
        rest = f"Of AutoAttack only {found['title']} ran: the rest may break more."
    elif not whole:
        rest = f"{found['title']} ran on {found['total']} of the {found['images']} images, and may break more."
    else:
        rest = f"{found['title']} ran on every image."
    good = bool(checks) and whole
    unmasked = "No sign of gradient masking" + ("" if whole else ", AutoAttack not complete")
    return {
        "kind": "good" if good else "unsure",
        "large": unmasked if checks else "Not checked",
        "text": passed + rest,
    }  # fmt: skip


def conclude(results: Results) -> Results:
    """The results with their verdicts, and as rows of a table; a function of the topics' numbers."""
    results.verdicts = {"robustness": robustness_verdict(results), "validity": validity_verdict(results)}
    results.rows = table_rows(results)
    return results


def table_rows(results: Results) -> dict[str, str]:
    """The result as one row: model, images, ball, natural, every topic's columns, worst case.

    A number in parentheses in the head is of the images the column is of, where these are fewer than all.
    """
    numbers = results.sections["accuracy"]
    name = str(results.choices["checkpoint"])
    columns = [("natural", results.clean["accuracy"])]
    for topic in all_topics():
        for column in topic.columns(results.sections[topic.name]) if topic.name in results.sections else ():
            if column.key != "natural":
                few = f" ({column.total})" if column.total is not None else ""
                columns.append((column.label + few, column.accuracy))
    if results.attacked:
        columns.append((WORST, results.robust["accuracy"]))
    columns += [(f"{WORST} ({part['total']})", part["accuracy"]) for part in results.partial]
    head = ["model", "images", "ball", *(label for label, _ in columns)]
    norm = NORM_WORDS[numbers["norm"]]
    row = [name, str(results.clean["total"]), f"{norm} {numbers['eps_text']}", *(f"{100 * v:.1f}" for _, v in columns)]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), row))
    ball = {"linf": r"\ell_\infty", "l2": r"\ell_2", "l1": r"\ell_1"}[numbers["norm"]]
    plain = name.replace("\\", "/").replace("_", r"\_").replace("&", r"\&")
    tex = [plain, row[1], f"${ball}$ ${numbers['eps_text']}$", *row[3:]]
    latex = "% " + " & ".join(head) + "\n" + " & ".join(tex) + r" \\"
    return {"markdown": markdown, "latex": latex}


def command_of(config: EvaluateConfig) -> str:
    """The command that repeats an evaluation: all that differs from the defaults."""
    words = ["python", "-m", "mimir_fast.evaluate", "--checkpoint", config.checkpoint]

    def add(prefix: str, value: Any, default: Any) -> None:
        for known in fields(value):
            mine, usual = getattr(value, known.name), getattr(default, known.name)
            if known.name in ("checkpoint", "data") or mine == usual or mine is None or known.name == "overwrite":
                continue
            flag = f"--{prefix}{known.name}"
            if known.name == "imports":
                words.extend(word for name in mine for word in ("--import", name))
            elif isinstance(mine, bool):
                words.append(flag if mine else f"--{prefix}no_{known.name}")
            elif isinstance(mine, tuple):
                words.extend([flag, *map(str, mine)])
            elif known.name == "eps":
                words.extend([flag, config.eps_text])
            else:
                words.extend([flag, str(mine)])

    add("", config, type(config)(config.checkpoint))
    add("data.", config.data, DataConfig())
    return shlex.join(words)
