"""What the pre-training recipes of all data sets share, so that each file says only what is its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mimir_fast.data import DataConfig
from mimir_fast.methods.mimir import AUTHORS_BATCH
from mimir_fast.methods.registry import find_method
from mimir_fast.models.families import find_family
from mimir_fast.models.masked_model import ModelConfig
from mimir_fast.recipes import find_recipe, register
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig, with_preset

METHODS = ("mae", "noise_mae", "adv_mae", "mimir")

DIFFERING = ("adv_mae", "mimir")  # paper and code differ in them

# Where the papers' words are kept and not the code their numbers come from.
PAPER_CAVEAT = {
    "mae": "",
    "noise_mae": "none: a control that the papers lack",
    "adv_mae": "none for the paper's words: measured with the authors' code, see _official",
    "mimir": "none for exactly this: the numbers belong to the authors' code (nHSIC), see _official; HSIC at 1e-5 has "
    "1e-12 of the reconstruction's gradient (measured), so in effect this is adv_mae",
}  # fmt: skip


def register_pretraining(
    group: str, encoders: tuple[str, ...], patch_size: int, data: Callable[[], DataConfig],
    run: Callable[[], RunConfig], note: str, blr: float = 1.5e-4, *, methods: tuple[str, ...] = METHODS,
    family: str = "vit", suffix: str = "", optim: OptimizerConfig | None = None,
    options: dict[str, dict[str, Any]] | None = None, official: bool = False, caveat: str | None = None,
    **model: Any,
) -> None:  # fmt: skip
    """GROUP/METHOD_FAMILY_SIZE[_SUFFIX] for each method and encoder size.

    Args:
        optim: optimiser in place of AdamW with `blr`.
        options: method → values of its options that differ from their defaults.
        official: the methods that paper and code have differently are as the preset `paper` has them, and …_official
            stands beside.
        caveat: in place of what is said of the paper's words.
        model: further options of the model.
    """
    for encoder in encoders:
        for method in methods:

            def build(encoder: str = encoder, method: str = method) -> PretrainConfig:
                entry = find_method("pretrain", method)
                choices = {"decoder": entry.decoder} if entry.decoder else {}
                config = PretrainConfig(
                    method=method,
                    model=ModelConfig(family=family, encoder=encoder, patch_size=patch_size, **(model | choices)),
                    data=data(),
                    objective=entry.config(**(options or {}).get(method, {})),
                    optim=replace(optim) if optim is not None else OptimizerConfig(blr=blr),
                    run=replace(run()),
                )
                return with_preset(config, "paper") if official and method in DIFFERING else config

            name = join(f"{group}/{method}_{family}_{encoder}", suffix)
            said = PAPER_CAVEAT.get(method, "") if caveat is None and official else caveat or ""
            register(name, PretrainConfig, build, f"{find_method('pretrain', method).note}; {note}", said)
            if official and (method in DIFFERING or (method == "mae" and find_family(family).kept_on_a_grid)):
                register_official(name, method)


def register_official(base: str, method: str) -> None:
    """BASE_official: a registered recipe with everything in which the authors' code differs from the paper."""
    images = AUTHORS_BATCH.get(base.partition("/")[0])
    said = f"penalty on {images} images a GPU" if images else "images a GPU of the penalty: not published"
    register(
        f"{base}_official", PretrainConfig, lambda: with_preset(find_recipe(PretrainConfig, base), "official"),
        f"as the authors' code; {said}" if method == "mimir" else "as the authors' code",
    )  # fmt: skip


def register_variant(base: str, suffix: str, note: str, caveat: str = "", **changes: Any) -> None:
    """BASE_SUFFIX: a registered pre-training recipe with other options.

    Args:
        changes: `run`, `optim`, `data`, `attack` and `mi`: dictionaries of values to replace there.
    """

    def build() -> PretrainConfig:
        config = find_recipe(PretrainConfig, base)
        parts: dict[str, Any] = {}
        objective: Any = config.objective
        for where, values in changes.items():
            if where in ("attack", "mi"):
                objective = replace(objective, **{where: replace(getattr(objective, where), **values)})
            else:
                parts[where] = replace(getattr(config, where), **values)
        return replace(config, objective=objective, **parts)

    register(join(base, suffix), PretrainConfig, build, note, caveat)


def join(name: str, suffix: str) -> str:
    """NAME_SUFFIX, or NAME where the suffix is empty."""
    return f"{name}_{suffix}" if suffix else name
