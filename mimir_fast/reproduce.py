"""Whole experiments: several runs, one table.

python -m mimir_fast.reproduce digits_demo   # `make demo`: a robust classifier of digits and its natural twin
python -m mimir_fast.reproduce fashion_ablation --size reduced --seeds 3
python -m mimir_fast.reproduce faster --data digits    # one stage or two, cheaper attacks, at equal compute
python -m mimir_fast.reproduce mi_question --jobs 2    # what the mutual-information term does; hours
python -m mimir_fast.reproduce --help

All resume when the same command is given again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from mimir_fast._tyro import tyro
from mimir_fast.cli import parse, run
from mimir_fast.reproduction.ablation import Ablation, endings, read_results, run_ablation
from mimir_fast.reproduction.demo import EVERY_DIGIT, run_demo
from mimir_fast.reproduction.fashion import SizeName, fashion_ablation
from mimir_fast.reproduction.faster import DataName, run_faster
from mimir_fast.reproduction.mi_plan import QuestionData, plan_of
from mimir_fast.reproduction.mi_question import run_question
from mimir_fast.reproduction.mi_report import plot_effects, plot_why, record_of, report
from mimir_fast.reproduction.stages import Interrupted
from mimir_fast.reproduction.tables import markdown, plot, print_table, table
from mimir_fast.validation import check_number
from mimir_fast.versions import commit


@dataclass
class DigitsDemo:
    """Pre-train, fine-tune, evaluate; and the same without adversarial training. Minutes on two CPU cores."""

    output_dir: str = "runs/digits_demo"
    """Folder of all runs, results.json, demo.png and the reports."""
    device: str = "auto"
    """auto, cpu or cuda."""
    autoattack_images: int = 100
    """Test images that are evaluated, all of them under AutoAttack too; 0 evaluates all 300 without it."""
    max_steps: int | None = None
    """Steps of every stage, for a quick look; left out: what the recipes say."""

    def __post_init__(self) -> None:
        check_number("autoattack_images", self.autoattack_images, at_least=0, at_most=EVERY_DIGIT)
        if self.max_steps is not None:
            check_number("max_steps", self.max_steps, at_least=1)

    def run(self) -> None:
        """Run the experiment of this name from its first unfinished stage."""
        run_demo(
            Path(self.output_dir), device=self.device, autoattack_images=self.autoattack_images,
            max_steps=self.max_steps,
        )  # fmt: skip


@dataclass
class FashionAblation:
    """The paper's ablation in small: pre-training methods, estimators and λ, equal budgets, several seeds."""

    size: SizeName = "reduced"
    """reduced: ViT-nano/8 on two CPU cores; full: ViT-tiny/4 on a GPU."""
    seeds: int = 3
    """Seeds a row, from 0."""
    rows: str = ""
    """Comma-separated rows, such as mae,adv_mae,mimir_paper; empty for all."""
    output_dir: str = ""
    """Folder of all runs, results.jsonl, table.md and ablation.png; runs/fashion_ablation_SIZE when empty."""
    device: str = "auto"
    """auto, cpu or cuda."""
    only_table: bool = False
    """Tabulate what is finished, run nothing."""

    def __post_init__(self) -> None:
        check_number("seeds", self.seeds, at_least=1)

    def run(self) -> None:
        """Run the experiment of this name from its first unfinished stage."""
        folder = Path(self.output_dir or f"runs/fashion_ablation_{self.size}")
        ablation = fashion_ablation(self.size, self.seeds, folder, rows=self.rows, device=self.device)
        try:
            if not self.only_table:
                run_ablation(ablation)
        finally:
            tabulate(ablation)


