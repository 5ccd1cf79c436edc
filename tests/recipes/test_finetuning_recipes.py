"""What the fine-tuning recipes share: pooling, head and stochastic depth as the authors', and no dead parameter."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.families import all_families
from mimir_fast.recipes import all_recipes, find_recipe
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.run_folder import defaults_of, differences

CONFIGS = [find_recipe(FinetuneConfig, r.name) for r in all_recipes() if r.config_type is FinetuneConfig]


def nano(config: FinetuneConfig) -> tuple[ClassifierConfig, int]:
    """The recipe's classifier at the family's smallest size and at 32², and the image size."""
    staged = config.model.family in ("swin", "convnext")
    return replace(config.model, encoder="nano", patch_size=2 if staged else 8).resolved(), 32


KINDS = {str(nano(c)[0]): nano(c)[0] for c in CONFIGS}


@pytest.mark.parametrize(
    "config", KINDS.values(), ids=[f"{c.family}-{c.global_pool}-{i}" for i, c in enumerate(KINDS.values())]
)
def test_no_parameter_goes_without_gradient(config: ClassifierConfig) -> None:
    """But the bias of keys alone, which softmax cancels."""
    torch.manual_seed(0)
    model = build_classifier(replace(config, head_std=0.02), 32, 10)
    logits = model(torch.rand(4, 3, 32, 32))
    F.cross_entropy(logits, torch.arange(4)).backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [name for name in dead if not name.endswith(".attn.k.bias")] == []


@pytest.mark.parametrize("name", ["cifar10/pgd_vit_tiny", "imagenet/fast_swin_base", "digits/pgd_convit_nano"])
def test_a_run_of_before_these_options_goes_on(name: str) -> None:
    config = find_recipe(FinetuneConfig, name)
    config = replace(config, model=config.model.resolved())
    new = json.loads(json.dumps(asdict(config)))
    old = {key: value for key, value in new.items() if key not in ("freeze", "lora")}
    old["model"] = {k: v for k, v in new["model"].items() if k not in ("head_std", "drop_path_law")}
    old["model"]["global_pool"] = "avg"
    found = differences(old, new, defaults_of(config))
    assert found == (["model.global_pool: avg -> cls"] if "convit" in name else [])


def test_every_family_has_a_recipe_here() -> None:
    assert {config.family for config in KINDS.values()} == set(all_families())


def test_pooling_head_and_stochastic_depth_are_the_authors() -> None:
    for config in CONFIGS:
        model, group = config.model.resolved(), config.recipe.partition("/")[0]
        mo = (config.method == "ard_prm" and group == "cifar10") or config.recipe.endswith("_mo")
        agat = "_agat" in config.recipe or "_scratch_300ep" in config.recipe
        assert model.global_pool == ("cls" if mo or agat or model.family in ("convit", "cait", "xcit") else "avg"), (
            config.recipe
        )
        assert model.head_std == (2e-2 if group in ("cifar10", "tiny_imagenet") else 2e-5), config.recipe
        assert model.drop_path_law == ("constant" if model.family in ("cait", "xcit") else "linear"), config.recipe
