"""Compare models from finished evaluations, or from finished probings.

python -m mimir_fast.compare runs/a runs/b evaluation/of/c --output comparison
python -m mimir_fast.compare runs/a/probing runs/b/probing
python -m mimir_fast.compare runs/a --format robustbench --output claim
python -m mimir_fast.compare --help

Writes comparison/comparison.html and comparison.md; differences are paired, image by image, with the first one. What
became of the files of weights when they were loaded is printed, and kept in weights.json, by the models' names.
--format robustbench writes RobustBench's claim form for them instead.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mimir_fast._tyro import tyro
from mimir_fast.checkpoints.durable import write_text
from mimir_fast.cli import parse, run
from mimir_fast.evaluation import comparison as evaluations
from mimir_fast.evaluation.claim import claims_of, issue
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.models.load_report import FILE_NAME, LoadReport
from mimir_fast.probing import comparison as probings


@dataclass
class CompareConfig:
    """Compare finished evaluations, or finished probings: one table, paired differences, curves."""

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional]
    """results.json files, folders of evaluations or of probings, or run folders (their newest evaluation, else their
    probing)."""
    output: str = "comparison"
    """Folder of comparison.html and comparison.md, or of the claim."""
    format: Literal["tables", "robustbench"] = "tables"
    """tables: the models side by side; robustbench: claim.md, RobustBench's form for new models, and model_info/*.json,
    its machine-readable part, with blanks for what no evaluation knows (paper, venue, additional data, links)."""
    imports: Imports = ()
    """Module that registers report topics of your own, looked for in the working folder and PYTHONPATH."""

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("name the evaluations to compare: python -m mimir_fast.compare runs/a runs/b")


def compare(config: CompareConfig) -> Path:
    """Write the files and return the path of the page, or of the claim; the Markdown is printed.

    Raises:
        FileNotFoundError, ValueError: an evaluation is missing, of another version, or of no leaderboard.
    """
    files = [evaluations.find_results(Path(path)) for path in config.evaluations]
    probed = [probings.is_probing(file) for file in files]
    if any(probed) and not all(probed):
        at, other = files[probed.index(True)], files[probed.index(False)]
        raise ValueError(f"{at} is of a probing and {other} of an evaluation: name folders of one kind (RUN/probing)")
    if config.format == "robustbench":
        if any(probed):
            raise ValueError("--format robustbench is for evaluations: a probing claims no robustness")
        return _claim(files, Path(config.output))
    names, text, page = _probings(files) if any(probed) else _evaluations(files)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.md", text)
    write_text(folder / "comparison.html", page)
    read = {name: LoadReport.read(file.parent) for name, file in zip(names, files, strict=True)}
    reports = {name: report for name, report in read.items() if report is not None}
    for name, report in reports.items():
        print(f"{name}: {report}")
    if reports:
        kept = {name: report.as_dict() for name, report in reports.items()}
        write_text(folder / FILE_NAME, json.dumps(kept, indent=1) + "\n")
    print(f"{text}\n{folder / 'comparison.html'}")
    return folder / "comparison.html"


def _claim(files: Sequence[Path], folder: Path) -> Path:
    """Write RobustBench's form, and a JSON file a model and threat model."""
    found = [claim for model in evaluations.load(files) for claim in claims_of(model)]
    twice = [path for path, times in Counter(claim.path for claim in found).items() if times > 1]
    if twice:
        raise ValueError(f"{len(found)} claims would be one file, {twice[0]}: claim models of one name one by one")
    for claim in found:
        (folder / claim.path).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / claim.path, json.dumps(claim.info, indent=2, ensure_ascii=False) + "\n")
    text = issue(found)
    write_text(folder / "claim.md", text)
    paths = "\n".join(str(path) for path in (folder / "claim.md", *(folder / claim.path for claim in found)))
    print(f"{text}\n{paths}")
    return folder / "claim.md"


def _evaluations(files: Sequence[Path]) -> tuple[list[str], str, str]:
    models = evaluations.load(files)
    return [model.name for model in models], evaluations.markdown(models), evaluations.html(models)


def _probings(files: Sequence[Path]) -> tuple[list[str], str, str]:
    models = probings.load(files)
    return [model.name for model in models], probings.markdown(models), probings.html(models)


def config_from(args: Sequence[str]) -> CompareConfig:
    """The configuration of a command line, whose modules are imported."""
    load_extensions(args)
    return parse(CompareConfig, args, prog="python -m mimir_fast.compare")


def main() -> None:
    """The command: compare the evaluations that the line names."""
    compare(config_from(sys.argv[1:]))


if __name__ == "__main__":
    run(main)
