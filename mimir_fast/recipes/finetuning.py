"""What the fine-tuning recipes of all data sets share, so that each file says only what is its own."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.attacks.training_attack import ClassifierAttack
from mimir_fast.data import DataConfig
from mimir_fast.methods.augmentation import RandAugmentConfig
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.mixing import MixingConfig
from mimir_fast.methods.registry import find_method
from mimir_fast.models.classifier import ClassifierConfig
from mimir_fast.recipes import register
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig

METHODS = ("natural", "pgd", "fast", "apgd", "trades", "mart", "ard_prm")

MIXING = MixingConfig(mixup=0.8, cutmix=1.0, warmup_epochs=10)
RANDAUGMENT = RandAugmentConfig(num_ops=2, magnitude=9, warmup_epochs=10, fill=(0,), interpolation="bicubic")
"""The papers' strong augmentation: its strength rises over 10 epochs. Fill and interpolation are those of the authors'
`create_transform`, which is given a mean of 0."""

# As the MIMIR authors' `finetune.py` and the models of timm that it takes have it. Their pooling is ClassifierConfig's.
HEAD_STD = {"cifar10": 2e-2, "tiny_imagenet": 2e-2}  # 2e-5 for ImageNet, and for what they have not
CONSTANT_DROP_PATH = ("cait", "xcit")
# Their code attacks in eval mode; PGD's and FastAT's own authors do in train mode. To other families it is the same.
PLAIN, BATCH_NORMS, OURS = ("pgd", "fast"), ("xcit",), ("digits", "fashion_mnist")


def register_finetuning(
    group: str, method: str, encoder: str, patch_size: int, data: Callable[[], DataConfig],
    run: RunConfig, attack: LinfThreat, note: str, *, blr: float = 1e-3, suffix: str = "", caveat: str = "",
    layer_decay: float = 0.65, drop_path: float = 0.1, optim: OptimizerConfig | None = None,
    family: str = "vit", mixing: MixingConfig | None = None, randaugment: RandAugmentConfig | None = None,
    label_smoothing: float = 0.0, init: str = "", options: dict[str, Any] | None = None, **model: Any,
) -> None:  # fmt: skip
    """GROUP/METHOD_FAMILY_SIZE[_SUFFIX].

    Args:
        optim: optimiser in place of AdamW with `blr` and `layer_decay`.
        mixing, randaugment, label_smoothing: off where left out.
        init: weights it starts from where nothing else is said.
        options: of the method, beside those of every method.
        model: further options of the model.
    """

    def build() -> FinetuneConfig:
        adamw = OptimizerConfig(blr=blr, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=layer_decay)
        as_authors: dict[str, Any] = {
            "head_std": HEAD_STD.get(group, ClassifierConfig.head_std),
            "drop_path_law": "constant" if family in CONSTANT_DROP_PATH else "linear",
        }
        config = FinetuneConfig(
            method=method,
            init=init,
            model=ClassifierConfig(
                family=family, encoder=encoder, patch_size=patch_size, drop_path=drop_path, **(as_authors | model)
            ),
            data=data(),
            objective=ClassificationConfig(
                attack=ClassifierAttack(**asdict(attack)), label_smoothing=label_smoothing,
                randaugment=replace(randaugment or RandAugmentConfig()), mixing=replace(mixing or MixingConfig()),
            ),
            optim=replace(optim) if optim is not None else adamw,
            run=replace(run),
        )  # fmt: skip
        objective = find_method("finetune", method).as_published(replace(config.objective, **(options or {})))
        if method in PLAIN and family in BATCH_NORMS and group not in OURS:
            objective = replace(objective, attack_mode="eval")
        return replace(config, objective=objective)

    name = f"{group}/{method}_{family}_{encoder}" + (f"_{suffix}" if suffix else "")
    register(name, FinetuneConfig, build, f"{find_method('finetune', method).note}; {note}", caveat)
