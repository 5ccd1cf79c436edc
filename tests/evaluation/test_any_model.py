"""Every kind of model can be judged, and what does not fit is refused with the fix."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from small_classifier import SmallNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.evaluate import config_from
from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.adapters import FromProbabilities, JudgedModel, Normalized, load_model
from mimir_fast.evaluation.attacks import attack_averaged, make_threat
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.sanity import inspect_model
from mimir_fast.models.weight_files import read_weights

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def load(spec: str, num_classes: int = 10, channels: int = 1) -> nn.Module:
    return load_model(spec, num_classes=num_classes, device=CPU, channels=channels).module


def test_torch_export_and_torchscript_files_are_attacked_like_the_original(small_model, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=512)
    torch.export.save(torch.export.export(small_model, (IMAGES,), dynamic_shapes=({0: batch},)), tmp_path / "m.pt2")
    torch.jit.script(small_model).save(str(tmp_path / "m.torchscript"))
    labels, threat = torch.arange(4), LinfThreat(0.1, 0.05, 3)
    wanted = pgd(small_model, IMAGES, labels, threat, mode="eval")
    for name, kind in (("m.pt2", "torch.export"), ("m.torchscript", "TorchScript")):
        judged = load_model(str(tmp_path / name), num_classes=10, device=CPU)
        assert judged.kind == kind and judged.opaque, "no surface of weights that cannot be moved"
        assert judged.digest() != JudgedModel(nn.Flatten(), "", "").digest(), "its weights are seen"
        torch.testing.assert_close(pgd(judged.module, IMAGES, labels, threat, mode="eval"), wanted)


def test_module_function(small_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small_model.state_dict(), tmp_path / "w.pt")
    monkeypatch.setenv("SMALL_NET", str(tmp_path / "w.pt"))
    module = load("small_classifier:small_net")
    torch.testing.assert_close(module(IMAGES), small_model(IMAGES))
    assert not any(p.requires_grad for p in module.parameters())
    with pytest.raises(ValueError, match="no function 'nothing'"):
        load("small_classifier:nothing")
    with pytest.raises(ImportError, match="PYTHONPATH"):
        load("no_such_module_at_all:function")


OWN = """
import torch
def build(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
def sized(width, *, depth): return build()
def optional(width=3): return build()
"""


def test_a_module_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a console script has no working folder, that of `python -m` has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (tmp_path / "own_models.py").write_text(OWN)
    for name in ("build", "optional"):
        assert load(f"own_models:{name}")(IMAGES).shape == (4, 10)
    with pytest.raises(ValueError, match=r"sized\(\) is called without arguments \(missing a .*'width'\)"):
        load("own_models:sized")
    with pytest.raises(ImportError, match=f"looked for in {tmp_path}, PYTHONPATH"):
        load("no_such_models:build")


def test_a_misspelt_model_of_timm() -> None:
    for spec in ("timm:vit_tny", "timm:vit_tny@random", "timm:vit_tny.augreg_in21k"):
        with pytest.raises(ValueError, match=r"'vit_tny'; did you mean vit_tiny_patch\w+, vit_tiny\w+"):
            load(spec)
    with pytest.raises(ValueError, match=r"'vit_tny'; did you mean vit_tiny_patch\w+"):
        read_weights("timm:vit_tny")
    with pytest.raises(ValueError, match=r"no model 'qqqqqqqq': timm\.list_models"):
        load("timm:qqqqqqqq")


def test_timm_models_get_their_normalisation_inside() -> None:
    timm = pytest.importorskip("timm")
    judged = load_model("timm:vit_tiny_patch16_224@random", num_classes=7, device=CPU)
    assert judged.notes == ["the weights are random: nothing was trained"]
    assert judged.made_for == {"image_size": 224, "crop": 0.9, "interpolation": "bicubic", "mode": "center"}
    assert isinstance(judged.module, Normalized)
    images = torch.rand(2, 3, 224, 224)
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.mean, config.std))
    wanted = judged.module.model((images - mean) / std)
    assert wanted.shape == (2, 7)
    torch.testing.assert_close(judged.module(images), wanted)
    torch.testing.assert_close(judged.module.forward_head(judged.module.forward_features(images)), wanted)


def test_weights_of_another_model_of_timm_are_told_how_to_be_named(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "r18.safetensors"
    save_file(timm.create_model("resnet18", num_classes=10).state_dict(), path)
    with pytest.raises(WeightsError, match=f"timm:NAME@{path}"):
        load(str(path), channels=3)
    assert isinstance(load(f"timm:resnet18@{path}", channels=3), nn.Module)


def test_timm_without_network_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights would be judged as if they were the model."""
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ImportError, match=r"no route to host.*@random"):
        load_model("timm:resnet18", num_classes=10, device=CPU)


