"""The demonstration on digits: a robust classifier, and a naturally trained twin that is not.

    pre-train (MIMIR)  ─┬─ fine-tune by PGD-5 adversarial training ─┐
                        └─ fine-tune on clean images (the twin)    ─┴─ evaluate both: one report, one number each

The evaluation takes the best checkpoint by the probe of every epoch, whose images are held out of the *training* split;
no test digit is seen before. The numbers printed, drawn and reported are of that one evaluation.

The twin has the same architecture, the same pre-trained weights to start from, the same images, steps and learning
rate; only `method` differs. ε is the recipe's, 16/255: digits are strokes of full contrast, on which 8/255 is hardly a
threat.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.measure import Count
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.recipes import find_recipe
from mimir_fast.reproduction.stages import Say, Stopwatch, counts_of, run_stage
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig
from mimir_fast.versions import environment

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

# Folder → recipe. The twin's attack is the robust one's: its probe is against the same adversary.
MODELS = {"robust": "digits/pgd_vit_nano", "natural": "digits/natural_vit_nano"}
MEASURES = {
    "natural": "no attack", "fgsm": "FGSM", "pgd20": "PGD-20", "autoattack": "AutoAttack", "worst": "worst case",
}  # fmt: skip
EVERY_DIGIT = 300  # the suite alone would take 256 of them


def run_demo(
    folder: Path, *, device: str = "auto", autoattack_images: int = 100, max_steps: int | None = None, say: Say = print
) -> dict[str, dict[str, Count]]:
    """Run what is not finished; write results.json, demo.png and two reports, and say what to open.

    Args:
        folder: of all runs.
        autoattack_images: test digits that are evaluated, all of them under AutoAttack *standard* too; 0 evaluates all
            300 without it.
        max_steps: of every stage; None for the recipes' own.
    Returns:
        `robust` and `natural`, each measure → accuracy; `worst` is the one to quote.
    Raises:
        Interrupted: a signal came; the same call goes on.
    """
    watch, seconds = Stopwatch(), {}

    def placed(config: Config, name: str) -> Config:
        run = replace(config.run, output_dir=str(folder / name), device=device, keep_last=1)
        return replace(config, run=run if max_steps is None else replace(run, max_steps=max_steps))

    def stage(title: str, work: Callable[[], Any]) -> Any:
        say(f"\n== {title}")
        done = work()
        seconds[title] = watch.lap()
        return done

    pretraining = placed(find_recipe(PretrainConfig, "digits/mimir_vit_nano"), "pretrain")
    init = stage("pre-training (MIMIR)", partial(run_stage, pretraining))
    results: dict[str, Results] = {}
    reports: dict[str, Path] = {}
    eps = find_recipe(FinetuneConfig, MODELS["robust"]).objective.attack.eps
    for name, recipe in MODELS.items():
        tuning = placed(replace(find_recipe(FinetuneConfig, recipe), init=str(init)), name)
        stage(f"fine-tuning ({name})", partial(run_stage, tuning))
        config = EvaluateConfig(
            str(tuning.folder), "quick", replace(tuning.data, limit=None), eps=eps,
            limit=autoattack_images or EVERY_DIGIT, autoattack="yes" if autoattack_images else "no",
            output_dir=str(folder / "report" / name), device=device,
        )  # fmt: skip
        results[name] = stage(f"evaluation ({name})", partial(evaluate, config, log=say))
        reports[name] = config.folder
    found = {name: counts_of(result) for name, result in results.items()}
    write_results(folder, found, results, seconds)
    curves = {name: result.sections["curve"] for name, result in results.items()}
    draw(folder / "demo.png", found, curves, eps)
    say("\n" + text_table(found, eps))
    say(f"{sum(seconds.values()):.0f} s in all. Open {folder / 'demo.png'} and\n" + "\n".join(
        f"  {report / 'report.html'}" for report in reports.values()
    ))  # fmt: skip
    return found


def write_results(
    folder: Path, found: dict[str, dict[str, Count]], results: dict[str, Results], seconds: dict[str, float]
) -> None:  # fmt: skip
    """results.json: accuracies as counts, the verdicts, how they were measured, where."""
    counts = {name: {measure: count.as_dict() for measure, count in row.items()} for name, row in found.items()}
    content = {
        "accuracy": counts,
        "verdicts": {name: result.verdicts for name, result in results.items()},
        "choices": {name: result.choices for name, result in results.items()},
        "seconds": seconds,
        "environment": environment(),
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")


def text_table(found: dict[str, dict[str, Count]], eps: float) -> str:
    """Both models, one line each."""
    shown = [measure for measure in MEASURES if measure in found["robust"]]
    lines = [f"accuracy on digits, eps {255 * eps:.0f}/255" + "".join(f"{MEASURES[m]:>22}" for m in shown)]
    for name, row in found.items():
        title = {"robust": "adversarially fine-tuned", "natural": "naturally fine-tuned twin"}[name]
        lines.append(f"{title:<{len(lines[0]) - 22 * len(shown)}}" + "".join(f"{row[m]!s:>22}" for m in shown))
    return "\n".join(lines)


def draw(path: Path, found: dict[str, dict[str, Count]], curves: dict[str, dict[str, Any]], eps: float) -> None:
    """Left: accuracy under each attack of all images with its 95 % interval. Right: accuracy along ε under PGD.

    An attack on some of the images only is a line below: as a bar, AutoAttack on 48 could stand above PGD on 300.
    """
    from matplotlib.figure import Figure

    colours = {"robust": "#1f5fa8", "natural": "#b3372f"}
    titles = {"robust": "MIMIR + PGD adversarial training", "natural": "twin: MIMIR + natural training"}
    figure = Figure(figsize=(10.5, 3.8), dpi=130, layout="constrained")
    bars, lines = figure.subplots(1, 2)
    total = found["robust"]["worst"].total
    measured = [measure for measure in MEASURES if measure in found["robust"]]
    shown = [measure for measure in measured if found["robust"][measure].total == total]
    for offset, (name, row) in zip((-0.2, 0.2), found.items(), strict=True):
        places = [index + offset for index in range(len(shown))]
        heights = [100 * row[m].accuracy for m in shown]
        intervals = [row[m].interval for m in shown]
        errors = [
            [max(0.0, height - 100 * low) for height, (low, _) in zip(heights, intervals, strict=True)],
            [max(0.0, 100 * high - height) for height, (_, high) in zip(heights, intervals, strict=True)],
        ]
        drawn = bars.bar(places, heights, 0.38, yerr=errors, color=colours[name], label=titles[name], capsize=2)
        bars.bar_label(drawn, fmt="%.0f", padding=2, fontsize=9)
    bars.set_xticks(range(len(shown)), [MEASURES[m] for m in shown])
    bars.set(ylabel="accuracy (%)", ylim=(0, 108), title=f"{total} test digits, ε = {255 * eps:.0f}/255")
    bars.set_yticks(range(0, 101, 20))
    apart = []
    for measure in (m for m in measured if m not in shown):
        correct = " and ".join(str(row[measure].correct) for row in found.values())
        apart.append(f"{MEASURES[measure]} on {found['robust'][measure].total} of them: {correct} correct")
    bars.set_xlabel("\n".join(apart), fontsize=8)
    for name, curve in curves.items():
        near = [(255 * e, 100 * a) for e, a in zip(curve["eps"], curve["accuracy"], strict=True) if e <= 3 * eps]
        lines.plot(*zip(*near, strict=True), "o-", color=colours[name], label=titles[name])
    lines.axvline(255 * eps, color="#777777", linestyle=":", linewidth=1)
    lines.set(xlabel="ε · 255", ylabel="accuracy (%)", ylim=(-2, 104), title="Accuracy under PGD as ε grows")
    handles, labels = lines.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
