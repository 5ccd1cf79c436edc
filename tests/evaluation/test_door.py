"""At the door: answers of any kind become logits, and what no attack can climb is refused in one line."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import file_state
from small_classifier import SmallNet
from small_models import masked_vit
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.evaluation.adapters import JudgedModel, load_model
from mimir_fast.evaluation.door import at_the_door
from mimir_fast.evaluation.wrappers import AsLogits, Normalized
from mimir_fast.models.opening import weights_only

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Answering(nn.Module):
    """A classifier whose answer is put into something."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net, self.wrap = SmallNet(), wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.net(images))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda z: (z, z * 0), "first tensor of the tuple"),
        (lambda z: {"loss": z.sum(), "logits": z}, "`logits` of the dict"),
        (lambda z: z.bfloat16(), "bfloat16"),
        (lambda z: [z.half()], "float16"),
    ],
)
def test_answers_become_logits(wrap: Any, words: str) -> None:
    model = Answering(wrap).eval()
    judged, notes = at_the_door(model, IMAGES)
    assert isinstance(judged, AsLogits) and words in " ".join(notes)
    logits = judged(IMAGES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.net(IMAGES), rtol=0.02, atol=0.02)
    assert at_the_door(judged, IMAGES) == (judged, [])


def test_a_plain_model_stays_itself() -> None:
    model = SmallNet().eval()
    assert at_the_door(model, IMAGES) == (model, [])
    assert all(p.grad is None for p in model.parameters())


def test_transformers_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Answering(lambda z: outputs.ImageClassifierOutput(logits=z)).eval()
    judged, (note,) = at_the_door(model, IMAGES)
    assert "`logits` of the ImageClassifierOutput" in note
    assert torch.equal(judged(IMAGES), model.net(IMAGES))


class Casting(nn.Module):
    """What Lightning Fabric's wrapper does with precision bf16-true."""

    def __init__(self) -> None:
        super().__init__()
        self.module = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images.bfloat16()).float()


class Hooked(nn.Module):
    """What Fabric's wrapper does with precision bf16-mixed: its own backward must be called."""

    def __init__(self) -> None:
        super().__init__()
        self.module = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        def refuse(gradient: Tensor) -> None:
            raise RuntimeError("requires you to call `fabric.backward(loss)`")

        logits: Tensor = self.module(images)
        if logits.requires_grad:
            logits.register_hook(refuse)
        return logits


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Answering(lambda z: z.detach()), "no gradient.*no_grad"),
        (Answering(lambda z: z.argmax(1)), "returns int64"),
        (Casting(), "give the module inside its wrapper"),
        (Hooked(), r"fabric\.backward.*give the module inside"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), r"--data\.image_size"),
    ],
)
def test_what_no_attack_can_climb_is_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        at_the_door(model.eval(), IMAGES)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients(guard: Any) -> None:
    model = SmallNet().eval()
    model.forward = guard()(model.forward)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="inference_mode"):
        at_the_door(model, IMAGES)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_digested_and_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(SmallNet().eval(), {nn.Linear})
    other = torch.ao.quantization.quantize_dynamic(SmallNet().eval(), {nn.Linear})
    first, again, different = (JudgedModel(m, "", "").digest() for m in (model, model, other))
    assert first == again != different
    with pytest.raises(ValueError, match="quantised"):
        at_the_door(model, IMAGES)


class Remembering(SmallNet):
    """Keeps more than tensors in its state dict."""

    note: Any = "one"

    def get_extra_state(self) -> Any:
        return {"note": self.note, "when": [1, 2.5, None]}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def test_extra_state_is_part_of_the_digest() -> None:
    model = Remembering()
    first = JudgedModel(model, "", "").digest()
    model.note = "another"
    assert first != JudgedModel(model, "", "").digest()


def test_a_gradient_of_zero_is_said() -> None:
    _, (note,) = at_the_door(Answering(lambda z: z.round().detach() + 0 * z).eval(), IMAGES)
    assert "zero on a first look" in note


