"""What timm's ViTs have beside the plain form: equal to timm in features and logits, or refused by a tensor's name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from family_checks import CHECKS, Case, check_equals_timm, check_recognised, shaken
from file_state import file_state
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from mimir_fast.data import DataConfig
from mimir_fast.data.batch import Batch
from mimir_fast.layers.inspection import calls
from mimir_fast.methods.mutual_information import MutualInformationConfig, mutual_information
from mimir_fast.methods.registry import find_method
from mimir_fast.models.blocks import most_attended
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.families import Architecture, architecture_of, informed, recognise
from mimir_fast.models.families.vit import shortest_ratio
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.models.loading import infer_architecture, initialize
from mimir_fast.models.masked_loading import load_masked_model
from mimir_fast.models.masked_model import ModelConfig
from mimir_fast.models.options import option_texts, parse_options
from mimir_fast.models.weight_files import Weights, WeightsError
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import parameter_groups
from mimir_fast.training.pretraining import PretrainConfig, pretrain, with_method

SMALL = {"embed_dim": 96, "num_heads": 3}
# timm's name: changes that keep it quick (and what is its own: mlp ratio, GELU, eps, biases, pooling).
EQUAL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_base_patch8_224": SMALL,
    "vit_large_patch14_224": SMALL,
    "vit_huge_patch14_224": SMALL,
    "vit_giant_patch14_224": SMALL,
    "vit_base_patch16_224_miil": SMALL,
    "eva_large_patch14_196": SMALL,
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "deit3_medium_patch16_224": SMALL,
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch14_reg1_tipsv2": SMALL,
    "flexivit_small": SMALL,
    "vit_base_patch16_plus_240": SMALL,
    "vit_small_patch16_36x1_224": SMALL,
    "vit_medium_patch16_gap_240": SMALL,
    "vit_base_patch16_gap_224": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch32_clip_quickgelu_224": SMALL,
    "vit_gigantic_patch14_clip_224": SMALL,
    "vit_base_patch32_siglip_gap_256": SMALL,
    "vit_so400m_patch14_siglip_gap_224": SMALL,
    "vit_wee_patch16_reg1_gap_256": {},
    "vit_little_patch16_reg4_gap_256": {},
    "vit_so150m_patch16_reg4_gap_256": SMALL,
    "vit_so150m2_patch16_reg1_gap_256": SMALL,
    "test_vit": {},
    "test_vit2": {},
}
REFUSED = {
    "vit_base_patch16_siglip_224": "attn_pool.",
    "vit_giant_patch14_dinov2": "blocks.0.mlp.fc2.weight",  # SwiGLU
    "aimv2_large_patch14_224": "blocks.0.mlp.fc1_g.weight",
    "beit3_base_patch16_224": "blocks.0.attn.norm.",
    "beit_base_patch16_224": "blocks.0.attn.q_bias",
    "eva02_tiny_patch14_224": "blocks.0.",
    "eva_giant_patch14_224": "blocks.0.attn.q_bias",
    "vit_base_patch16_rope_mixed_ape_224": "blocks.0.gamma_1",
    "vit_relpos_small_patch16_224": "blocks.0.attn.rel_pos",
    "samvit_base_patch16": "blocks.0.attn.rel_pos_h",
    "vit_base_patch16_xp_224": "blocks.0.",  # attention and MLP side by side
    "vit_small_patch16_18x2_224": "blocks.0.",
    "vit_dwee_patch16_reg1_gap_256": "blocks.0.attn.lambda_",
    "vit_base_patch16_radio_v3": "norm.weight",  # no final norm
    "test_vit4": "blocks.0.norm1.bias",  # RMS norms
}
PATCH = {name: next((p for p in (8, 14, 32) if f"patch{p}_" in name), 16) for name in EQUAL | REFUSED}


def of_timm(name: str, **options: Any) -> Any:
    """Random weights, two layers, three patches a side, no parameter at a value that hides a mistake."""
    torch.manual_seed(0)
    sizes = {"img_size": 3 * PATCH.get(name, 16), "depth": 2, "num_classes": 10}
    return shaken(timm.create_model(name, **sizes | options)).eval()


def facts(model: VisionTransformer) -> tuple[str, ...]:
    """What no tensor shows."""
    block: Any = model.blocks[0]
    gelu = {"QuickGELU": "quick", "GELUTanh": "tanh"}.get(type(block.mlp.act).__name__, "erf")
    return f"heads={block.attn.num_heads}", f"eps={block.norm1.eps}", f"gelu={gelu}"


@pytest.mark.parametrize("name", EQUAL)
def test_equals_timm(name: str, tmp_path: Path) -> None:
    theirs, path = of_timm(name, **EQUAL[name]), tmp_path / "timm.safetensors"
    save_file(theirs.state_dict(), path)
    ours = load_classifier(path, options=facts(theirs), image_size=theirs.patch_embed.img_size[0])
    images = torch.rand(2, 3, ours.image_size, ours.image_size)
    with torch.no_grad():
        for got, wanted in (
            (ours.forward_features(images), theirs.forward_features(images)),
            (ours(images), theirs(images)),
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    again = build_classifier(ours.config, ours.image_size, 10)  # the configuration holds all of it
    assert again.encoder.options == ours.encoder.options


@pytest.mark.parametrize("name", REFUSED)
def test_relatives_are_refused_by_a_tensor(name: str) -> None:
    with torch.device("meta"):  # names and shapes decide
        tensors = timm.create_model(name, img_size=3 * PATCH[name], depth=2).state_dict()
    assert recognise(tensors) is None
    with pytest.raises(WeightsError, match="no encoder of ours") as error:
        infer_architecture(Weights(tensors, name))
    assert REFUSED[name] in str(error.value)


CASES = {
    text: Case("vit", "nano", 32, 8, options=tuple(text.split()))
    for text in (
        "layer_scale registers=4", "qk_norm pre_norm eps=1e-05", "distilled gelu=tanh", "no_cls_token",
        "no_prefix_positions heads=6 qkv_bias=false", "no_cls_token registers=1",
        "width=64 depth=2 mlp_ratio=3.0 gelu=quick layer_scale qk_norm registers=2 no_prefix_positions",
    )
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_what_every_family_must_do(text: str) -> None:
    case = CASES[text]
    for check in CHECKS:
        if check is not check_recognised:
            check(case)
    for model in (case.encoder(), case.masked_model(), case.classifier()):
        found = recognise(file_state(model))
        assert found is not None and informed(found, model_options(model)) == case.architecture


def model_options(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "encoder", model).options)


@pytest.mark.parametrize("text", [*CASES, "no_cls_token norm_before_pool"])
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_the_export_is_the_same_model_in_timm(text: str, pool: str) -> None:
    if pool == "cls" and "no_cls_token" in text:
        with pytest.raises(ValueError, match="no cls token: use global_pool avg"):
            Case("vit", "nano", 32, 8, options=tuple(text.split())).classifier(global_pool=pool)
        return
    if pool == "avg" and "distilled" in text:
        pytest.skip("timm's distilled ViT reads its two class tokens")
    check_equals_timm(Case("vit", "nano", 32, 8, options=tuple(text.split())), global_pool=pool)


def batch_of(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(count) % 3, torch.arange(count), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("method", ["mimir", "aemim"])
@pytest.mark.parametrize("text", CASES)
def test_pre_training_reaches_every_parameter(text: str, method: str) -> None:
    entry = find_method("pretrain", method)
    model = CASES[text].masked_model()
    if method == "aemim":
        model.encoder.add_adapters()
    out = entry.build(entry.config())(model, batch_of(), seed=0, step=0)
    out["loss"].backward()
    trained = {name: p.grad for name, p in parameters_by_file_name(model) if p.requires_grad}
    silent = [name for name, grad in trained.items() if grad is None or not grad.any()]
    assert out["loss"].isfinite() and not silent, silent


def test_pooled_information_leaves_the_whole_prefix_out() -> None:
    config, images = MutualInformationConfig(tokens="pooled"), torch.rand(8, 4, 12)
    latent, other = torch.rand(2, 8, 6, 5)
    mixed = torch.cat([other[:, :3], latent[:, 3:]], dim=1)
    same = (mutual_information(config, images, x, num_prefix=3) for x in (latent, mixed))
    assert torch.equal(*same)
    assert not torch.equal(*(mutual_information(config, images, x, num_prefix=2) for x in (latent, mixed)))


def test_token_dropping_keeps_the_prefix() -> None:
    received = torch.tensor([[0.0, 0.0, 5.0, 1.0, 4.0], [0.0, 0.0, 1.0, 2.0, 3.0]])
    assert most_attended(received, 3, 2).tolist() == [[0, 1, 2], [0, 1, 4]]
    model = Case("vit", "nano", 32, 8, options=("registers=4", "qk_norm", "layer_scale")).classifier(
        token_keep_rate=0.5
    )
    images = torch.rand(2, 3, 32, 32)
    assert model.forward_features(images).shape[1] == 5 + 16
    assert model.train().forward_features(images).shape[1] == 5 + 1


def test_fused_paths_decline() -> None:
    """With the exact blocks of a plain model the fused ones run; where an option changes these, they do not."""
    images = torch.rand(2, 3, 32, 32)
    for text, whole in (("registers=4", True), ("layer_scale", False), ("qk_norm", False), ("gelu=tanh", False)):
        model = Case("vit", "nano", 32, 8, options=(text,)).classifier()
        before = calls["fp32 block"]
        with torch.no_grad():
            model(images)
        assert (calls["fp32 block"] > before) <= whole, text


def test_learning_rates_and_weight_decay_know_the_new_parameters() -> None:
    model = Case("vit", "nano", 32, 8, options=("layer_scale", "qk_norm", "pre_norm", "registers=4")).masked_model()
    assert {model.layer_of(name) for name in ("reg_token", "dist_token", "norm_pre.weight", "cls_token")} == {0}
    assert model.layer_of("blocks.2.ls1.gamma") == model.layer_of("blocks.2.attn.q_norm.weight") == 3
    decayed = {id(p) for group in parameter_groups(model, 0.1, 0.7) if group["weight_decay"] for p in group["params"]}
    named = {name: p for name, p in parameters_by_file_name(model) if p.requires_grad}
    assert {name for name, p in named.items() if id(p) in decayed} == {
        name for name, p in named.items() if p.ndim > 1 and not name.endswith("_token")
    }


def test_options_survive_runs_and_fine_tuning(tmp_path: Path) -> None:
    options = ("heads=6", "eps=1e-05", "layer_scale", "registers=2")
    config = PretrainConfig(
        model=ModelConfig(encoder="nano", patch_size=8, options=options),
        data=DataConfig(source="digits", image_size=32, limit=32),
        run=RunConfig(batch_size=8, max_steps=2, save_every=1, device="cpu", output_dir=str(tmp_path / "run")),
    )
    config = with_method(config, "mae")
    pretrain(replace(config, run=replace(config.run, stop_after=1)))
    run = pretrain(config)  # goes on from its checkpoint
    model, _ = load_masked_model(run)
    assert model.encoder.options == config.model.architecture(32).options
    assert model.encoder.num_heads == 6

    def tuned(*texts: str) -> Any:
        return build_classifier(ClassifierConfig(encoder="nano", patch_size=8, options=texts), 32, 3)

    assert initialize(tuned(*options), run).fresh == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    fix = "To use it: --model.options heads=6 eps=1e-05 layer_scale registers=2"
    for texts in ((), ("layer_scale", "registers=2"), ("layer_scale", "registers=2", "heads=6")):
        with pytest.raises(WeightsError, match=fix):
            initialize(tuned(*texts), run)
    plain = Weights(file_state(Case("vit", "nano", 32, 8).masked_model()), "plain")
    with pytest.raises(WeightsError, match=r"To use it: leave --model\.options out"):
        initialize(tuned("layer_scale"), plain)


@pytest.mark.parametrize("text", ["distilled", "registers=2", "registers=2 no_prefix_positions"])
def test_positions_are_resized_behind_the_prefix(text: str) -> None:
    options = tuple(text.split())
    source = Case("vit", "nano", 32, 8, options=options).masked_model()
    model = build_classifier(ClassifierConfig(encoder="nano", patch_size=8, options=options), 48, 3)
    initialize(model, Weights(file_state(source), "pre-trained"))
    old, new, rows = source.encoder.pos_embed, model.encoder.pos_embed, 0 if "no_prefix" in text else 3
    rows = 2 if text == "distilled" else rows
    assert new.shape[1] - old.shape[1] == 36 - 16 and torch.equal(new[:, :rows], old[:, :rows])
    torch.testing.assert_close(new[:, rows:].mean(1), old[:, rows:].mean(1), rtol=0.1, atol=0.05)


def test_configurations_without_the_field_load() -> None:
    old = {"family": "vit", "encoder": "nano", "patch_size": 8}
    assert ModelConfig(**old).options == ClassifierConfig(**old).options == ()
    from_json: Any = ["layer_scale"]
    assert ModelConfig(**old, options=from_json).options == ("layer_scale",)


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("vit", "layerscale", "did you mean layer_scale?"),
        ("swin", "layer_scale", "Swin has none"),
        ("vit", "heads=5", "width 96 is not divisible by 5 heads"),
        ("vit", "heads=three", "heads='three', wanted a whole number"),
        ("vit", "gelu=relu", "wanted one of erf, tanh, quick"),
        ("vit", "eps=0", "eps=0, wanted more than 0"),
        ("vit", "layer_scale=maybe", "wanted one of true, 1, false, 0"),
        ("vit", "registers=-1", "registers=-1, wanted at least 0"),
        ("vit", "registers=2 registers=3", "given twice"),
        ("vit", "distilled registers=2", "cls token and no registers"),
        ("convit", "local_up_to_layer=9", "choose 0 to 3"),
    ],
)
def test_bad_options_name_the_fix(family: str, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(family=family, encoder="nano", options=tuple(text.split()))
    assert message in str(error.value)


def test_other_families_take_theirs() -> None:
    for family in ("convit", "cait", "xcit"):
        case = Case(family, "nano", 32, 8, options=("qkv_bias=false",))
        for model in (case.masked_model(), case.classifier()):
            found = recognise(file_state(model))
            assert found is not None and found.options == {"qkv_bias": False} == model.encoder.options
    case = Case("convit", "nano", 32, 8, options=("local_up_to_layer=2",))
    assert recognise(file_state(case.classifier())) == case.architecture


def test_one_way_to_say_the_same() -> None:
    def vit(size: str, *texts: str) -> Architecture:
        return architecture_of("vit", size, 32, 8, 3, texts)

    assert vit("base", "width=192", "heads=3") == vit("tiny", "heads=3", "layer_scale=false") == vit("tiny")
    assert vit("base", "width=192", "depth=2") == vit("tiny", "depth=2")
    assert option_texts(vit("small", "heads=12", "eps=1e-5", "layer_scale").options) == (
        "heads=12", "eps=1e-05", "layer_scale",
    )  # fmt: skip
    known = {"a": False, "b": True, "c": 1.0}
    options = parse_options(["b=false", "a", "c=2"], known, "X")
    assert parse_options(option_texts(options), known, "X") == options == {"a": True, "b": False, "c": 2.0}


@pytest.mark.parametrize(("hidden", "width", "ratio"), [(4304, 1152, 3.7362), (2304, 896, 2.572), (1792, 320, 5.6)])
def test_mlp_ratios_are_what_was_typed(hidden: int, width: int, ratio: float) -> None:
    assert shortest_ratio(hidden, width) == ratio and int(width * ratio) == hidden
