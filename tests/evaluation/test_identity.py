"""An evaluation goes on only with the model, the images and the labels it began with, whatever they are called."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_state import file_state
from PIL import Image
from safetensors.torch import save_file
from small_classifier import DIGITS, EPS, SmallNet

from mimir_fast.data import DataConfig
from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import RawSource, subset
from mimir_fast.data.sources.shards import ShardSource
from mimir_fast.evaluation.adapters import JudgedModel
from mimir_fast.evaluation.changes import changes
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.content import content_of
from mimir_fast.evaluation.identity import identity_of_model
from mimir_fast.evaluation.journal import OtherMeasurementError
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.models.masked_model import ModelConfig, build_masked_model

HIDDEN = """
import torch
from torch import nn
from pathlib import Path

def weights():
    return torch.load(Path(__file__).with_name("hidden.pt"), weights_only=True)

def closure():
    weight = weights()
    return lambda images: images.flatten(1) @ weight.T

class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        member = nn.Linear(64, 10, bias=False)
        member.weight.data = weights()
        self.members = [member]

    def forward(self, images):
        return sum(member(images.flatten(1)) for member in self.members)
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module whose models keep their weights where no state dict shows them."""
    (tmp_path / "hidden.py").write_text(HIDDEN)
    hide(tmp_path, 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("hidden", None)
    return tmp_path


def hide(folder: Path, seed: int) -> None:
    """Other weights under the same name."""
    torch.save(torch.randn(10, 64, generator=torch.Generator().manual_seed(seed)), folder / "hidden.pt")


def judge(folder: Path, checkpoint: str, **options: Any) -> Results:
    """The smallest evaluation there is, into `folder`/out; what was measured before is not measured again."""
    settings = {"data": DIGITS, "limit": 8, "batch_size": 8, "autoattack": "no", "eps": EPS, **options}
    return evaluate(
        EvaluateConfig(checkpoint, "table", output_dir=str(folder / "out"), **settings), log=lambda line: None
    )


@pytest.mark.parametrize("name", ["closure", "Ensemble"])
def test_weights_that_no_state_dict_shows(outside: Path, name: str) -> None:
    judge(outside, f"hidden:{name}")
    before = (outside / "out/progress/pgd20.0of1.jsonl").stat().st_mtime_ns
    judge(outside, f"hidden:{name}")
    assert (outside / "out/progress/pgd20.0of1.jsonl").stat().st_mtime_ns == before, "the same model goes on"
    hide(outside, 1)
    with pytest.raises(ValueError, match=r"other answers|answers.*--overwrite"):
        judge(outside, f"hidden:{name}")


def test_a_model_to_transfer_from(outside: Path) -> None:
    judge(outside, "hidden:Ensemble")
    first = judge(outside, "hidden:Ensemble", transfer_from=("hidden:closure",))
    assert "hidden:closure" in first.sections["transfer"], "asked for more, it goes on"
    model = (outside / "hidden.py").read_text()
    (outside / "hidden.py").write_text(model.replace("images.flatten(1) @ weight.T", "images.flatten(1) @ -weight.T"))
    sys.modules.pop("hidden")
    with pytest.raises(ValueError, match="hidden:closure"):
        judge(outside, "hidden:Ensemble", transfer_from=("hidden:closure",))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        judge(outside, "hidden:Ensemble", transfer_from=("nowhere.pth",))


def test_a_masked_autoencoder_in_a_folder(outside: Path) -> None:
    def save(seed: int) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = build_masked_model(ModelConfig(encoder="nano", patch_size=2), 8, 1)
        save_file(dict(file_state(model)), outside / "run" / "model.safetensors")

    (outside / "run").mkdir()
    save(0)
    for _ in range(2):
        judge(outside, "hidden:closure", pretrained=str(outside / "run"))
    save(1)
    with pytest.raises(ValueError, match="pretrained: "):
        judge(outside, "hidden:closure", pretrained=str(outside / "run"))


def folder_of_digits(root: Path) -> DataConfig:
    source = build_source(DIGITS, "test")
    for index in range(60):
        label = int(source.labels[index])
        (root / "val" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.pixels(index)[:, :, 0]).save(root / "val" / str(label) / f"{index:03d}.png")
    return DataConfig(source="folder", root=str(root), image_size=8, channels=1, augment="none", flip=False)


def test_labels_that_were_swapped_on_disk(outside: Path) -> None:
    data = folder_of_digits(outside / "data")
    judge(outside, "hidden:closure", data=data, limit=40)
    (outside / "data").rename(outside / "moved")
    moved = DataConfig(source="folder", root=str(outside / "moved"), image_size=8, channels=1, flip=False)
    judge(outside, "hidden:closure", data=moved, limit=40)  # known by what it holds
    zero, one = (outside / "moved/val" / name for name in "01")
    zero.rename(outside / "aside")
    one.rename(zero)
    (outside / "aside").rename(one)
    with pytest.raises(ValueError, match="data: content"):
        judge(outside, "hidden:closure", data=moved, limit=40)


def test_the_content_of_arrays_is_their_pixels_and_labels() -> None:
    source = build_source(DIGITS, "test")
    before = content_of(source)
    assert before == content_of(build_source(DIGITS, "test"))
    source.labels[5] = (source.labels[5] + 1) % 10
    labels = content_of(source)
    source.labels[5] = (source.labels[5] - 1) % 10
    source.images = source.images.copy()
    source.images[7, 0, 0, 0] ^= 1
    assert len({before, labels, content_of(source)}) == 3


def test_samples_of_shards_are_known_by_their_place_in_them(tmp_path: Path) -> None:
    numbers = np.arange(3)

    def tar(folder: str, size: int) -> ShardSource:
        places = 0 * numbers, 512 * numbers, numbers + size
        return ShardSource([tmp_path / folder / "val.tar"], ["a", "b", "c"], *places, numbers)

    def raw(folder: str, width: int) -> RawSource:
        table = {
            "shard_ids": 0 * numbers,
            "offsets": 64 * numbers,
            "heights": 8 + 0 * numbers,
            "widths": width + numbers,
        }
        return RawSource("raw", ["a", "b", "c"], numbers, [tmp_path / folder / "val.bin"], table, 1)

    for make in (tar, raw):
        source = make("here", 8)
        assert content_of(source) == content_of(make("there", 8)) != content_of(make("here", 9))
        assert content_of(source, numbers[:2]) == content_of(subset(source, numbers[:2])) != content_of(source)


@pytest.mark.parametrize("changed", [{"alpha": EPS / 8}, {"seed": 1}, {"restarts": 2}, {"eps": EPS / 2}])
def test_options_of_the_attacks(outside: Path, changed: dict[str, Any]) -> None:
    judge(outside, "hidden:closure")
    with pytest.raises(ValueError, match=f"{next(iter(changed))}: .* -> "):
        judge(outside, "hidden:closure", **changed)


def test_what_a_topic_asks_for_is_checked_with_its_rows(outside: Path) -> None:
    judge(outside, "hidden:closure", targets=1)
    with pytest.raises(OtherMeasurementError, match="other settings"):
        judge(outside, "hidden:closure", targets=2)


def test_overwrite_leaves_nothing_of_what_was_there(outside: Path) -> None:
    judge(outside, "hidden:closure", save_adversarial=True)
    assert list((outside / "out/adversarial/pgd20").iterdir())
    hide(outside, 1)
    judge(outside, "hidden:closure", overwrite=True)
    assert not (outside / "out/adversarial").exists(), "the images of the other model are gone"


def test_rounding_is_no_change() -> None:
    judged, logits = JudgedModel(SmallNet(), "", ""), torch.randn(8, 1000)
    saved = identity_of_model(judged, logits, 0.0)
    assert changes(saved, identity_of_model(judged, logits * (1 + 1e-5), 0.0)) == ""
    assert "answers" in changes(saved, identity_of_model(judged, logits * (1 + 1e-2), 0.0))
    one = logits.clone()
    one[3] = one[3].roll(1)
    assert "answers" in changes(saved, identity_of_model(judged, one, 0.0)), "one image of eight is enough"
    random = identity_of_model(judged, logits, 0.3)
    assert changes(random, identity_of_model(judged, logits + 0.3 * torch.randn(8, 1000), 0.3)) == ""


def test_compiling_does_not_change_the_digest() -> None:
    model = SmallNet()
    compiled = torch.compile(SmallNet(), backend="eager")
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in model.state_dict().items()})
    parted = build_masked_model(ModelConfig(encoder="nano", patch_size=2), 8, 1)
    part = SmallNet()
    part.load_state_dict(model.state_dict())
    part.head = torch.compile(part.head, backend="eager")
    assert len({JudgedModel(each, "", "").digest() for each in (model, compiled, part)}) == 1
    assert JudgedModel(parted, "", "").digest() == JudgedModel(torch.compile(parted), "", "").digest()
