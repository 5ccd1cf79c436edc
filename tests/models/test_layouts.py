"""Every layout of the field: equal to its own package, or refused by the name of a tensor; and the table of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from weight_cases import CASES, IMAGE, NEEDS_TRANSFORMERS, Written, transformers, vit

from mimir_fast.export import ExportConfig, export
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, classifier_of, load_classifier
from mimir_fast.models.facts import Asked, Facts
from mimir_fast.models.families import build_encoder, find_family
from mimir_fast.models.layouts.timm import facts_of_model
from mimir_fast.models.loading import fill, infer_architecture, initialize, inspect_weights
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.models.normalization import Normalizer
from mimir_fast.models.options import option_texts
from mimir_fast.models.weight_files import Weights, WeightsError, read_weights
from mimir_fast.ops.patches import patchify
from mimir_fast.publish import HubConfig, publish

DOCS = Path(__file__).parents[2] / "docs" / "weights.md"
COLUMNS = ("pre-train", "fine-tune", "evaluate", "export to timm")
WORKS = "works"
REFUSED = {
    "timm BEiT", "timm EVA-02", "timm Swin v2", "timm ConvNeXt v2", "timm ViT with relative positions", "timm ResNet",
    "timm ViT with attention pooling (SigLIP)", "PEFT's LoRA beside a ViT", "transformers BEiT",
    "transformers Swin, eps 1e-3",
}  # fmt: skip


def read(name: str, file: Written) -> Weights:
    """The weights of a case; of positions for patches only, a user must say what size they are of."""
    return read_weights(file.path, asked=Asked(image_size=IMAGE if "positions for patches only" in name else None))


def tokens_of(weights: Weights, images: torch.Tensor) -> torch.Tensor:
    """(B, T, D) after the last norm, from the encoder alone."""
    architecture, _ = infer_architecture(weights)
    encoder = build_encoder(architecture, final_norm="norm.weight" in weights.tensors).eval()
    fill(encoder, weights, whole=False)
    normalised = Normalizer(weights.statistics(architecture.channels))(images)
    with torch.no_grad():
        return encoder(patchify(normalised, encoder.mask_unit), None)


def outcome(action: str, weights: Weights) -> str:
    """What a user sees who does this with the weights: `works`, or why not."""
    try:
        architecture, _ = infer_architecture(weights)
        sizes = {"family": architecture.family, "encoder": architecture.size, "patch_size": architecture.patch_size,
                 "options": option_texts(architecture.options)}  # fmt: skip
        if action == "pre-train":
            width = len(weights.tensors.get("decoder_embed.weight", ()))
            config = ModelConfig(decoder="mae" if width == 512 else "light", **sizes)  # type: ignore[arg-type]
            model = build_masked_model(config, architecture.image_size, architecture.channels)
            report = initialize(model, weights)
            return "works, with its decoder" if "decoder_pred.weight" in report.loaded else WORKS
        if action == "fine-tune":
            pool = (
                "avg"
                if architecture.options.get("no_cls_token") or architecture.family in ("swin", "convnext")
                else "cls"
            )
            options = ClassifierConfig(global_pool=pool, **sizes)  # type: ignore[arg-type]
            initialize(build_classifier(options, architecture.image_size, 7, architecture.channels), weights)
        elif action == "evaluate":
            classifier_of(weights)
        else:
            inspect_weights(weights)
            tensors = {n: t for n, t in weights.tensors.items() if not n.startswith(("decoder_", "mask_token"))}
            find_family(architecture.family).to_timm(tensors, architecture)
    except ValueError as error:
        return "no head, fine-tune it first" if "no classification head" in str(error) else short(str(error))
    return WORKS


def short(reason: str) -> str:
    """The tensor that is in the way."""
    if found := re.search(r"because of (\S+),|: (\S+) is of another architecture", reason):
        return f"refused: `{found[1] or found[2]}`"
    if found := re.search(r"says (eps \S+),", reason):
        return f"refused: {found[1]}"
    return "refused: no vision transformer" if "holds no vision transformer" in reason else reason[:160]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Each case, written once."""
    found = {}
    for name, write in CASES.items():
        if name in NEEDS_TRANSFORMERS and transformers is None:
            continue
        folder = tmp_path_factory.mktemp("weights")
        found[name] = write(folder)
    return found