def test_features_are_shown_where_the_model_shows_them() -> None:
    assert has_features(Normalized(SmallNet(), (0.5,), (0.5,)))
    assert not has_features(Normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (0.5,), (0.5,)))


@pytest.mark.parametrize("fixed", [3, 16])
def test_a_program_of_fixed_batch_takes_any_number(tmp_path: Path, fixed: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    torch.export.save(torch.export.export(net, (torch.rand(fixed, 1, 8, 8),)), tmp_path / "m.pt2")
    judged = load_model(str(tmp_path / "m.pt2"), num_classes=10, device=CPU, channels=1, image_size=8)
    assert f"batches of {fixed} images" in judged.notes[0]
    for count in (1, fixed, 7):
        x = torch.rand(count, 1, 8, 8, requires_grad=True)
        torch.testing.assert_close(judged.module(x), net(x))
        ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (judged.module, net))
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"--data\.image_size 8 --data\.channels 1"):
        load_model(str(tmp_path / "m.pt2"), num_classes=10, device=CPU, channels=3, image_size=32)
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    with pytest.raises(ValueError, match=r"no torch\.export program"):
        load_model(str(tmp_path / "bad.pt2"), num_classes=10, device=CPU)


class TestTimmFiles:
    """`timm:NAME@FILE` is opened by our own reader."""

    @pytest.fixture(scope="class")
    def resnet(self) -> nn.Module:
        timm = pytest.importorskip("timm")
        model: nn.Module = timm.create_model("resnet10t", num_classes=10).eval()
        return model

    def load(self, path: Path, name: str = "resnet10t", **options: Any) -> JudgedModel:
        return load_model(f"timm:{name}@{path}", **{"num_classes": 10, "device": CPU, "image_size": 32, **options})

    @pytest.mark.parametrize(
        "nest",
        [
            lambda s: s,
            lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}, "epoch": 3},
            lambda s: {"model": {n: 0 * t for n, t in s.items()}, "model_ema": s, "best_acc1": torch.tensor(0.5)},
        ],
    )
    def test_wrapped_state_dicts(self, resnet: nn.Module, tmp_path: Path, nest: Any) -> None:
        torch.save(nest(resnet.state_dict()), tmp_path / "w.pth")
        judged, images = self.load(tmp_path / "w.pth"), torch.rand(2, 3, 32, 32)
        assert isinstance(judged.module, Normalized)
        torch.testing.assert_close(judged.module.model(images), resnet(images))

    def test_a_file_that_runs_code_does_not(self, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "it_ran"),)

        torch.save({"state_dict": {"a": Hostile()}}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match="not loaded"):
            self.load(tmp_path / "w.pth")
        assert not (tmp_path / "it_ran").exists()

    def test_what_does_not_fit_is_one_line(self, resnet: nn.Module, tmp_path: Path) -> None:
        torch.save({"model": file_state(masked_vit(32, 4, embed_dim=192, depth=12, num_heads=3))}, tmp_path / "mae.pth")
        with pytest.raises(WeightsError, match=r"no classification head") as error:
            self.load(tmp_path / "mae.pth", "vit_tiny_patch16_224")
        assert "\n" not in str(error.value)
        with pytest.raises(WeightsError, match=r"does not fit timm's resnet10t"):
            self.load(tmp_path / "mae.pth")
        torch.save(resnet.state_dict(), tmp_path / "w.pth")
        with pytest.raises(WeightsError, match="it has 10 classes, wanted 7"):
            self.load(tmp_path / "w.pth", num_classes=7)


def test_other_packages_load_weights_only(tmp_path: Path) -> None:
    """Also where they ask for everything, as old versions of timm and RobustBench's models do."""
    torch.save({"a": Path("x")}, tmp_path / "w.pth")
    before = dict(os.environ)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=False)
    assert dict(os.environ) == before
    assert torch.load(tmp_path / "w.pth", weights_only=False) == {"a": Path("x")}
