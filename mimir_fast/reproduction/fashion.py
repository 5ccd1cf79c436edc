"""The paper's ablation in small: Fashion-MNIST, ten rows that differ in their pre-training only.

    full       ViT-tiny/4: 65 tokens, 0.7 GFLOP a forward pass. For one GPU.
    reduced    ViT-nano/8: 17 tokens, 0.016 GFLOP a forward pass. For two CPU cores.

Budgets are in optimiser steps and equal for all rows; `scratch` has the same fine-tuning and no pre-training. Besides
the paper's λ there are those at which the penalty's gradient is about a hundredth of the reconstruction's, and one
tenth: the share of every row is measured and stands in the table (gradient_share.py). There is no row for the global
batch: on one process it is the batch.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mimir_fast.attacks.training_attack import ClassifierAttack
from mimir_fast.data import DataConfig
from mimir_fast.methods.mimir import apply_preset
from mimir_fast.recipes import find_recipe
from mimir_fast.reproduction.ablation import Ablation, Row, select
from mimir_fast.reproduction.stages import Judge
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig

EPS = 8 / 255
PEAK_LR = 1.5e-3  # of both stages; 1e-3 and 3e-3 were tried on `scratch` and adv-MAE (seed 0), no other row was tuned
SizeName = Literal["full", "reduced"]
Config = TypeVar("Config", PretrainConfig, FinetuneConfig)


@dataclass(frozen=True)
class Size:
    """Budgets of every cell.

    Attributes:
        encoder, patch_size: the ViT.
        train_images: of both stages, evenly spaced in the training split; None for all 60,000.
        pretrain_steps, pretrain_batch, finetune_steps, finetune_batch: optimiser steps and images a step.
        attack_steps: of PGD in adversarial training.
        rules: the judge's.
    """

    encoder: Literal["nano", "tiny"]
    patch_size: int
    train_images: int | None
    pretrain_steps: int
    pretrain_batch: int
    finetune_steps: int
    finetune_batch: int
    attack_steps: int
    rules: Judge

    @property
    def note(self) -> str:
        """What the reader of the table must know."""
        judged, few = self.rules.num_images or 10_000, self.rules.autoattack_images
        images = f"{self.train_images or 60_000:,}"
        return (
            f"Fashion-MNIST, ViT-{self.encoder}/{self.patch_size}, ε = 8/255. Every row: {self.finetune_steps} steps "
            f"of {self.finetune_batch} images of PGD-{self.attack_steps} adversarial training; pre-trained rows before "
            f"that {self.pretrain_steps} steps of {self.pretrain_batch}; {images} training images. Last weights, no "
            "selection. "
            f"Natural and PGD-20 on the same {judged:,} test images, {self.rules.autoattack_title} on {few} of them. "
            "Accuracy in %, mean ± sample standard deviation over seeds; PGD-20 − adv-MAE is paired by seed. "
            "‖λ∇I‖/‖∇MSE‖: the mutual-information term's share of the encoder's gradient. "
            "`paper`: natural / PGD-10 of CIFAR-10 ViT-T in arXiv 2312.04960, by its code: "
            "other data, 100 times the budget."
        )


SIZES: dict[SizeName, Size] = {
    "full": Size(
        "tiny", 4, None, 480, 512, 200, 512, 3, Judge(EPS, 1000, 256, batch_size=512),
    ),
    "reduced": Size(
        "nano", 8, 16384, 384, 64, 240, 64, 2, Judge(EPS, 1000, 64),
    ),
}  # fmt: skip


def pretrain_base(size: Size) -> PretrainConfig:
    """What all pre-trained rows share."""
    base = find_recipe(PretrainConfig, f"fashion_mnist/mimir_vit_{size.encoder}")
    run = replace(
        base.run, max_steps=size.pretrain_steps, epochs=1.0, warmup_epochs=0.1, batch_size=size.pretrain_batch,
        log_every=20, save_every=200, keep_last=1,
    )  # fmt: skip
    return replace(base, data=_data(size, base), optim=OptimizerConfig(lr=PEAK_LR), run=run)


def finetune_base(size: Size) -> FinetuneConfig:
    """What all rows share: no probe, which costs time, and no layer-wise decay, which would hold back `scratch`."""
    base = find_recipe(FinetuneConfig, f"fashion_mnist/pgd_vit_{size.encoder}")
    run = replace(
        base.run, max_steps=size.finetune_steps, epochs=1.0, warmup_epochs=0.1, batch_size=size.finetune_batch,
        log_every=20, save_every=100, keep_last=1,
    )  # fmt: skip
    threat = ClassifierAttack(eps=EPS, alpha=1.5 * EPS / size.attack_steps, num_steps=size.attack_steps)
    return replace(
        base,
        model=replace(base.model, drop_path=0.0),
        data=_data(size, base),
        objective=replace(base.objective, attack=threat),
        probe=replace(base.probe, num_images=0),
        optim=OptimizerConfig(lr=PEAK_LR, weight_decay=0.05, betas=(0.9, 0.999)),
        run=run,
    )


def rows_of(size: Size) -> tuple[Row, ...]:
    """The rows of the results' table, one for each of the ablation's."""
    base = pretrain_base(size)

    def mimir(preset: str = "paper", **mi: Any) -> PretrainConfig:
        objective = apply_preset(base.objective, preset)
        return replace(base, method="mimir", objective=replace(objective, mi=replace(objective.mi, **mi)))

    return (
        Row("scratch", "none (from scratch)", None),
        Row("mae", "MAE", replace(base, method="mae"), "69.02 / 42.31"),
        Row("adv_mae", "adv-MAE", replace(base, method="adv_mae"), "74.69 / 46.28"),
        Row("mimir_paper", "MIMIR paper: HSIC, λ 1e-5", mimir(weight=1e-5)),
        Row("mimir_official", "MIMIR official: nHSIC, λ 1e-5", mimir("official", weight=1e-5), "76.30 / 47.60"),
        Row("hsic_1e3", "MIMIR HSIC, λ 1e3", mimir(weight=1e3)),
        Row("nhsic_1e-4", "MIMIR nHSIC, λ 1e-4", mimir(estimator="nhsic", weight=1e-4)),
        Row("nhsic_1e-3", "MIMIR nHSIC, λ 1e-3", mimir(estimator="nhsic", weight=1e-3)),
        Row("renyi_1e-3", "MIMIR Rényi, λ 1e-3", mimir(estimator="renyi", weight=1e-3)),
        Row("renyi_1e-1", "MIMIR Rényi, λ 1e-1", mimir(estimator="renyi", weight=1e-1)),
    )


def fashion_ablation(size: SizeName, num_seeds: int, folder: Path, *, rows: str = "", device: str = "auto") -> Ablation:
    """The ablation of that size.

    Args:
        rows: comma-separated names; empty for all.
        device: auto, cpu or cuda.
    Raises:
        ValueError: an unknown row.
    """
    budget = SIZES[size]
    chosen = tuple(
        row if row.pretrain is None else replace(row, pretrain=_on(device, row.pretrain))
        for row in select(rows_of(budget), rows)
    )
    return Ablation(chosen, _on(device, finetune_base(budget)), budget.rules, num_seeds, folder, size, budget.note)


def _data(size: Size, base: Config) -> DataConfig:
    """No crops and no mirroring: budgets of about one pass over the images leave nothing to overfit to."""
    return replace(base.data, limit=size.train_images, augment="none")


def _on(device: str, config: Config) -> Config:
    return replace(config, run=replace(config.run, device=device))
