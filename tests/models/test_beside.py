"""What stands beside an encoder in a file: left out where harmless, read where known, else refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_cases import CLASSES, headless, prefixed, swin, vit

from mimir_fast.evaluation.adapters import load_model
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, classifier_of
from mimir_fast.models.facts import Facts, in_unit_range
from mimir_fast.models.load_report import LoadReport
from mimir_fast.models.loading import infer_architecture, initialize, inspect_weights
from mimir_fast.models.weight_files import Weights, WeightsError, read_weights

STATE: dict[str, Tensor] = dict(vit().state_dict())
OTHER: dict[str, Tensor] = dict(vit(1).state_dict())
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
M, S = torch.tensor(MEAN), torch.tensor(STD)
ZEROS = torch.zeros(1, 3, 8, 8)


def read(path: Path, content: Any, **choices: Any) -> Weights:
    torch.save(content, path / "w.pth")
    return read_weights(path / "w.pth", **choices)


def model(prefix: str = "model.", **beside: Tensor) -> dict[str, Tensor]:
    """An encoder under a prefix, beside something; `__` stands for a dot."""
    return prefixed(prefix, STATE) | {name.replace("__", "."): tensor for name, tensor in beside.items()}


UNKNOWN: dict[str, Any] = {
    "denoiser.0.weight": model(denoiser__0__weight=ZEROS),
    "prompt": model(prompt=ZEROS),
    "input_scaler.weight": model(input_scaler__weight=ZEROS),  # no scaler of gradients
    "target.noise": model(target__noise=ZEROS),
    "lossless_resize.weight": model(lossless_resize__weight=ZEROS),
    "post.weight": model(post__weight=torch.zeros(5, 5)),
    "fc.weight": model(fc__weight=torch.zeros(5, 5)),  # behind the encoder's own head
    "normalize.mean": model(normalize__mean=M),  # and no deviation
    "input_bn.running_mean": model(input_bn__running_mean=M, input_bn__running_var=S),
    "net.0.weight": {"model": STATE, "net": {"0.weight": ZEROS}},
    "encoder.0.weight": prefixed("vit.", STATE) | {"encoder.0.weight": ZEROS, "decoder.0.weight": ZEROS},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_change_the_function_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Evaluated as if it were not there, a denoiser in front of the encoder gives the robustness of another model."""
    weights = read(tmp_path, UNKNOWN[name])
    for judge in (classifier_of, inspect_weights, infer_architecture):
        with pytest.raises(WeightsError, match=rf"w\.pth: {name} .*beside the encoder"):
            judge(weights)
    start = build_classifier(ClassifierConfig(global_pool="cls", patch_size=8, options=("width=64", "depth=2")), 32, 5)
    report = initialize(start, weights)  # training may start from the encoder
    assert name in report.skipped and "what it did is not done here" in str(report)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("projector.0.weight", "self-supervised"),
        ("momentum_projector.0.weight", "teacher or a moving average"),
        ("prototypes.weight", "self-supervised"),
        ("decoder.0.weight", "the decoder"),
        ("criterion.weight", "of the training"),
        ("total_ops", "of the training"),
    ],
)
def test_harmless_groups_are_left_out_with_the_reason(prefix: str, name: str, reason: str, tmp_path: Path) -> None:
    weights = read(tmp_path, prefixed(prefix, STATE) | {name: torch.ones(7)})
    assert reason in classifier_of(weights)[1].reasons[name]


STATISTICS: dict[str, Any] = {
    "RobustBench": model(normalize__mean=M, normalize__std=S),
    "mu, sigma": model(mu=M.view(1, 3, 1, 1), sigma=S.view(1, 3, 1, 1)),
    "without a prefix": STATE | {"image_mean": M, "image_std": S},
    "inside the prefix": prefixed("model.", STATE | {"_mean": M.view(3, 1, 1), "_std": S.view(3, 1, 1)}),
    "robustness": {"model": model("module.model.", module__normalizer__new_mean=M, module__normalizer__new_std=S)
                   | model("module.attacker.model.", module__attacker__normalize__new_mean=M)},
    "beside the state dict": {"model": STATE, "normalize": {"mean": M, "std": S}},
    "arrays beside it": {"model": STATE, "mean": np.array(MEAN), "std": np.array(STD)},
    "numbers beside it": {"model": STATE, "mean": list(MEAN), "std": list(STD)},
    "hyper_parameters": {"state_dict": model(), "hyper_parameters": {"mean": MEAN, "std": STD}},
    "grey levels": model(normalize__mean=255 * M, normalize__std=255 * S),
}  # fmt: skip


@pytest.mark.parametrize("where", STATISTICS)
def test_a_normalisation_in_the_file_is_the_models(where: str, tmp_path: Path) -> None:
    weights = read(tmp_path, STATISTICS[where])
    assert weights.normalization == (MEAN, STD)
    assert classifier_of(weights)[0].normalizer.statistics == (MEAN, STD)
    assert ("divided by 255" in str(weights.notes)) == (where == "grey levels")


