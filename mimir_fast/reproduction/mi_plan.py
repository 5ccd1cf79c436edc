"""The plan of the question what the mutual-information term does: data, budgets, rows and contrasts, before any run.

Why each of them is so: docs/results/mi_question/PROTOCOL.md.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from mimir_fast.methods.mimir import MimirConfig, apply_preset
from mimir_fast.recipes import cifar10
from mimir_fast.reproduction.ablation import Row
from mimir_fast.reproduction.contrasts import LEVEL
from mimir_fast.reproduction.fashion import EPS, SIZES, SizeName, finetune_base, pretrain_base
from mimir_fast.reproduction.faster import digits
from mimir_fast.reproduction.quick_judge import QuickJudge
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig
from mimir_fast.training.run_config import RunConfig

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
QuestionData = Literal["fashion", "cifar10", "digits"]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first run.

    Attributes:
        pretrain, finetune: of adv-MAE at budget 1, but learning rate, seed and folder.
        rules: the judge's.
        learning_rates: peaks of both stages, of which one is chosen; shares: of the penalty's gradient.
        budgets: factors of the steps of both stages, smallest first.
        held_out: training images that tuning is judged by.
        facts_images: test images for what the latent holds.
        whole: all arms of the question, in place of a, b and d at one share.
    """

    data: QuestionData
    size: SizeName
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    rules: QuickJudge
    device: str = "auto"
    learning_rates: tuple[float, ...] = (7.5e-4, 1.5e-3, 3e-3)
    shares: tuple[float, ...] = (1e-2, 1e-1)
    budgets: tuple[int, ...] = (1, 2, 4)
    tuning_seeds: int = 2
    assay_seeds: int = 8
    seeds: int = 14
    held_out: int = 512
    facts_images: int = 512
    whole: bool = False

    @property
    def level(self) -> float:
        """Of the assay's intervals: there are as many looks as budgets."""
        return LEVEL / len(self.budgets)


def plan_of(size: SizeName, data: QuestionData = "fashion", device: str = "auto", root: str = "data") -> Plan:
    """The plan of that size; `reduced` runs on CPUs, a thread a job.

    Args:
        root: the folder of CIFAR-10; the others have places of their own.
    """
    device = "cpu" if size == "reduced" else device
    first: PretrainConfig
    if data == "digits":
        small = digits()
        first = small.with_steps(small.pretrain, small.pretrain.run.max_steps or 0)
        tune = small.with_steps(small.finetune, small.finetune.run.max_steps or 0)
        rules = QuickJudge(small.rules.eps, None, 300, batch_size=128)
    else:
        first, tune = pretrain_base(SIZES[size]), finetune_base(SIZES[size])
        if data == "cifar10":  # as many images, and all else the same
            images = replace(cifar10.data(), root=root, limit=tune.data.limit, augment="none")
            first, tune = replace(first, data=images), replace(tune, data=images)
        rules = QuickJudge(EPS, 2000, 500, batch_size=128 if size == "reduced" else 500)
    rules = replace(rules, apgd_steps=50, apgd_targets=3) if size == "reduced" else rules
    plan = Plan(data, size, first, tune, rules, device, whole=size == "full")
    if (data, size) == ("cifar10", "reduced"):  # what two cores can do; the protocol has the pilots
        return replace(plan, budgets=(2,), learning_rates=(2e-4, 4e-4, 8e-4))
    return plan


def scaled(plan: Plan, config: Config, budget: int, lr: float) -> Config:
    """A configuration with `budget` times the steps and this learning rate."""
    precision = "fp32" if plan.device == "cpu" else config.run.precision
    run = replace(
        config.run, max_steps=budget * (config.run.max_steps or 0), device=plan.device, precision=precision,
        log_every=16, save_every=200, keep_last=1,
    )  # fmt: skip
    return replace(config, run=run, optim=replace(config.optim, lr=lr))


def rows_of(plan: Plan, budget: int, lr: float, share: float) -> dict[str, Row]:
    """Every row by name; all with one attack, budget and learning rate, those of the penalty differ in it alone."""
    base = scaled(plan, replace(plan.pretrain, method="mimir"), budget, lr)
    objective: MimirConfig = apply_preset(base.objective, "paper")
    base = replace(base, objective=objective)

    def method(name: str) -> PretrainConfig:
        return replace(base, method=name)

    def penalty(run: RunConfig = base.run, **mi: Any) -> PretrainConfig:
        return replace(base, run=run, objective=replace(objective, mi=replace(objective.mi, **mi)))

    noise = method("noise_mae")
    noise.objective.eps = objective.attack.eps  # type: ignore[attr-defined]
    rows = [
        Row("scratch", "none (from scratch)", None),
        Row("mae", "MAE", method("mae")),
        Row("noise_mae", "noise-MAE", noise),
        Row("adv_mae", "(a) adv-MAE, no penalty", method("adv_mae")),
    ]
    for name, letter, title in (("hsic", "b", "HSIC"), ("nhsic", "c", "nHSIC")):
        for s in plan.shares:
            own: dict[str, Any] = {"estimator": name, "share": s}
            rows += [
                Row(f"{name}_{s:g}", f"({letter}) {title}, share {s:g}", penalty(**own)),
                Row(
                    f"{name}_{s:g}_permuted", f"(d) {title}, share {s:g}, permuted", penalty(**own, pairing="permuted")
                ),
            ]
        rows.append(Row(f"{name}_fixed", f"(e) {title}, λ 1e-5", penalty(estimator=name, weight=1e-5)))
    micro = replace(base.run, micro_batch=max(2, base.run.batch_size // 8))
    own = {"estimator": "nhsic", "share": share}
    rows += [
        Row("nhsic_parts", f"(c) share {share:g}, an eighth of the batch an estimate", penalty(micro, **own)),
        Row("nhsic_whole", f"(c) share {share:g}, accumulated", penalty(micro, **own, accumulated=True)),
    ]
    return {row.name: row for row in rows}


def arms_of(plan: Plan, share: float) -> tuple[str, ...]:
    """Names of the rows of the last stage."""
    if not plan.whole:
        return ("adv_mae", f"hsic_{share:g}", f"hsic_{share:g}_permuted")
    names = rows_of(plan, 1, 1e-3, share)
    return tuple(name for name in names if name not in ("scratch", "mae", "noise_mae"))


def primary_of(plan: Plan, share: float) -> tuple[tuple[str, str], ...]:
    """The contrasts that Holm's correction is over: does it help (b − a), and because of information (b − d)?"""
    names = ("hsic", "nhsic") if plan.whole else ("hsic",)
    own = [f"{name}_{share:g}" for name in names]
    return tuple((name, other) for name in own for other in ("adv_mae", f"{name}_permuted"))


def secondary_of(plan: Plan, share: float) -> tuple[tuple[str, str], ...]:
    """Contrasts that are described and decide nothing: every other arm against (a), and one estimate against parts."""
    known = {*primary_of(plan, share)}
    pairs = [(name, "adv_mae") for name in arms_of(plan, share) if name != "adv_mae"]
    pairs += [("nhsic_whole", "nhsic_parts")] * plan.whole
    return tuple(pair for pair in pairs if pair not in known)
