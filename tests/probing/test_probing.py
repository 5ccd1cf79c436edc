"""Probes of a frozen encoder against scikit-learn on the same features, and the command on real digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources import build_source
from mimir_fast.evaluation.images import load_from
from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.file_names import to_files
from mimir_fast.probe import config_from, probe
from mimir_fast.probing.encoder import FrozenEncoder, open_encoder
from mimir_fast.probing.features import Features, extract
from mimir_fast.probing.heads import RATES, logistic_regression, train_heads
from mimir_fast.probing.neighbours import NeighbourHead, nearest
from mimir_fast.probing.run import share
from mimir_fast.world import World

DATA = DataConfig(source="digits", image_size=32, channels=3)
HERE = World(0, 1, torch.device("cpu"))


def clusters(count: int, seed: int) -> Features:
    """Five overlapping clusters in 24 dimensions, of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (count,), generator=generator)
    scale = torch.logspace(-1, 2, 24)
    values = (centres[labels] + 1.2 * torch.randn(count, 24, generator=generator)) * scale + 3 * scale
    return Features(values, labels, torch.arange(count))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-nano for digits, as a file without a head."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(encoder="nano", patch_size=8, global_pool="cls"), 32, 10)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file({n: t.contiguous() for n, t in to_files(model, model.state_dict()).items() if "head" not in n}, path)
    return path


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_are_scikit_learns(k: int) -> None:
    for offset in (0, 3e4):  # vectors that are nearly parallel: all cosines are 1 in fp32
        train, test = clusters(300, 1), clusters(200, 2)
        train.values += offset
        test.values += offset
        wanted = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
        wanted.fit(train.values.double().numpy(), train.labels.numpy())
        head = NeighbourHead(train.values, train.labels, 5, k, votes="uniform")
        assert np.array_equal(head(test.values).argmax(1).numpy(), wanted.predict(test.values.double().numpy()))


def test_softmax_votes_by_hand_and_their_gradient() -> None:
    train, query = clusters(50, 1), clusters(3, 2).values.requires_grad_()
    similarities, index = nearest(query, train.values, 7)
    weights = (similarities / 0.07).exp() / (similarities / 0.07).exp().sum(1, keepdim=True)
    logits = NeighbourHead(train.values, train.labels, 5, 7)(query)
    for row in range(3):
        for label in range(5):
            mass = weights[row][train.labels[index[row]] == label].sum()
            assert logits[row, label].exp().item() == pytest.approx(mass.item(), abs=1e-6)
    assert torch.autograd.grad(logits.amax(1).sum(), query)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="k=51"):
        nearest(query, train.values, 51)


def test_logistic_regression_is_scikit_learns() -> None:
    train, test = clusters(400, 1), clusters(300, 2)
    scaler = StandardScaler().fit(train.values.numpy())
    wanted = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8)
    wanted.fit(scaler.transform(train.values.numpy()), train.labels.numpy())
    found = logistic_regression(train, 5, penalty=2.0)
    theirs = wanted.predict_proba(scaler.transform(test.values.numpy()))
    np.testing.assert_allclose(found.logits(test.values)[0].softmax(1).numpy(), theirs, atol=1e-3)


def test_heads_trained_together_are_those_trained_alone() -> None:
    train, test = clusters(400, 1), clusters(300, 2)
    together = train_heads(train, 5, epochs=5, batch_size=64)
    for index in (0, 6, 12):
        alone = train_heads(train, 5, rates=[RATES[index]], epochs=5, batch_size=64)
        torch.testing.assert_close(together.weight[index], alone.weight[0], rtol=1e-3, atol=1e-6)
    best = max(together.accuracies(test))
    assert best > 0.95 * logistic_regression(train, 5).accuracies(test)[0]
    head = together.linear(3)
    torch.testing.assert_close(head(test.values), together.logits(test.values)[3], rtol=1e-4, atol=1e-4)


