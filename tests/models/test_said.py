"""What no tensor shows of a model: the file says it, or the user, or it stands under "assumed"."""

import argparse
import functools
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import shaken
from file_state import file_state
from safetensors.torch import save_file
from torch import nn

from mimir_fast.models.classifier import ClassifierConfig, build_classifier, classifier_of, load_classifier
from mimir_fast.models.facts import Asked, Facts, facts_of_args, facts_of_arguments
from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts.timm import facts_of_name
from mimir_fast.models.loading import initialize, inspect_weights
from mimir_fast.models.weight_files import Weights, WeightsError, read_weights

timm = pytest.importorskip("timm")
SMALL = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 96, "num_heads": 3}
ODD: dict[str, Any] = {"num_heads": 6, "act_layer": "gelu_tanh", "global_pool": "avg", "fc_norm": False,
                       "norm_layer": functools.partial(nn.LayerNorm, eps=1e-3)}  # fmt: skip
ASKED = Asked(("heads=6", "eps=1e-3", "gelu=tanh"), "avg")


def of_timm(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        return shaken(timm.create_model(name, num_classes=10, **SMALL | options)).eval()


def check(model: Any, weights: Weights, size: Any = None) -> list[str]:
    """Equal logits to 1e-5; what the report says was assumed."""
    ours, report = classifier_of(weights, image_size=size)
    images = torch.rand(2, 3, 32, 32) if size is None else torch.rand(2, 3, *size)
    with torch.no_grad():
        wanted = model((images - ours.normalizer.mean) / ours.normalizer.std)
        torch.testing.assert_close(ours(images), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    return report.assumed


NAMED: list[tuple[str, dict[str, Any]]] = [
    ("vit_base_patch32_clip_quickgelu_224", {"num_heads": 6}),  # quick GELU and eps 1e-5 by name alone
    ("vit_tiny_patch16_224", {"num_heads": 6, "global_pool": "avg", "fc_norm": False}),
    ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
]


@pytest.mark.parametrize(("name", "choices"), NAMED)
def test_a_folder_of_timm_says_it(name: str, choices: dict[str, Any], tmp_path: Path) -> None:
    """`architecture`, `model_args` and `global_pool` of its config.json: logits were off by up to 170 %."""
    model = of_timm(name, **choices)
    timm.models.save_for_hf(model, tmp_path, model_args=SMALL | choices)
    assert check(model, read_weights(tmp_path)) == []


@pytest.mark.parametrize(("name", "choices"), NAMED)
def test_options_of_timms_training_script_say_it(name: str, choices: dict[str, Any], tmp_path: Path) -> None:
    model, pool = of_timm(name, **choices), choices.get("global_pool")
    kwargs = {n: value for n, value in (SMALL | choices).items() if n != "global_pool"}
    args = argparse.Namespace(model=name, model_kwargs=kwargs, gp=pool, input_size=None, img_size=32)
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "last.pth.tar")
    assert check(model, read_weights(tmp_path / "last.pth.tar")) == ["normalisation none"]


def test_options_of_other_scripts() -> None:
    assert facts_of_args({"num_heads": 6, "global_pool": "avg", "img_size": [32, 48], "input_size": None}) == Facts(
        heads=6, pool="avg", image_size=(32, 48)
    )
    assert facts_of_args(argparse.Namespace(global_pool=False, gp="max", num_heads=True)) == Facts(pool="max")
    for norm, eps in (("functools.partial(LayerNorm, eps=1e-05)", 1e-5), ("eps=..-", None), ("layernorm", None)):
        assert facts_of_arguments({"norm_layer": norm, "num_heads": "6", "global_pool": 3}) == Facts(eps=eps)
    tensors = of_timm().state_dict()
    assert facts_of_name("vit_tiny_patch16_224", SMALL, tensors).heads == 3
    for name in ("mae_vit_base", "hf-hub:timm/vit_tiny_patch16_224", "vit_base_patch16_224", None):
        assert facts_of_name(name, {}, tensors) == Facts()  # unknown, not to be downloaded, of other shapes


def test_a_user_says_it(tmp_path: Path) -> None:
    """Heads, eps, GELU and pooling of a bare file; a file of ours keeps them, without making the rest known."""
    from mimir_fast.export import ExportConfig, export

    model, path, ours = of_timm(**ODD), tmp_path / "bare.safetensors", tmp_path / "ours.safetensors"
    save_file(model.state_dict(), path)
    _, report = classifier_of(read_weights(path))
    assert report.assumed == [
        "3 heads", "eps 1e-06", "GELU erf", "pooling cls", "normalisation none", "images of 32 x 32",
    ]  # fmt: skip
    assert "--options heads=12 eps=1e-5 gelu=tanh, --global_pool avg" in str(report)
    assert check(model, read_weights(path, asked=ASKED)) == ["normalisation none", "images of 32 x 32"]
    flags = {"options": ASKED.options, "global_pool": ASKED.pool}
    for form in ("safetensors", "timm"):
        export(ExportConfig(str(path), str(ours), format=form, overwrite=True, **flags))  # type: ignore[arg-type]
        assert "normalisation none" in check(model, read_weights(ours))
    _, report = classifier_of(read_weights(ours, asked=Asked(("heads=3", "eps=1e-6"), "cls")))
    assert [note.split()[0] for note in report.notes] == ["heads=3", "eps=1e-06", "pooling"]
    for text, reason in (("head=6", "did you mean heads"), ("layer_scale", "tensors say"), ("heads=5", "divisible")):
        with pytest.raises(ValueError, match=reason):
            load_classifier(path, options=[text])


def test_evaluate_probe_and_hub_take_it(tmp_path: Path) -> None:
    from mimir_fast.evaluate import config_from
    from mimir_fast.evaluation.adapters import load_model
    from mimir_fast.hub import HubClassifier
    from mimir_fast.probe import config_from as probe_config
    from mimir_fast.probing.encoder import open_encoder
    from mimir_fast.publish import HubConfig, publish

    model, path = of_timm(**ODD), tmp_path / "bare.safetensors"
    save_file(model.state_dict(), path)
    images, options = torch.rand(2, 3, 32, 32), [*("--options", *ASKED.options)]
    config = config_from(["--checkpoint", str(path), *options, "--global_pool", "avg"])
    told = Asked(config.options, config.global_pool)
    shared: dict[str, Any] = {"num_classes": 10, "device": torch.device("cpu")}
    judged, plain = load_model(str(path), told=told, **shared), load_model(str(path), **shared)
    assert judged.digest() != plain.digest()  # an evaluation of the one does not go on with the other
    publish(HubConfig(str(path), output=str(tmp_path / "hub"), options=ASKED.options, global_pool="avg"))
    probing = probe_config(["--checkpoint", str(path), *options, "--pool", "mean"])
    encoder, _ = open_encoder(str(path), probing.data, pool=probing.pool, asked=Asked(probing.options))
    with torch.no_grad():
        wanted, tokens = model(images), model.forward_features(images)[:, 1:].mean(1)
        for found in (judged.module(images), HubClassifier.from_pretrained(str(tmp_path / "hub"))(images)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(encoder(images), tokens, rtol=0, atol=1e-5 * float(tokens.abs().max()))
    with pytest.raises(ValueError, match="leave --options"):
        load_model("timm:resnet18@random", told=told, **shared)
    with pytest.raises(ValueError, match="leave it out"):
        load_model("timm:resnet18@random", part="teacher", **shared)


@pytest.mark.parametrize("kind", ["Cait", "Xcit", "ConVit"])
def test_pooling_of_class_attention(kind: str, tmp_path: Path) -> None:
    """The mean of the tokens has the tensors of the cls token: logits were off by up to 240 %, without a word."""
    from timm.models import cait, convit, xcit

    more: dict[str, Any] = {"Cait": {}, "Xcit": {"tokens_norm": False}, "ConVit": {"embed_dim": 24}}[kind]
    module: Any = {"Cait": cait, "Xcit": xcit, "ConVit": convit}[kind]
    torch.manual_seed(0)
    sizes = SMALL | {"depth": 4, "num_heads": 4, "num_classes": 10, "global_pool": "avg"} | more
    model = shaken(getattr(module, kind)(**sizes)).eval()
    path, options = tmp_path / "bare.safetensors", ("tokens_norm=false",) if kind == "Xcit" else ()
    save_file(model.state_dict(), path)
    _, report = inspect_weights(read_weights(path))
    assert "pooling cls" in report.assumed and ("tokens_norm true" in report.assumed) == (kind == "Xcit")
    asked = Asked(options, "avg", 32)
    assert check(model, read_weights(path, asked=asked))[-1] == "normalisation none"
    args = {"model_kwargs": {"tokens_norm": False}, "gp": "avg", "img_size": 32}
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "told.pth")
    assert check(model, read_weights(tmp_path / "told.pth"))[-1] == "normalisation none"


@pytest.mark.parametrize("family", ["vit", "cait", "xcit", "convit"])
def test_a_run_keeps_its_pooling(family: str, tmp_path: Path) -> None:
    """The mean of normed tokens, where a cls token is too, was evaluated as the cls token; timm's class has it."""
    from mimir_fast.export import ExportConfig, export

    config = ClassifierConfig(family, "nano", 8, "avg", options=("norm_before_pool",))
    model = shaken(build_classifier(config, 32, 10)).eval()
    saved = {"model": asdict(config), "data": {"image_size": 32}}
    loaded, images = load_classifier(Weights(file_state(model), "a.file", config=saved)), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert torch.equal(build_classifier(loaded.config, 32, 10).fc_norm(images), images)  # its configuration says it too
    metadata = {"format": "mimir_fast", "config": json.dumps(saved)}
    save_file(file_state(model), tmp_path / "a.safetensors", metadata=metadata)
    export(ExportConfig(str(tmp_path / "a.safetensors"), str(tmp_path / "timm.safetensors")))  # compares
    assert load_classifier(tmp_path / "timm.safetensors").config.global_pool == "avg"


def test_a_file_for_a_model_of_timm_is_believed(tmp_path: Path) -> None:
    """timm:NAME@FILE had NAME's heads and normalisation, whatever the file says."""
    from mimir_fast.evaluation.timm_files import fill

    model, path = of_timm(), tmp_path / "last.pth.tar"
    args = {"model_kwargs": {}, "mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
    torch.save({"state_dict": model.state_dict(), "args": args}, path)
    assert fill(model, path, "NAME")[0] == ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    torch.save({"state_dict": model.state_dict(), "args": args | {"model_kwargs": {"num_heads": 6}}}, path)
    with pytest.raises(WeightsError, match="says heads 6, timm's NAME has 3"):
        fill(model, path, "NAME")


def test_what_a_family_has_not_is_said_or_refused() -> None:
    from timm.models.convnext import ConvNeXt

    tensors = under_our_names(ConvNeXt(num_classes=10).state_dict())
    weights = Weights(tensors, "a.file", facts=Facts(eps=1e-5, gelu="erf", pool="avg", image_size=64))
    ours, report = classifier_of(weights)
    assert ours.config.options == ("eps=1e-05",) and report.assumed == ["normalisation none"]
    with pytest.raises(WeightsError, match="says gelu tanh, our ConvNeXt has erf"):
        classifier_of(Weights(tensors, "a.file", facts=Facts(gelu="tanh")))
    for choices, reason in (({"norm_eps": 1e-5}, "eps 1e-05"), ({"output_stride": 16}, "dilated")):
        with pytest.raises(WeightsError, match=reason):  # of all norms, and not of the last alone as transformers says
            facts_of_name("convnext_tiny", choices, timm.create_model("convnext_tiny", **choices).state_dict())


@pytest.mark.parametrize(("choices", "reason"), [
    ({"global_pool": "max", "fc_norm": False}, "pools its tokens by max"), ({"act_layer": "relu"}, "is ReLU"),
    ({"global_pool": "avg", "pool_include_prefix": True}, "pools its tokens by prefix"),
])  # fmt: skip
def test_what_no_encoder_of_ours_has_is_refused(choices: dict[str, Any], reason: str, tmp_path: Path) -> None:
    timm.models.save_for_hf(of_timm(**choices), tmp_path, model_args=SMALL | choices)
    with pytest.raises(WeightsError, match=reason):
        load_classifier(tmp_path)


def into(size: Any, *options: str) -> Any:
    config = ClassifierConfig("vit", "nano", 8, "cls", options=("depth=2", *options))
    return build_classifier(config, size, 10)


def test_grids_of_n_by_n_plus_2() -> None:
    """4 x 6 patches and a cls token have as many positions as 5 x 5 patches alone: nobody guesses which."""
    model = of_timm(img_size=(32, 48))
    weights = Weights(dict(model.state_dict()), "a.file")
    check(model, weights, (32, 48))
    for action in (
        lambda: classifier_of(weights), lambda: classifier_of(weights, image_size=32), lambda: inspect_weights(weights),
        lambda: initialize(into(32), weights), lambda: initialize(into(40), weights),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=r"40 x 40 pixels.*32 x 48.*--init_image_size"):
            action()
    assert initialize(into((32, 48)), weights).resized == []
    weights.asked = Asked(image_size=(32, 48))
    inspect_weights(weights)
    assert len(initialize(into(32), weights).resized) == 1
    with pytest.raises(WeightsError, match="say another size"):
        inspect_weights(Weights(weights.tensors, "a.file", asked=Asked(image_size=32)))


def test_a_typed_size_is_obeyed() -> None:
    """2 x 8 patches are as many as 4 x 4."""
    model = of_timm(img_size=(16, 64))
    weights = Weights(dict(model.state_dict()), "a.file")
    check(model, weights, (16, 64))
    with pytest.raises(WeightsError, match=r"32 x 32 pixels or of 16 x 64.*--init_image_size"):
        initialize(into((16, 64)), weights)
    for size, resized in ((32, 1), ((16, 64), 0)):
        weights.asked = Asked(image_size=size)
        assert len(initialize(into((16, 64)), weights).resized) == resized


def test_advice_keeps_what_was_typed() -> None:
    """`--model.options` as it is advised has the heads that only the user knows."""
    weights = Weights(dict(of_timm(num_heads=6, init_values=0.1).state_dict()), "a.file")
    with pytest.raises(WeightsError, match=r"--model\.options layer_scale depth=2 heads=6"):
        initialize(into(32, "heads=6"), weights)


def test_a_run_is_not_overridden_in_silence(tmp_path: Path) -> None:
    """A run keeps no option that has its default, but it was trained with it."""
    config = ClassifierConfig(encoder="nano", patch_size=8, global_pool="cls")
    tensors = file_state(build_classifier(config, 32, 10))
    kept = {"model": asdict(config), "data": {"image_size": 32}}
    save_file(tensors, tmp_path / "run.safetensors", metadata={"format": "mimir_fast", "config": json.dumps(kept)})
    notes = classifier_of(read_weights(tmp_path / "run.safetensors", asked=Asked(("heads=6", "eps=1e-2"))))[1].notes
    assert notes == [f"{text} as asked, in place of what the run was trained with" for text in ("heads=6", "eps=0.01")]
    assert not classifier_of(read_weights(tmp_path / "run.safetensors", asked=Asked(("heads=3",))))[1].notes
    sized = read_weights(tmp_path / "run.safetensors", asked=Asked(image_size=(64, 16)))
    assert classifier_of(sized)[1].notes == [
        "images of 64 x 16 pixels as asked, in place of 32 x 32 that the weights say"
    ]


@pytest.mark.parametrize("form", ["timm", "hf", "safetensors"])
def test_a_norm_of_the_cls_token_alone(form: str, tmp_path: Path) -> None:
    """timm's `fc_norm` with the pooling `token` is the norm in front of the head; no format wrote it, nor said why."""
    from mimir_fast.export import ExportConfig, export

    if form == "hf":
        pytest.importorskip("transformers")
    choices: dict[str, Any] = {"fc_norm": True, "global_pool": "token"}
    model, folder = of_timm(**choices), tmp_path / "hub"
    timm.models.save_for_hf(model, folder, model_args=SMALL | choices)
    path = tmp_path / ("out" if form == "hf" else "out.safetensors")
    export(ExportConfig(str(folder), str(path), format=form))  # compares by the library's own reader
    for source in (folder, path):
        check(model, read_weights(source))


def test_a_head_on_another_pooling_starts_fresh() -> None:
    """With the norm in front of the mean the tensors are those of the cls token: it went on from a head of other
    features."""
    model = of_timm(global_pool="avg", fc_norm=False)
    for pool, fresh in (("avg", True), ("cls", False), (None, False)):
        weights = Weights(dict(model.state_dict()), "a.file", facts=Facts(pool=pool, image_size=32))
        report = initialize(into(32), weights)
        assert ("head.weight" in report.fresh) == fresh
        assert any("another pooling" in reason for reason in report.reasons.values()) == fresh


def test_a_decoder_with_other_heads_starts_fresh() -> None:
    """Its tensors have the shapes of ours."""
    from mimir_fast.models.masked_init import initialize_masked
    from mimir_fast.models.masked_model import ModelConfig, build_masked_model

    config = ModelConfig(encoder="nano", patch_size=8)
    tensors = file_state(build_masked_model(config, 32))
    for heads, words in ((8, "not the model's"), (16, "with norm_pix_loss false")):
        facts = Facts(decoder_heads=heads, norm_pixels=False, image_size=32)
        report = initialize_masked(build_masked_model(config, 32), Weights(tensors, "a.file", facts=facts))
        assert any("decoder" in note and words in note for note in report.notes)
        assert ("decoder_pred.weight" in report.fresh) == (heads == 8)


def test_advice_on_a_size_has_the_flags_of_every_command() -> None:
    from timm.models.swin_transformer import SwinTransformer

    sizes: dict[str, Any] = {"patch_size": 2, "embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8)}
    model = SwinTransformer(img_size=64, window_size=4, **sizes)
    weights = Weights(under_our_names(model.state_dict()), "a.file")
    with pytest.raises(
        WeightsError, match=r"--data\.image_size 32 \(evaluate, probe\), --image_size 32 \(export, hub\)"
    ):
        classifier_of(weights, image_size=64)


def test_windows_that_are_always_moved(tmp_path: Path) -> None:
    """timm's `always_partition` moves them in the last stage, too: logits were off by 0.4 %, without a word."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2, 2], "window_size": 4,
                             "num_heads": [2, 4, 8], "always_partition": True}  # fmt: skip
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes)
    timm.models.save_for_hf(model, tmp_path, model_args=sizes)
    with pytest.raises(WeightsError, match="always_partition"):
        load_classifier(tmp_path)


def test_heads_that_a_norm_of_queries_shows() -> None:
    """As wide as a head: a file of 12 heads was compared with 6 that nobody said."""
    from weight_cases import vit

    model = vit(embed_dim=128, num_heads=4, qk_norm=True)
    weights = Weights(dict(model.state_dict()), "a.file")
    assert "heads" not in " ".join(check(model, weights))
    with pytest.raises(WeightsError, match=r"--model\.options heads=4 qk_norm width=128"):
        initialize(into(32), weights)


def test_heads_that_do_not_divide_the_width() -> None:
    tensors = under_our_names(of_timm(embed_dim=64, num_heads=2).state_dict())
    said = Weights(tensors, "a.file", facts=Facts(heads=3, eps=1e-6))
    with pytest.raises(WeightsError, match=r"heads that fit: 1, 2, 4, 8: the file says heads 3, and --options \("):
        classifier_of(said)
    with pytest.raises(WeightsError, match=r"not divisible by 5 heads; heads that fit: 1, 2, 4, 8$"):
        classifier_of(Weights(tensors, "a.file", facts=Facts(heads=3), asked=Asked(("heads=5",))))


def test_a_cait_of_another_size_is_no_vit_with_too_much() -> None:
    from timm.models.cait import Cait

    tensors = under_our_names(Cait(**SMALL | {"num_heads": 2, "depth": 3}).state_dict())
    with pytest.raises(WeightsError, match=r"no encoder of ours\. Those are CaiT"):
        classifier_of(Weights(tensors, "a.file"))