def test_timm_models_bring_their_size_and_hear_of_another() -> None:
    pytest.importorskip("timm")
    assert config_from(["--checkpoint", "timm:vit_tiny_patch16_384"]).data.image_size == 384
    assert config_from(["--checkpoint", "timm:vit_tiny_patch16_384", "--data.image_size", "32"]).data.image_size == 32
    judged = load_model("timm:vit_tiny_patch16_224@random", num_classes=10, device=CPU, image_size=32)
    assert "evaluated at 32², made for 224²" in judged.notes
    assert judged.module(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_own_normalisation_takes_the_place_of_the_models() -> None:
    pytest.importorskip("timm")
    options = {"num_classes": 7, "device": CPU}
    plain = load_model("timm:resnet18@random", **options)
    asked = load_model("timm:resnet18@random", **options, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    asked.module.model.load_state_dict(plain.module.model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(asked.module(images), plain.module.model((images - mean) / 0.5))
    assert "as asked" in asked.preprocessing


def test_what_runs_code_is_said_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A module does when it is imported, and a .pt2 file when torch unpickles it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "hostile.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(RuntimeError, match="it ran"):
        load_model("hostile:make", num_classes=10, device=CPU)
    assert "hostile:make runs code with your rights" in caplog.text
    caplog.clear()
    (tmp_path / "m.pt2").write_bytes(b"no program")
    with pytest.raises(Exception, match=r".+"):
        load_model(str(tmp_path / "m.pt2"), num_classes=10, device=CPU)
    assert "torch.export unpickles" in caplog.text


def test_a_functions_code_is_part_of_what_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights tell two plain functions apart; a resumed evaluation must not mix them."""
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for factor in (1, 22):
        text = f"def make():\n    return lambda x: x.flatten(1)[:, :10] * {factor}\n"
        (tmp_path / "some_function.py").write_text(text)
        sys.modules.pop("some_function", None)
        importlib.invalidate_caches()
        digests.append(load_model("some_function:make", num_classes=10, device=CPU).digest())
    assert digests[0] != digests[1]


def test_robustbench_is_asked_for_where_it_is_installed() -> None:
    from importlib.util import find_spec

    with pytest.raises(ValueError, match="DATA/NORM/NAME"):
        load("robustbench:cifar10/NAME")
    if find_spec("robustbench") is None:
        with pytest.raises(ImportError, match="install it aside"):
            load("robustbench:cifar10/Linf/Standard")


def test_weights_of_a_run_are_chosen_and_named(tmp_path: Path) -> None:
    from mimir_fast.checkpoints.saving import save_checkpoint
    from mimir_fast.models.classifier import ClassifierConfig, build_classifier

    run, config = tmp_path / "run", {"model": {"encoder": "nano", "patch_size": 16}}
    model = build_classifier(ClassifierConfig(encoder="nano", patch_size=16), image_size=32, num_classes=10)
    places = {"step-00000004": 4.0, "best": 7.0, "step-00000009": 9.0}
    for name, mark in places.items():
        state = {n: t.detach().clone() for n, t in model.state_dict().items()}
        state["head.bias"] = torch.full((10,), mark)
        tensors = {f"model/{n}": t for n, t in state.items()}
        if name == "step-00000009":
            tensors["ema/head.bias"] = torch.full((10,), 90.0)
        meta = {"step": int(mark), "kind": "finetune", "config": config}
        save_checkpoint(run / "checkpoints" / name, tensors, meta)

    def bias(weights: str) -> tuple[float, str]:
        judged = load_model(str(run), num_classes=10, device=CPU, weights=weights)  # type: ignore[arg-type]
        return float(judged.module.head.bias[0]), judged.weights

    assert bias("best") == (7.0, "best checkpoint") == bias("auto")
    assert bias("last") == (9.0, "step-00000009 checkpoint, trained weights")
    assert bias("ema") == (90.0, "step-00000009 checkpoint, moving average")


def test_weights_choose_among_checkpoints_of_a_run_only(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="--weights best"):
        load_model(str(tmp_path / "w.safetensors"), num_classes=10, device=CPU, weights="best")


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("runs/not/there", FileNotFoundError, "no such file or folder"),
        ("nothing.pth", FileNotFoundError, "timm:NAME"),
        ("timm:no_such_net", ValueError, "no model 'no_such_net'"),
        ("timm:resnet18@missing.safetensors", FileNotFoundError, "no file missing.safetensors"),
    ],
)
def test_what_is_not_there_is_explained(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load(spec)


class Softmaxed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).softmax(dim=1)


class Dice(SmallNet):
    """Draws noise in every forward pass."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 0.1 * torch.randn(len(images), 10)


def test_probabilities_are_refused_or_turned_into_logits(small_model) -> None:
    with pytest.raises(ValueError, match="--outputs probabilities"):
        inspect_model(Softmaxed(small_model), IMAGES, 10)
    logits = FromProbabilities(Softmaxed(small_model))
    inspect_model(logits, IMAGES, 10)
    torch.testing.assert_close(logits(IMAGES).softmax(1), small_model(IMAGES).softmax(1))


def test_a_model_that_is_not_deterministic_is_said_so(small_model) -> None:
    assert inspect_model(small_model, IMAGES, 10).notes() == []
    with torch.random.fork_rng([]):
        found = inspect_model(Dice().eval(), IMAGES, 10)
    assert not found.deterministic
    (note,) = found.notes()
    assert "--eot" in note and "'rand'" in note


class Coin(SmallNet):
    """Answers by one of two networks, by the toss of a coin."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 + 0.02 * float(torch.randint(2, ())))


def test_a_coin_is_not_taken_for_a_batch() -> None:
    """Two answers are equal every second time; a third that differs would then look like the batch's doing."""
    model = Coin().eval()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = [inspect_model(model, IMAGES, 10) for _ in range(20)]
    assert sum(each.deterministic for each in found) <= 2 and sum(each.batch_difference > 0 for each in found) <= 1


class Halved(SmallNet):
    """Rounds as half precision does, by a rule of its own for each size of batch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 + 2e-3 * len(images))


class Crowd(SmallNet):
    """Looks at the other images of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward_features(images)
        return super().forward_head(features - 0.1 * features.mean(dim=0))


def test_a_model_that_sees_the_other_images_of_a_batch_is_said_so(digits_images: EvaluationImages) -> None:
    found = inspect_model(Crowd().eval(), IMAGES, 10)
    assert found.deterministic and found.batch_difference > 1e-3
    (note,) = found.notes()
    assert "depends on the other images of its batch" in note and "--batch_size" in note
    assert inspect_model(SmallNet().eval(), IMAGES[:1], 10).batch_difference == 0
    halves = Halved().eval()
    assert not torch.equal(halves(IMAGES)[:2], halves(IMAGES[:2]))
    assert not inspect_model(halves, IMAGES, 10).notes()
    results = evaluate(Crowd(), digits_images.images, digits_images.labels, suite="table", autoattack="no", limit=8)
    verdict = results.verdicts["validity"]
    assert (verdict["kind"], verdict["large"]) == ("bad", "Answers depend on the batch")
    assert any("depends on the other images of its batch" in other for other in results.notes)
    assert results.choices["sanity"]["deterministic"]


class RandomWeights(nn.Module):
    """One logit that the sum of the weights moves; each pass draws other weights around the true ones."""

    def __init__(self, weights: Tensor, spread: float) -> None:
        super().__init__()
        self.weights, self.spread = weights, spread

    def forward(self, images: Tensor) -> Tensor:
        drawn = self.weights + self.spread * torch.randn(self.weights.shape)
        return torch.stack([(images * drawn).flatten(1).sum(1), torch.zeros(len(images))], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_of_a_random_model_are_averaged(norm: Literal["linf", "l2"], small_model: nn.Module) -> None:
    """The true direction is ±1 a pixel; one draw finds hardly more than half of the signs, 100 draws nearly all."""
    weights = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2)).sign()
    x, threat = torch.full((1, 1, 16, 16), 0.5), replace(make_threat(norm, 0.1, 1), random_start=False)

    def agreement(draws: int) -> float:
        attacked = attack_averaged(
            RandomWeights(weights, 5.0), x, torch.zeros(1, dtype=torch.long), threat, draws=draws,
            loss=lambda logits, labels: -logits[:, 0],
        )  # fmt: skip
        return float(((attacked - x)[0].sign() == -weights).float().mean())

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        # The normal distribution at 1/5 and at 10/5.
        assert agreement(1) == pytest.approx(0.579, abs=0.1)
        assert agreement(100) == pytest.approx(0.977, abs=0.03)
    labels, whole = torch.arange(4), make_threat(norm, 0.1, 4)
    once, thrice = (attack_averaged(small_model, IMAGES, labels, whole, draws=draws) for draws in (1, 3))
    torch.testing.assert_close(thrice, once)


def test_a_random_model_is_attacked_through_its_randomness(digits_images: EvaluationImages) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = evaluate(
            Dice(), digits_images.images, digits_images.labels, suite="table", autoattack="no", limit=4, targets=1
        )
    attacks = found.sections["accuracy"]["attacks"]
    assert attacks["fgsm"]["label"] == "FGSM, 10 draws" and attacks["pgd20"]["label"] == "PGD-20, 10 draws"
    assert attacks["pgd20_targeted"]["parameters"]["eot"] == 10


@pytest.mark.parametrize(
    ("model", "num_classes", "words"),
    [
        (SmallNet(), 7, "10 classes, the data has 7"),
        (SmallNet().body, 10, "the model has 288 classes"),
        (nn.Conv2d(1, 3, 3), 10, "head"),
        (nn.Conv2d(3, 3, 3), 10, "--data.channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Threshold(1e9, float("nan"))), 10, "not finite"),
    ],
)
def test_unfit_models_are_refused(model: nn.Module, num_classes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inspect_model(model.eval(), IMAGES, num_classes)


class Recomputed(nn.Module):
    """A layer that is computed again in the backward pass, one mapped by torch.func, one that asks for a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.wide = inner, nn.Linear(64, 4096)
        self.square = nn.Linear(4096, 64)

    def plain(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.square(torch.relu(self.wide(x)))

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(self.plain(images.flatten(1)).view_as(images))


class Checkpointed(Recomputed):
    def forward(self, images: Tensor) -> Tensor:
        x = checkpoint(self.plain, images.flatten(1), use_reentrant=False)
        return self.inner(x.view_as(images))


class Mapped(Recomputed):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(torch.func.vmap(self.plain)(images.flatten(1)).view_as(images))


@pytest.mark.parametrize("kind", [Checkpointed, Mapped])
def test_a_models_own_way_to_compute_is_left_to_it(kind: type[Recomputed], small_model, digits_images) -> None:
    """Whatever an evaluation does to be fast, the gradient is that of the model."""
    torch.manual_seed(0)
    twin = Recomputed(small_model)
    model = kind(small_model)
    model.load_state_dict(twin.state_dict())
    numbers = [
        evaluate(each, digits_images.images[:32].float() / 255, digits_images.labels[:32], suite="quick", eps=20 / 255)
        for each in (twin, model)
    ]
    assert numbers[0].robust == numbers[1].robust
    attacks = [found.sections["accuracy"]["attacks"] for found in numbers]
    assert {k: v["correct"] for k, v in attacks[0].items()} == {k: v["correct"] for k, v in attacks[1].items()}