def test_a_share_of_the_labels_has_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    chosen = share(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [10, 5, 1] and torch.equal(chosen, chosen.sort().values)
    assert not torch.equal(chosen, share(labels, 0.1, seed=1))
    assert len(share(labels, 1.0, seed=0)) == 153


def test_features_are_the_encoders_whatever_the_ranks(pretrained: Path, tmp_path: Path) -> None:
    encoder, _ = open_encoder(str(pretrained), DATA)
    source = build_source(DATA, "test")
    indices = np.arange(0, 60, 2)
    found = extract(encoder, source, DATA, indices, tmp_path / "a.npy", HERE, batch_size=7)
    images = load_from(source, DATA, indices)
    with torch.no_grad():
        wanted = encoder(images.images.float() / 255)
    torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, images.labels) and torch.equal(found.samples, images.samples)


def test_pools(pretrained: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    cls, mean, both = (open_encoder(str(pretrained), DATA, pool=pool)[0] for pool in ("cls", "mean", "both"))
    tokens = cls.tokens(images)
    torch.testing.assert_close(cls(images), tokens[:, 0])
    torch.testing.assert_close(mean(images), tokens[:, 1:].mean(1))
    torch.testing.assert_close(both(images), torch.cat([cls(images), mean(images)], dim=1))
    assert not any(p.requires_grad for p in cls.parameters())
    with pytest.raises(ValueError, match="no cls token"):
        FrozenEncoder(torch.nn.Identity(), lambda x: x, 0, "both")


def test_a_normalisation_that_the_file_does_not_say(pretrained: Path) -> None:
    images, mean, std = torch.rand(2, 3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    asked, notes = open_encoder(str(pretrained), DATA, statistics=(mean, std))
    plain, _ = open_encoder(str(pretrained), DATA)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(asked(images), plain(by_hand), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(asked(images), plain(images), rtol=1e-2)
    assert any("0.4" in note for note in notes)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18", "eva02_tiny_patch14_224"],
)
def test_encoders_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    data = DataConfig(source="digits", image_size={"swin": 224, "eva0": 56}.get(name[:4], 64))
    encoder, notes = open_encoder(f"timm:{name}@random", data)
    images = torch.rand(1, 3, data.image_size, data.image_size)
    model = encoder.model
    with torch.no_grad():
        features = model.forward_features(images)
        wanted = model.model.forward_head(features, pre_logits=True)
        found = encoder(images)
    assert timm is not None and any("random" in note for note in notes)
    if name == "convnext_atto":  # its head has a norm behind the pooling
        wanted = features.mean(dim=(2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Patches(torch.nn.Module):
    """A cls token and the patches of an image, with what timm's models tell of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.num_prefix_tokens, self.global_pool = 1, "token"
        self.embed, self.head = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Linear(8, 10)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(images)[:, 0])


@pytest.mark.filterwarnings("ignore")
def test_programs(tmp_path: Path) -> None:
    """TorchScript keeps what was scripted; of a trace, an exported program and ONNX there is nothing but the answer."""
    images, model = torch.rand(2, 3, 32, 32), Patches().eval()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    encoder, _ = open_encoder(str(tmp_path / "model.pt"), DATA)
    torch.testing.assert_close(encoder.tokens(images), model.forward_features(images).detach())
    assert (encoder.num_prefix, encoder.pool, encoder.token_width) == (1, "cls", 8)
    torch.jit.trace(model, images).save(str(tmp_path / "trace.ts"))
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    for name, words in (("trace.ts", "TorchScript"), ("model.onnx", "no gradients")):
        with pytest.raises(ValueError, match=words) as refused:
            open_encoder(str(tmp_path / name), DATA)
        assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_programs_of_a_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    images, data = torch.rand(2, 3, 64, 64), DataConfig(source="digits", image_size=64)
    model = timm.create_model("test_vit", img_size=64, reg_tokens=2, num_classes=10, scriptable=True).eval()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    encoder, _ = open_encoder(str(tmp_path / "model.pt"), data)
    with torch.no_grad():
        torch.testing.assert_close(encoder.tokens(images), model.forward_features(images), rtol=1e-4, atol=1e-5)
    assert (encoder.num_prefix, encoder.pool, encoder.token_width) == (3, "cls", 64)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"torch\.export"):
        open_encoder(str(tmp_path / "model.pt2"), data)


def _live(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 32, "num_labels": 10}
    vit = sizes | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
                   "patch_size": 8}  # fmt: skip
    staged = sizes | {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "patch_size": 4}
    swin = sizes | {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4}
    base, _, rest = kind.partition("For")
    config = getattr(transformers, f"{base.removesuffix('Model')}Config")
    values = staged if base == "ConvNext" else swin if base == "Swin" else vit
    return getattr(transformers, f"{base}For{rest}" if rest else base)(config(**values)).eval()


LIVE = {"ViTForImageClassification": (1, "cls"), "ViTModel": (1, "cls"), "DeiTForImageClassification": (2, "cls"),
        "BeitForImageClassification": (1, "mean"), "ConvNextForImageClassification": (0, "mean"),
        "SwinForImageClassification": (0, "mean"), "Dinov2WithRegistersModel": (5, "cls")}  # fmt: skip


@pytest.mark.parametrize("kind", LIVE)
def test_live_models_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`last_hidden_state`, behind the normalisation that is asked for; a head reads of it what it always reads."""
    model, images = _live(kind), torch.rand(2, 3, 32, 32)
    monkeypatch.setattr(f"{__name__}.made", lambda: model, raising=False)
    encoder, _ = open_encoder(f"{__name__}:made", DATA, statistics=((0.5,) * 3, (0.25,) * 3))
    with torch.no_grad():
        pixels = (images - 0.5) / 0.25
        inside = model.base_model(pixels)
        found = encoder.tokens(images)
        wanted = inside.last_hidden_state
        wanted = wanted.flatten(2).transpose(1, 2) if wanted.ndim == 4 else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        if hasattr(model, "classifier"):
            torch.testing.assert_close(model.classifier(encoder(images)), model(pixels).logits, rtol=1e-4, atol=1e-5)
    assert (encoder.num_prefix, encoder.pool) == LIVE[kind] and encoder.layers
    assert encoder.token_width == found.shape[-1]


def test_a_live_masked_autoencoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _live("ViTMAEModel")
    monkeypatch.setattr(f"{__name__}.made", lambda: model, raising=False)
    with pytest.raises(ValueError, match="hides patches at random"):
        open_encoder(f"{__name__}:made", DATA)


def test_the_command_on_digits(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--checkpoint", str(pretrained), "--data.source", "digits", "--data.image_size", "32", "--probes", "knn"]
    line += ["linear", "logistic", "attentive", "--label_fractions", "0.1", "--limit", "60", "--epochs", "5"]
    line += ["--attentive_epochs", "1", "--attack_images", "8", "--attack_steps", "2", "--device", "cpu"]
    outcomes = probe(config_from([*line, "--output_dir", str(tmp_path)]))
    found = json.loads((tmp_path / "results.json").read_text())
    assert [o["probe"] for o in found["outcomes"]] == ["knn", "linear", "logistic", "attentive"]
    assert all(o["clean"]["total"] == 60 and o["attacked"]["total"] == 8 for o in found["outcomes"])
    assert outcomes[0].train_images in range(140, 160)
    assert all(o["clean"]["accuracy"] > 0.3 for o in found["outcomes"][:3])  # chance is 0.1
    page = (tmp_path / "report.html").read_text()
    few = "1 epochs are 1 steps of 128 images, too few for a query"
    assert few in capsys.readouterr().out and few in page and "--attentive_epochs 500" in page
    assert page.count("<img") == 6 * (6 + 6 + 4) and "nearest neighbours" in page and "Attention maps" in page
    assert set(found["pictures"]) == {"attention", "components", "distance"}
    for name, outcome in (("clean", found["outcomes"][0]), ("attacked", found["outcomes"][0])):
        assert outcome[name]["right"].count("1") == outcome[name]["correct"]