@pytest.mark.parametrize("name", CASES)
def test_equal_to_its_own_package(files: dict[str, Written], name: str) -> None:
    if name not in files:
        pytest.skip("transformers is not installed")
    file, generator = files[name], torch.Generator().manual_seed(2)
    try:
        weights = read(name, file)
        architecture, _ = infer_architecture(weights)
        assert name not in REFUSED
    except WeightsError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
        assert name in REFUSED, error
        return
    size = (2, architecture.channels, architecture.image_size, architecture.image_size)
    images = torch.rand(size, generator=generator)
    with torch.no_grad():
        if file.features is not None:
            wanted, found = file.features(images), tokens_of(weights, images)
            wanted = wanted.flatten(1, 2) if wanted.ndim == 4 else wanted
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        if file.logits is not None:
            wanted, found = file.logits(images), classifier_of(weights)[0](images)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def table(files: dict[str, Written]) -> str:
    """As docs/weights.md has it."""
    lines = [f"| file | layout | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name, file in files.items():
        try:
            weights = read(name, file)
        except WeightsError as error:
            lines.append(f"| {name} | none | {' | '.join([short(str(error))] * len(COLUMNS))} |")
            continue
        cells = [outcome(action, weights) for action in COLUMNS]
        lines.append(f"| {name} | {weights.layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_happens(files: dict[str, Written]) -> None:
    if transformers is None:
        pytest.skip("transformers is not installed")
    found = table(files)
    assert found.count("\n") - 2 >= 40
    assert found in DOCS.read_text(), f"{DOCS}: put in\n{found}"


@pytest.mark.parametrize(("name", "heads", "eps", "gelu"), [
    ("vit_tiny_patch16_224", 3, 1e-6, "erf"), ("vit_base_patch32_clip_quickgelu_224", 12, 1e-5, "quick"),
])  # fmt: skip
def test_a_live_model_of_timm_says_what_its_tensors_do_not(name: str, heads: int, eps: float, gelu: str) -> None:
    timm = pytest.importorskip("timm")
    facts = facts_of_model(timm.create_model(name, depth=1))
    assert (facts.heads, facts.eps, facts.gelu, facts.pool) == (heads, eps, gelu, "cls")


def test_blocks_of_timm_with_plain_tensors_and_another_function() -> None:
    """Features were off by half, with exit status 0: see findings/timm-same-names-other-function.sh."""
    timm = pytest.importorskip("timm")
    with pytest.raises(WeightsError, match="ResPostBlock"):
        facts_of_model(timm.create_model("vit_base_patch16_rpn_224", depth=1))
    assert facts_of_model(timm.create_model("resnet18")) == Facts()


@pytest.mark.parametrize("choices", [{"num_heads": 6}, {"num_heads": 6, "global_pool": "avg", "fc_norm": False}])
def test_a_folder_of_timm_says_heads_and_pooling(choices: dict[str, Any], tmp_path: Path) -> None:
    """`model_args` and `global_pool` of its config.json were not read: logits were off by up to 170 %."""
    timm = pytest.importorskip("timm")
    arguments = {"depth": 2, "img_size": 32, "patch_size": 8, **choices}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **arguments).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    timm.models.save_for_hf(model, tmp_path, model_args=arguments)
    found = load_classifier(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model((images - found.normalizer.mean) / found.normalizer.std)
        torch.testing.assert_close(found(images), wanted, rtol=1e-4, atol=1e-5)
    # What we write of it says so too: logits were off by up to 110 %.
    file = export(ExportConfig(str(tmp_path), str(tmp_path / "ours.safetensors"), "safetensors"))
    publish(HubConfig(str(tmp_path), str(tmp_path / "hub")))
    assert (tmp_path / "hub" / "weights.json").is_file()
    for written in (file, tmp_path / "hub"):
        with torch.no_grad():
            torch.testing.assert_close(load_classifier(written)(images), found(images))


@pytest.mark.parametrize(("name", "choices"), [
    ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}), ("test_vit2", {}),
    ("vit_base_patch32_clip_quickgelu_224", {}),
])  # fmt: skip
def test_timms_class_says_what_a_folder_of_its_does_not(name: str, choices: dict[str, Any], tmp_path: Path) -> None:
    """GELU and eps follow from the architecture's name in config.json."""
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 64, "depth": 1, "num_classes": 10, **choices}
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    timm.models.save_for_hf(model, tmp_path, model_args=arguments)
    found, images = load_classifier(tmp_path), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model((images - found.normalizer.mean) / found.normalizer.std)
        torch.testing.assert_close(found(images), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_file_does_not_make_timm_read_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoint_path` of timm's create_model opens a file; `pretrained` downloads one; a huge depth never ends."""
    timm, asked = pytest.importorskip("timm"), list[dict[str, Any]]()
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: (asked.append(options), create(name))[1])
    for more in ({"checkpoint_path": "/x.pth", "pretrained": True, "qkv_bias": True}, {"depth": 10**9}):
        content = {"model": vit().state_dict(), "args": {"model": "test_vit", "model_kwargs": more}}
        torch.save(content, tmp_path / "w.pth")
        read_weights(tmp_path / "w.pth")
    assert asked == [{"pretrained": False, "qkv_bias": True}, {"pretrained": False}]


@pytest.mark.parametrize(("name", "choices", "reason"), [
    ("vit_base_patch16_rpn_224", {"img_size": 32, "depth": 1}, "ResPostBlock"),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "global_pool": "max"}, "pools its tokens by max"),
    ("convnext_tiny", {"act_layer": "relu"}, "its activation is ReLU"),
])  # fmt: skip
def test_tensors_of_ours_and_another_function(name: str, choices: dict[str, Any], reason: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    timm.models.save_for_hf(timm.create_model(name, **choices), tmp_path, model_args=choices)
    with pytest.raises(WeightsError, match=reason):
        load_classifier(tmp_path)