@dataclass
class Faster:
    """One stage against two, and cheaper adversarial fine-tuning against PGD's, at equal compute, on two CPU cores."""

    data: DataName = "digits"
    """digits, or fashion: 16,384 images of Fashion-MNIST."""
    seeds: int = 5
    """Seeds of one stage and of two, from 0."""
    attack_seeds: int = 3
    """Seeds of each fine-tuning, from 0."""
    output_dir: str = ""
    """Folder of all runs, results.json and table.md; runs/faster_DATA when empty."""
    only_table: bool = False
    """Tabulate what is finished, run nothing."""

    def __post_init__(self) -> None:
        check_number("seeds", self.seeds, at_least=1)
        check_number("attack_seeds", self.attack_seeds, at_least=1)

    def run(self) -> None:
        """Run the experiment of this name from its first unfinished stage."""
        folder = Path(self.output_dir or f"runs/faster_{self.data}")
        run_faster(self.data, folder, self.seeds, self.attack_seeds, run=not self.only_table)


@dataclass
class MiQuestion:
    """What the mutual-information term does: tuning, an assay, then paired arms; hours on two CPU cores."""

    size: SizeName = "reduced"
    """reduced: adv-MAE, HSIC at one share and its placebo, on two CPU cores; full: every arm, on a GPU."""
    data: QuestionData = "fashion"
    """fashion (Fashion-MNIST), cifar10 or digits."""
    data_root: str = ""
    """The folder of CIFAR-10; `data` when empty."""
    jobs: int = 1
    """Processes that share the cells; on a CPU each computes on one thread."""
    output_dir: str = ""
    """Folder of all stages, results.json, table.md, effects.png and why.png; runs/mi_question_DATA_SIZE when empty."""
    device: str = "auto"
    """Of the full size: auto, cpu or cuda."""
    only_table: bool = False
    """Tabulate what is finished, run nothing."""
    allow_dirty: bool = False
    """Run from a checkout with changes; the records are marked."""

    def __post_init__(self) -> None:
        check_number("jobs", self.jobs, at_least=1)
        if self.data_root and self.data != "cifar10":
            raise ValueError(f"--data_root is of cifar10, and {self.data} has a place of its own: leave it out")

    def run(self) -> None:
        """Run the experiment from its first unfinished cell."""
        where = commit()
        if not (self.allow_dirty or self.only_table) and (where is None or where.endswith("-dirty")):
            raise ValueError(
                f"records name their commit, but this is {where or 'no checkout'}: commit, or --allow_dirty"
            )
        folder = Path(self.output_dir or f"runs/mi_question_{self.data}_{self.size}")
        plan = plan_of(self.size, self.data, self.device, self.data_root or "data")
        answers = run_question(plan, folder, self.jobs, only_read=self.only_table)
        record = record_of(plan, answers)
        (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "table.md").write_text(report(record))
        plot_effects(folder / "effects.png", record)
        plot_why(folder / "why.png", record)
        print(report(record))


def tabulate(ablation: Ablation) -> None:
    """Write table.md and ablation.png of the cells finished so far, and print the table."""
    results = read_results(ablation.results)
    if not results:
        print(f"no finished cell in {ablation.folder} yet")
        return
    lines = table(ablation, results)
    ablation = replace(ablation, note=" ".join(filter(None, (ablation.note, endings(results)))))
    (ablation.folder / "table.md").write_text(markdown(lines, ablation.note))
    plot(ablation.folder / "ablation.png", ablation, results)
    print_table(lines)
    print(f"{ablation.note}\n{ablation.folder}/table.md  {ablation.folder}/ablation.png  {ablation.results}")


Experiment = (
    Annotated[DigitsDemo, tyro.conf.subcommand("digits_demo")]
    | Annotated[FashionAblation, tyro.conf.subcommand("fashion_ablation")]
    | Annotated[Faster, tyro.conf.subcommand("faster")]
    | Annotated[MiQuestion, tyro.conf.subcommand("mi_question")]
)


def config_from(args: Sequence[str]) -> DigitsDemo | FashionAblation | Faster | MiQuestion:
    """The experiment a command line names."""
    return parse(Experiment, args, prog="python -m mimir_fast.reproduce")  # type: ignore[arg-type]


def main() -> None:
    """The command: run the experiment that the line names; an interrupted one ends without an error."""
    try:
        config_from(sys.argv[1:]).run()
    except Interrupted as stop:  # all work is saved, as after the signal itself
        print(stop)


if __name__ == "__main__":
    run(main)
