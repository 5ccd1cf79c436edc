"""The record says in which precision a model was seen to compute, not in which it was asked to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_classifier import DIGITS, EPS, SmallNet
from torch import Tensor, nn

from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.measure import strict_fp32
from mimir_fast.evaluation.precision import allowed_roundings, measured_precision
from mimir_fast.evaluation.run import evaluate

CPU = torch.device("cpu")
IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRUE = "fp32, no TF32, no autocast"


class Autocast(nn.Module):
    """What Accelerate does to a model's forward with mixed_precision="bf16"."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = self.net(images)
        return logits.float()


class Permitting(SmallNet):
    """Permits rounded products while it runs."""

    def forward(self, images: Tensor) -> Tensor:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        try:
            return super().forward(images)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]


def seen(model: Any) -> str:
    with strict_fp32(CPU):
        return str(measured_precision(model, IMAGES))


def compiled_inside() -> nn.Module:
    model = Autocast()
    model.net.head = torch.compile(model.net.head, backend="eager")
    return model


class Answering(SmallNet):
    """Casts its answer, a slice of it, and may do something with it."""

    def __init__(self, dtype: torch.dtype, then: Any) -> None:
        super().__init__()
        self.dtype, self.then = dtype, then

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.then(super().forward(images).to(self.dtype)[:, :9])
        return answer


def answering(dtype: torch.dtype, then: Any = lambda x: x) -> nn.Module:
    return Answering(dtype, then)


def rounding_inside() -> nn.Module:
    """The images lose digits on their way in."""
    model = SmallNet()
    model.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(),))
    return model


@pytest.mark.parametrize(
    "make", [SmallNet, lambda: torch.compile(SmallNet(), backend="eager"),
             lambda: torch.jit.script(SmallNet().eval()), lambda: answering(torch.float16)],
)  # fmt: skip
def test_what_is_fp32_is_called_so(make: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert seen(make()) == TRUE


@pytest.mark.parametrize(
    "make", [Autocast, lambda: answering(torch.bfloat16, lambda x: x.float()), rounding_inside, compiled_inside,
             lambda: torch.compile(Autocast(), backend="eager"),
             lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).bfloat16().forward],
)  # fmt: skip
def test_what_is_not_is_not(make: Any) -> None:
    model = make()
    found = seen(model if isinstance(model, nn.Module) else lambda images: model(images.bfloat16()).float())
    assert found == "bfloat16 inside the model, fp32 around it"


def test_permission_to_round_is_seen_where_the_products_are() -> None:
    with strict_fp32(CPU):
        assert allowed_roundings(CPU) == set()
        found = measured_precision(Permitting(), IMAGES)
    assert found.lower == ["bf16 products"] and "bf16 products" in str(found)


PERMISSIONS: list[tuple[Any, str, Any]] = [
    (torch.backends, "fp32_precision", "tf32"), (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    (torch.backends.mkldnn.conv, "fp32_precision", "bf16"), (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "allow_tf32", True), (torch.backends.cudnn, "allow_tf32", False),
]  # fmt: skip


def settings() -> list[Any]:
    """All there are; the older ones cannot be read where the newer ones differ from them."""
    backends = torch.backends
    found: list[Any] = [
        each.fp32_precision for each in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul,
                                         backends.mkldnn.conv)
    ]  # fmt: skip
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("not to be read")
    return found


@pytest.fixture
def settled() -> Iterator[None]:
    """All settings come back, whatever a test did to them."""
    before = settings()
    yield
    backends = torch.backends
    backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for each, value in zip(
        (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv), before, strict=False
    ):
        each.fp32_precision = value
    assert settings() == before


@pytest.mark.parametrize(("place", "name", "value"), PERMISSIONS, ids=range(len(PERMISSIONS)))
def test_no_permission_reaches_the_evaluation_and_all_come_back(
    settled: None, place: Any, name: str, value: Any
) -> None:
    setattr(place, name, value)
    before = settings()
    assert seen(SmallNet()) == TRUE
    with strict_fp32(CPU):
        assert not allowed_roundings(CPU) | allowed_roundings(torch.device("cuda"))
        assert settings()[-2:] == ["highest", False]
    assert settings() == before


def bf16() -> nn.Module:
    """For `--checkpoint`."""
    return Autocast()


def test_the_record_and_the_notes_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = EvaluateConfig(
        "test_precision:bf16", "table", DIGITS, limit=4, autoattack="no", eps=EPS, output_dir=str(tmp_path)
    )  # fmt: skip
    results = evaluate(config, log=lambda line: None)
    assert results.choices["precision"] == "bfloat16 inside the model, fp32 around it"
    assert any("computes in bfloat16" in note for note in results.notes)


def test_accelerates_wrapper_is_seen() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(SmallNet())
    assert "bfloat16" in seen(model)
