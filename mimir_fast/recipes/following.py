"""What follows a run: the command to type next, and what fine-tuning takes over from the run that it starts from.

Both come from the run's own configuration, so that a run on images of one's own, or of another patch size than the
recipe's, goes on with these.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimir_fast.data import DataConfig
from mimir_fast.methods.registry import DEFAULT
from mimir_fast.models.classifier import ClassifierConfig
from mimir_fast.recipes import all_recipes, find_recipe
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig
from mimir_fast.training.saved_run import values_of

MODEL = ("family", "encoder", "patch_size", "options", "normalization", "mean", "std")
"""Options of the model that weights of a run need."""
DATA = ("source", "image_size", "channels", "generated", "flip")
"""Options of the data by which a recipe is one for a run."""
AUGMENTATION = ("augment", "crop_padding", "crop_scale", "crop_ratio")


def after_pretraining(config: PretrainConfig) -> list[str]:
    """The words after `python -m`: fine-tuning by the recipe for these images and this encoder, or without a recipe."""
    method, folder = DEFAULT["finetune"], config.folder
    model, data = values_of(ClassifierConfig, vars(config.model)), config.data
    words = ["mimir_fast.finetune"]
    recipe = tuning_recipe(method, model, vars(data))
    if recipe is None:
        return [*words, "--init", str(folder)]
    words += ["--recipe", recipe, "--init", str(folder)]
    tuned = find_recipe(FinetuneConfig, recipe)
    for name in ("root", "limit"):
        if (value := getattr(data, name)) != getattr(tuned.data, name):
            words += [f"--data.{name}", str(value)]
    # Runs of one recipe that started from different encoders would meet in one folder.
    usual = recipe.replace(f"/{method}_", f"/{DEFAULT['pretrain']}_")
    return words if folder == Path(f"runs/{usual}") else [*words, "--output_dir", tuned_folder(folder, method)]


def after_finetuning(config: FinetuneConfig) -> list[str]:
    """The words after `python -m`: the evaluation, against the adversary of training."""
    eps = f"{255 * config.objective.attack.eps:.4g}/255"
    return ["mimir_fast.evaluate", "--checkpoint", str(config.folder), "--suite", "quick", "--eps", eps]


def tuned_folder(run: Path, method: str) -> str:
    """Where a fine-tuning of a run goes that has no recipe's folder."""
    return f"{run}-{method}"


def tuning_recipe(method: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """The fine-tuning recipe for such images and such an encoder: the plain one, or the first of that patch size."""
    plain = f"{data['source']}/{method}_{model['family']}_{model['encoder']}"
    names = [recipe.name for recipe in all_recipes() if recipe.config_type is FinetuneConfig]
    for name in (name for name in names if name == plain or name.startswith(f"{plain}_p{model['patch_size']}_")):
        found = find_recipe(FinetuneConfig, name)
        same_model = all(getattr(found.model, key) == model[key] for key in MODEL)
        if same_model and not found.init and all(getattr(found.data, key) == data[key] for key in DATA):
            return name
    return None


def starting_from(run: Path, saved: Mapping[str, Any], method: str) -> FinetuneConfig:
    """Fine-tuning of a run where no recipe is named: the run's images and encoder, all else as in the recipe for them;
    where there is none, as in the papers, with the run's augmentation.

    Args:
        run: its folder.
        saved: its config.json.
    """
    model = {name: getattr(ClassifierConfig, name) for name in MODEL} | values_of(ClassifierConfig, saved["model"])
    model = {name: model[name] for name in MODEL}
    data = vars(DataConfig(**values_of(DataConfig, saved["data"], ["hold_out"])))
    recipe = tuning_recipe(method, model, data)
    start = FinetuneConfig(recipe="", method=method) if recipe is None else find_recipe(FinetuneConfig, recipe)
    kept = ("hold_out", *AUGMENTATION) if recipe else ("hold_out",)
    return replace(
        start,
        model=replace(start.model, **model),
        data=replace(start.data, **{name: value for name, value in data.items() if name not in kept}),
        run=replace(start.run, output_dir=tuned_folder(run, method)),
    )
