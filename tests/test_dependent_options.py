"""An option that does nothing as the others are is refused where it is typed, and waits where a recipe has it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pytest
import torch
import tyro

from mimir_fast import finetune, pretrain
from mimir_fast.data.prepare import PrepareConfig
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.export import ExportConfig
from mimir_fast.methods.mixing import MixingConfig
from mimir_fast.methods.registry import all_methods
from mimir_fast.models.classifier import ClassifierConfig
from mimir_fast.models.families import all_families
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.probing.config import ProbingConfig
from mimir_fast.publish import HubConfig
from mimir_fast.recipes import find_recipe
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig, with_method
from mimir_fast.training.run_folder import flatten
from mimir_fast.validation import idle_options, refuse_idle, without


def pretraining(method: str = "mimir", family: str = "vit") -> PretrainConfig:
    return with_method(find_recipe(PretrainConfig, f"digits/mimir_{family}_nano"), method)


def finetuning(method: str = "pgd", **changes: Any) -> FinetuneConfig:
    return replace(find_recipe(FinetuneConfig, "digits/pgd_vit_nano"), method=method, **changes)


def with_attack(config: Any, **values: Any) -> Any:
    return replace(config, objective=replace(config.objective, attack=replace(config.objective.attack, **values)))


def with_mi(**values: Any) -> PretrainConfig:
    config: Any = pretraining()
    return replace(config, objective=replace(config.objective, mi=replace(config.objective.mi, **values)))


def with_mixing(**values: float) -> FinetuneConfig:
    config: Any = finetuning()
    return replace(config, objective=replace(config.objective, mixing=MixingConfig(**values)))


def with_optim(**values: Any) -> PretrainConfig:
    return replace(pretraining(), optim=replace(pretraining().optim, **values))


RESIZED, GENERATED = {"augment": "resized_crop"}, {"generated": "edm.npz"}
EVALUATED = EvaluateConfig("run")
PROBED = ProbingConfig("run", probes=("logistic",), attack_images=0)

# (configuration, an option that does nothing in it, what the message says is off)
REFUSED: list[tuple[Any, str, str]] = [
    (finetuning(), "randaugment.magnitude", "--randaugment.num_ops is 0"),
    (finetuning(), "randaugment.fill", "--randaugment.num_ops is 0"),
    (finetuning(), "mixing.prob", "--mixing.mixup and --mixing.cutmix are 0"),
    (finetuning(), "mixing.switch_prob", "--mixing.mixup or --mixing.cutmix is 0"),
    (finetuning(), "lora.alpha", "--lora.rank is 0"),
    (finetuning(), "init_weights", "--init is empty"),
    (finetuning(), "data.hold_out", "--probe.num_images"),
    (finetuning(), "data.crop_padding", "--data.augment is not pad_crop"),
    (finetuning(), "data.generated_ratio", "--data.generated names no file"),
    (finetuning(), "model.drop_path_law", "--model.drop_path is 0"),
    (finetuning(probe=replace(finetuning().probe, num_images=0)), "probe.num_steps", "--probe.num_images is 0"),
    (finetuning("fast"), "attack.alpha", "--method fast"),
    (finetuning("natural"), "attack.num_steps", "--method natural"),
    (finetuning("apgd"), "attack.no_random_start", "--method apgd"),
    (with_attack(finetuning(), num_steps=0), "attack.alpha", "--attack.num_steps is 0"),
    (with_attack(finetuning("trades"), num_steps=0), "attack_mode", "--attack.num_steps is 0"),
    (finetuning(), "attack.whole_steps", "--attack.visible is 1"),
    (with_attack(finetuning(), num_steps=1), "attack.visible", "--attack.num_steps is at most --attack.whole_steps"),
    (with_attack(finetuning(), num_steps=1), "attack.ramp_steps", "--attack.num_steps is 1"),
    (finetuning("apgd"), "attack.ramp_steps", "--method apgd"),
    (finetuning("free"), "attack.every", "--method free"),
    (finetuning("ard_prm"), "attack.visible", "--method ard_prm"),
    (replace(finetuning(), model=ClassifierConfig(family="swin", encoder="nano", patch_size=2)),
     "model.train_pos_embed", "no position embedding"),
    (pretraining(), "init_part", "--init is empty"),
    (pretraining(), "data.root", "--data.source is digits, which reads no files"),
    (finetuning(), "data.root", "--data.source is digits, which reads no files"),
    (EVALUATED, "data.root", "--data.source is digits, which reads no files"),
    (PROBED, "data.loader", "takes the images as they are"),
    (EVALUATED, "data.resident_gib", "takes the test images as they are"),
    (PrepareConfig("images", "shards", "webdataset"), "channels", "--format is not raw"),
    (pretraining(), "data.crop_scale", "--data.augment is not resized_crop"),
    (pretraining(), "mi.alpha", "--mi.estimator is not renyi"),
    (pretraining(), "momentum", "--optimizer is not sgd"),
    (with_optim(lr=1e-3), "blr", "--lr is given"),
    (with_optim(lr_drops=(0.5,)), "min-lr", "--lr_drops"),
    (with_optim(optimizer="sgd"), "betas", "--optimizer is sgd"),
    (with_mi(estimator="none"), "mi.weight", "--mi.estimator is none"),
    (with_mi(estimator="none"), "mi.share", "--mi.estimator is none"),
    (with_mi(share=0.1), "mi.weight", "--mi.share sets the weight"),
    (with_mi(bandwidth="median"), "mi.sigma", "median"),
    (with_attack(pretraining(), num_steps=0), "attack.precision", "--attack.num_steps is 0"),
    (with_attack(pretraining("aemim"), num_steps=0), "attack.distance", "--attack.num_steps is 0"),
    *((pretraining(family=family), "model.positions", f"--model.family is {family}")
      for family in ("vit", "cait", "convstem", "swin", "convnext")),
    (EVALUATED, "mi_weight", "suite quick has no PGD-MI"),
    (EVALUATED, "autoattack_images", "AutoAttack does not run"),
    (EVALUATED, "pretrained_mean", "--pretrained names none"),
    (EVALUATED, "pretrained_options", "--pretrained names none"),
    (EVALUATED, "data.generated", "takes the test images as they are"),
    (EVALUATED, "surface_biases", "suite quick draws no loss surface"),
    (EVALUATED, "smoothing_draws", "--smoothing names no noise"),
    (EvaluateConfig("run", suite="corruptions"), "targets", "suite corruptions attacks nothing"),
    (PROBED, "neighbours", "knn is none of the --probes"),
    (PROBED, "eps", "--attack_images is 0"),
    (replace(PROBED, attack_images=8, eps=0.0), "attack_steps", "--eps is 0"),
    (PROBED, "data.hold_out", "takes the images as they are"),
    (replace(PROBED, pictures=False), "against", "there are no pictures"),
    (finetuning(), "init_image_size", "--init is empty"),
    (with_mixing(prob=0.0, mixup=0.8), "mixing.mixup", "--mixing.prob is 0"),
    (ExportConfig("run", "a.safetensors", "safetensors"), "domain", "--format safetensors"),
    (HubConfig("run", "folder"), "private", "--repo_id is empty"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "option", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_typed_without_its_switch_it_is_refused(config: Any, option: str, words: str) -> None:
    for typed in ([f"--{option}", "9"], [f"--{option}=9"]):
        with pytest.raises(ValueError, match=f"--{option} does nothing while ") as error:
            refuse_idle(config, typed)
        assert words in str(error.value)
    refuse_idle(config, ["--seed", "1"])


# The same with the switch on.
@pytest.mark.parametrize(
    ("config", "option"),
    [
        (replace(finetuning(), data=replace(finetuning().data, augment="pad_crop")), "data.crop_padding"),
        (replace(pretraining(), data=replace(pretraining().data, **RESIZED)), "data.crop_scale"),
        (replace(pretraining(), data=replace(pretraining().data, **GENERATED)), "data.generated_ratio"),
        (finetuning("natural"), "attack.eps"),  # the probe's
        (replace(pretraining(), data=replace(pretraining().data, source="fashion_mnist")), "data.root"),
        (finetuning("trades"), "attack.alpha"),
        (pretraining(family="xcit"), "model.positions"),
        (pretraining(family="convit"), "model.positions"),
        (EvaluateConfig("run", suite="full"), "mi_weight"),
        (EvaluateConfig("run", autoattack="yes"), "autoattack_images"),
        (EvaluateConfig("run", smoothing=(0.25,)), "smoothing_draws"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_with_its_switch_it_is_taken(config: Any, option: str) -> None:
    refuse_idle(config, [f"--{option}", "9"])


def test_a_command_refuses_what_is_typed_and_takes_what_a_recipe_has() -> None:
    words = "--randaugment.magnitude does nothing while --randaugment.num_ops is 0: change that too, or leave it out"
    with pytest.raises(ValueError, match=words):
        finetune.config_from(["--recipe", "digits/pgd_vit_nano", "--randaugment.magnitude", "9"])
    config = finetune.config_from(["--recipe", "digits/fast_vit_nano", "--attack.eps", "4/255"])
    assert config.objective.attack.num_steps == 5  # of the recipe, and not refused
    line = ["--recipe", "cifar10/mimir_convit_small_official", "--model.family", "vit"]
    assert pretrain.config_from(line).model.positions == "official"


def reachable() -> Iterator[Any]:
    for method in all_methods("pretrain"):
        for family in ("vit", "swin"):
            if method in ("mimir", "mae") or family == "vit":
                yield pretraining(method, family)
    yield with_mi(estimator="none")
    yield from (finetuning(method) for method in all_methods("finetune"))
    yield from (EVALUATED, PROBED, ExportConfig("run", "a.safetensors", "safetensors"), HubConfig("run", "folder"))
    yield PrepareConfig("images", "shards", "webdataset")


def test_every_declared_option_exists() -> None:
    declared = set()
    for config in reachable():
        names = {name for path in flatten(config) for name in (path, path.partition(".")[2])}
        assert set(idle_options(config)) <= names
        declared |= {(type(config), option) for option in idle_options(config)}
    assert len({option for _, option in declared}) >= 60 and len(declared) >= 100


def test_positions_make_another_encoder_where_a_family_says_so() -> None:
    for name, family in all_families().items():
        if name not in ("vit", "convit", "cait", "xcit", "convstem", "swin", "convnext"):
            continue
        encoders = []
        for positions in ("true", "official"):
            torch.manual_seed(0)
            patch = 2 if name in ("swin", "convnext") else 8
            config = ModelConfig(family=name, encoder="nano", patch_size=patch, positions=positions)
            encoders.append(build_masked_model(config, 32).encoder.eval())
        images = torch.rand(2, 3, 32, 32)
        keep = torch.tensor([[0, 3, 9, 14], [1, 2, 7, 12]])
        views = [encoder(patchify_gather(images, keep, encoder.mask_unit), keep) for encoder in encoders]
        assert torch.equal(*views) != family.kept_on_a_grid, name


@dataclass
class Inner:
    on: bool = False
    depth: int = 1

    def idle(self) -> dict[str, str]:
        return without(self.on, "--{}on is off", "depth")


@dataclass
class Outer:
    bare: Annotated[Inner, tyro.conf.arg(name="")] = field(default_factory=Inner)
    named: Inner = field(default_factory=Inner)


def test_flags_have_the_prefix_that_is_typed() -> None:
    assert idle_options(Outer()) == {"depth": "--on is off", "named.depth": "--named.on is off"}
    assert idle_options(Outer(named=Inner(on=True))) == {"depth": "--on is off"}
