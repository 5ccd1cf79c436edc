"""Pictures of a frozen encoder: each number against its definition, on our families and on timm's models."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from small_families import make, moved
from torch import Tensor, nn

from mimir_fast.data.config import DataConfig
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.layers.outputs import layers_of, outputs_of
from mimir_fast.models.blocks import Attention
from mimir_fast.models.class_attention import ClassAttention
from mimir_fast.models.families.cait import TalkingHeads
from mimir_fast.models.families.convit import PositionalAttention, grid_offsets
from mimir_fast.models.file_names import to_files
from mimir_fast.ops.cka import cka
from mimir_fast.probing.attention_maps import looks_of, weights_of
from mimir_fast.probing.encoder import FrozenEncoder, open_encoder
from mimir_fast.probing.picture import Mean, View, all_pictures, grid_of
from mimir_fast.probing.pictures import distance
from mimir_fast.probing.pictures.components import principal
from mimir_fast.probing.pictures.similarity import StreamedCka, products

DATA = DataConfig(source="digits", image_size=32, channels=3)
HERE = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "talking", "positional", "class"])
def test_an_attention_map_is_what_values_are_multiplied_by(kind: str) -> None:
    x, more = noise(2, 9, 32), ()
    layer: nn.Module
    if kind == "class":
        layer = moved(ClassAttention(32, 4))
        v = layer.v(x)
    elif kind == "positional":
        layer, more = moved(PositionalAttention(32, 4)), (grid_offsets(3),)
        v = layer.v(x)
    else:
        layer = moved(TalkingHeads(32, 4) if kind == "talking" else Attention(32, 4, qk_norm=kind == "qk_norm"))
        v = layer.qkv(x)[..., 64:]
    weights = layer.attention_map(x, *more)
    attended = (weights @ v.unflatten(-1, (4, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.proj(attended), layer(x, *more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, noise(1, 1, 5, 7, seed=3) > -1, noise(2, 3, 5, 7, seed=4)], ids=str)
def test_weights_seen_in_calls_of_pytorch(mask: Tensor | None) -> None:
    q, k, v = noise(2, 3, 5, 8, seed=0), noise(2, 3, 7, 8, seed=1), noise(2, 3, 7, 8, seed=2)
    for scale in (None, 0.5):
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        torch.testing.assert_close(weights_of(q, k, v, mask, scale=scale) @ v, wanted, rtol=1e-4, atol=1e-5)


def test_the_same_weights_look_the_same_as_ours_and_as_timms(tmp_path: Path) -> None:
    vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = moved(vit.VisionTransformer(32, 8, embed_dim=96, depth=4, num_heads=3, num_classes=10)).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    ours, _ = open_encoder(str(tmp_path / "vit.safetensors"), DATA)
    theirs = FrozenEncoder(model, model.forward_features, 1, width=96, layers=layers_of(model))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name in ("cls", "patches"):
        mine, other = getattr(looks_of(ours, images), name), getattr(looks_of(theirs, images), name)
        assert mine.shape == (3, 16)
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    assert list(ours.layers) == ["1", "2", "3", "4"] and list(theirs.layers) == [f"blocks.{i}" for i in range(4)]
    seen = []
    for encoder in (ours, theirs):
        with torch.no_grad(), outputs_of(encoder.layers) as outputs:
            encoder(images)
        seen.append(list(outputs.values()))
    for mine, other in zip(*seen, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert not any(m._forward_hooks for m in model.modules())


FAMILIES = {"vit": "cls patches", "convstem": "cls patches", "convit": "cls patches", "cait": "cls patches",
            "xcit": "cls", "swin": "", "convnext": ""}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_it_is_pretrained(family: str, tmp_path: Path) -> None:
    masked = make(family)
    save_file({n: t.contiguous() for n, t in to_files(masked, masked.state_dict()).items()}, tmp_path / "m.safetensors")
    encoder, _ = open_encoder(str(tmp_path / "m.safetensors"), DATA)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    looks = looks_of(encoder, images)
    assert " ".join(name for name in ("cls", "patches") if getattr(looks, name) is not None) == FAMILIES[family]
    assert len(encoder.layers) == len(masked.encoder.layers())
    labels = torch.arange(4)
    few = EvaluationImages((images * 255).byte(), labels, labels, ("a", "b", "c", "d"), "digits", {})
    view = View(encoder, "a", few, few.images.float() / 255, "none", few, HERE, encoder, "b")
    for picture in all_pictures():  # an attack that does nothing moves nothing; a model is similar to itself
        numbers, page = picture.look(view) or ({}, "")
        assert page
        if picture.name == "attention":
            assert all(moved["mean"] < 1e-6 for moved in numbers.get("moved", {}).values())
            assert ("reason" in numbers) == (not FAMILIES[family])
        if picture.name == "distance":
            assert all(layer["relative_l2"]["mean"] == 0 for layer in numbers["layers"])
            assert len(numbers["layers"]) == len(encoder.layers) + 1
        if picture.name == "similarity":
            assert all(numbers["cka"][i][i] == pytest.approx(1, abs=1e-3) for i in range(len(encoder.layers)))


def test_cka_of_one_batch_is_ours_and_of_two_their_sums() -> None:
    x, y, z = noise(24, 3, 5, seed=0), noise(24, 40, seed=1), noise(24, 6, seed=2)
    y = y + F.pad(x.flatten(1), (0, 25))
    stream = StreamedCka()
    stream.update([products(x), products(z)], [products(y)])
    for row, a in enumerate((x, z)):
        wanted = cka(a, y, kernel="linear", estimator="unbiased")
        assert stream.value()[row, 0].item() == pytest.approx(wanted.item(), abs=1e-5)
    rotation = torch.linalg.qr(noise(15, 15))[0]
    turned = StreamedCka()
    for cut in (slice(0, 11), slice(11, 21), slice(21, 24)):  # of three images none can be estimated
        turned.update([products(x[cut])], [products(3 * x[cut].flatten(1) @ rotation)])
    assert turned.value().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="fewer than 4"):
        StreamedCka().value()


def test_distances_by_hand() -> None:
    linear = nn.Linear(12, 6, bias=False)
    model = nn.Sequential(nn.Flatten(), linear)
    encoder = FrozenEncoder(model, lambda x: model(x)[:, None], 0, layers={"linear": linear})
    images = torch.randint(1, 200, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(5)
    clean = images.float() / 255
    attacked = clean + 0.1 * torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    few = EvaluationImages(images, labels, labels, tuple("abcde"), "x", {})
    found = distance.look(View(encoder, "a", few, attacked, "PGD", few, HERE))
    assert found is not None
    with torch.no_grad():
        z, moved_z = linear(clean.flatten(1)), linear(attacked.flatten(1))
    relative = Mean.of((moved_z - z).norm(dim=1) / z.norm(dim=1))
    assert found[0]["layers"][0]["relative_l2"]["mean"] == pytest.approx(relative.value, rel=1e-5)
    cosine = (z * moved_z).sum(1) / z.norm(dim=1) / moved_z.norm(dim=1)
    assert found[0]["layers"][1]["cosine"]["mean"] == pytest.approx(cosine.mean().item(), rel=1e-5)
    assert distance.look(View(encoder, "a", few, None, "", few, HERE)) is None


def test_components_are_scikit_learns() -> None:
    tokens = noise(60, 8) * torch.logspace(0, 1, 8) + 5
    _, directions, shares = principal(tokens)
    wanted = PCA(3).fit(tokens.numpy())
    assert shares == pytest.approx(wanted.explained_variance_ratio_.tolist(), abs=1e-5)
    same = (directions.T * torch.from_numpy(wanted.components_)).sum(dim=1).abs()
    torch.testing.assert_close(same, torch.ones(3), rtol=1e-4, atol=1e-4)
    assert all(d[d.abs().argmax()] > 0 for d in directions.T)
    assert principal(noise(2, 8))[1][:, 2].abs().sum() == 0  # two tokens have one direction


def test_grids() -> None:
    assert grid_of(196, 224, 224) == (14, 14) and grid_of(6, 32, 48) == (2, 3) and grid_of(24, 64, 96) == (4, 6)
    assert grid_of(17, 32, 32) is None