def test_numbers_that_are_no_mean_of_images_name_the_file(tmp_path: Path) -> None:
    """The message named `--model.mean`, which nobody had typed."""
    weights = read(tmp_path, model(normalize__mean=-M, normalize__std=S))
    with pytest.raises(WeightsError, match=r"w\.pth: its normalisation has mean -0\.5 .*give --mean and --std"):
        classifier_of(weights)
    assert in_unit_range(Facts(mean=MEAN, std=STD)) == (Facts(mean=MEAN, std=STD), "")


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "ema": OTHER},
        {"model": STATE, "ema_state_dict": OTHER},
        {"model": STATE, "model_ema": {"module": OTHER, "decay": 0.9}},
        {"model": STATE, "ema_models": [OTHER]},
        {"model": STATE, "averaged_model": OTHER},
        {"model": STATE, "modelEMA": OTHER},
        prefixed("model.", STATE) | prefixed("model_ema.module.", OTHER),
    ],
)
def test_a_moving_average_is_seen_wherever_it_lies(content: Mapping[str, Any], tmp_path: Path) -> None:
    for which, wanted in (("auto", OTHER), ("ema", OTHER), ("model", STATE)):
        found = read(tmp_path, content, which=which)
        assert torch.equal(found.tensors["cls_token"], wanted["cls_token"])


class TestSeveralEncoders:
    def test_two_averages_are_asked_for(self, tmp_path: Path) -> None:
        content = {"model": STATE, "ema_models": [OTHER, STATE]}
        with pytest.raises(WeightsError, match=r"2 encoders: ema_models\.0, ema_models\.1"):
            read(tmp_path, content)
        assert torch.equal(read(tmp_path, content, part="ema_models.1").tensors["cls_token"], STATE["cls_token"])

    def test_the_teacher_of_a_distillation_is_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="2 encoders: student, teacher"):
            read(tmp_path, {"student": STATE, "teacher": OTHER})
        self_supervised = {"student": headless(STATE), "teacher": headless(OTHER)}
        assert torch.equal(read(tmp_path, self_supervised).tensors["cls_token"], OTHER["cls_token"])

    def test_equal_tensors_are_one(self, tmp_path: Path) -> None:
        copy = {name: tensor.clone() for name, tensor in STATE.items()}
        weights = read(tmp_path, {"model": STATE, "model_without_ddp": copy})
        assert not weights.notes and weights.facts.part is None


def test_heads_that_are_no_linear_layer_are_named(tmp_path: Path) -> None:
    renamed = {name.replace("head.", "head.fc."): tensor for name, tensor in STATE.items()}
    for content, name in ((renamed, "head.fc.weight"), (model("backbone."), "")):
        if not name:
            content, name = prefixed("backbone.", headless(STATE)) | {"fc.weight": STATE["head.weight"]}, "fc.weight"
        weights = read(tmp_path, content)
        with pytest.raises(WeightsError, match=rf"no classification head .*which {name}.* is not"):
            classifier_of(weights)
        inspect_weights(weights)  # its encoder can be exported
    with pytest.raises(WeightsError, match=r"head\.extra\.weight is not in our ViT,"):
        classifier_of(read(tmp_path, STATE | {"head.extra.weight": torch.zeros(5, 5)}))
    with pytest.raises(WeightsError, match=r"norm\.weight is not in our ViT,"):
        classifier_of(read(tmp_path, STATE | {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.zeros(64)}))


def test_windows_that_do_not_span_the_image_are_told(tmp_path: Path) -> None:
    state = swin(img_size=64).state_dict()
    with pytest.raises(WeightsError, match=r"one window of its last stage sees 32² pixels of images of 64²"):
        classifier_of(read(tmp_path, {"model": state, "args": {"img_size": 64}}))
    with pytest.raises(WeightsError, match=r"if it was made for 32², say so: --data\.image_size 32"):
        classifier_of(read(tmp_path, state), image_size=64)


def test_files_for_timms_models_follow_the_same_rule(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source = timm.create_model("test_vit", num_classes=CLASSES)
    options: dict[str, Any] = {"num_classes": CLASSES, "device": torch.device("cpu"), "image_size": 160}
    torch.save(prefixed("model.", source.state_dict()) | {"mean": M, "std": S}, tmp_path / "w.pth")
    judged = load_model(f"timm:test_vit@{tmp_path / 'w.pth'}", **options)
    assert judged.preprocessing == f"mean {MEAN}, std {STD}, inside the model"
    torch.save(prefixed("model.", source.state_dict()) | {"prompt": ZEROS}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="prompt stands beside the encoder"):
        load_model(f"timm:test_vit@{tmp_path / 'w.pth'}", **options)
    with pytest.raises(ValueError, match="--part teacher chooses among the encoders in a file"):
        load_model("timm:test_vit@random".replace("@random", ""), part="teacher", **options)


def test_a_report_comes_back_from_its_folder(tmp_path: Path) -> None:
    report = LoadReport("w.pth", "timm", ["a"], {"b": "the decoder"}, assumed=["3 heads"], notes=["n"])
    report.save(tmp_path)
    assert LoadReport.read(tmp_path) == report
    (tmp_path / "weights.json").write_text(json.dumps([]))
    assert LoadReport.read(tmp_path) is None


def test_one_number_is_that_of_every_channel(tmp_path: Path) -> None:
    weights = read(tmp_path, model(normalize__mean=torch.tensor([0.5]), normalize__std=torch.tensor([0.25])))
    assert weights.statistics(3) == ((0.5,) * 3, (0.25,) * 3)
