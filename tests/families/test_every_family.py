"""What every encoder family must do, whatever it is: train by every method, be attacked, resume, shard, export.

A new family is tested by being registered.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from file_state import file_state, load_file_state
from torch import Tensor, nn

from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.reconstruction import attack_visible
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.checkpoints.reading import checkpoints_of, read_tensors
from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.data import DataConfig
from mimir_fast.data.batch import Batch
from mimir_fast.export import ExportConfig, export
from mimir_fast.methods.registry import all_methods, find_method
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.families import all_families, recognise
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.models.loading import initialize
from mimir_fast.models.masked_loading import load_masked_model
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.models.weight_files import Weights
from mimir_fast.ops.patches import gather_patches, masked_targets, patchify
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.pretraining import PretrainConfig, pretrain, with_method

FAMILIES = list(all_families())
METHODS = list(all_methods("pretrain"))
# Class attention and the cls token it serves: patches learn nothing from them, so a loss on patches alone leaves them
# (and their twins in XCiT's decoder, which the authors have too) without a signal.
CLS_STAGE = ("cls_token", "blocks_token_only.", "cls_attn_blocks.", "decoder_cls_attn_blocks.")
STEM = {"swin": 2, "convnext": 2}  # pixels of a stem patch at 32²; 8 elsewhere


def patch_of(family: str) -> int:
    return STEM.get(family, 8)


def config_of(family: str, method: str = "mimir", **run: Any) -> PretrainConfig:
    """Digits at 32², the family's smallest size."""
    base = PretrainConfig(
        model=ModelConfig(family=family, encoder="nano", patch_size=patch_of(family)),
        data=DataConfig(source="digits", image_size=32, limit=32),
        run=RunConfig(batch_size=8, max_steps=3, save_every=1, device="cpu", **run),
    )
    config = with_method(base, method)
    return replace(config, objective=replace(config.objective, mask_unit=None))


def model_of(family: str, **options: Any) -> MaskedModel:
    torch.manual_seed(0)
    return build_masked_model(ModelConfig(family=family, encoder="nano", patch_size=patch_of(family), **options), 32)


def batch_of(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(count) % 3, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def quarter(model: MaskedModel, images: Tensor) -> View:
    """Every fourth patch is visible, another one in each image."""
    N = model.num_patches
    order = torch.stack([torch.roll(torch.arange(N), -i) for i in range(len(images))])
    keep, masked = order[:, ::4], order.view(len(images), -1, 4)[:, :, 1:].flatten(1)
    return View(gather_patches(patchify(images, model.patch_size), keep), keep, masked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_trains_every_parameter(family: str, method: str) -> None:
    config, entry = config_of(family, method), find_method("pretrain", method)
    torch.manual_seed(0)
    model = build_masked_model(config.model, 32, num_classes=3 if entry.labels else 0)
    out = entry.build(config.objective)(model, batch_of(), seed=0, step=0)
    assert out["loss"].isfinite()
    out["loss"].backward()
    missing = [name for name, p in parameters_by_file_name(model) if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    silent = [name for name, p in parameters_by_file_name(model) if p.grad is not None and not p.grad.any()]
    if family in ("cait", "xcit"):
        silent = [name for name in silent if not name.startswith(CLS_STAGE)]
    assert not silent, f"the gradient of {silent} is zero"


@pytest.mark.parametrize("decoder", ["light", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_pixels_do_not_reach_the_latent(family: str, decoder: str) -> None:
    """Other pixels in the masked patches, the same bits in latent and prediction."""
    model = model_of(family, decoder=decoder)
    images = torch.rand(3, 3, 32, 32)
    view = quarter(model, images)
    first = model(view)
    patches = patchify(images, model.patch_size)
    noise = torch.rand(3, view.masked.shape[1], patches.shape[2])
    other = patches.scatter(1, view.masked.unsqueeze(-1).expand_as(noise), noise)
    second = model(view._replace(patches=gather_patches(other, view.keep)))
    assert torch.equal(first.latent, second.latent) and torch.equal(first.prediction, second.prediction)
    assert first.prediction.shape == noise.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attack_finds_more_than_noise_and_leaves_no_trace(family: str) -> None:
    """Parameters, gradients, buffers (BatchNorm's among them) and modes are as they were."""
    model = model_of(family).train()
    images = torch.rand(4, 3, 32, 32)
    view = quarter(model, images)
    target = masked_targets(images, view.masked, model.patch_size)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    noisy = (view.patches + 8 / 255 * (2 * torch.rand_like(view.patches) - 1)).clamp(0, 1)
    threat = LinfThreat(eps=8 / 255, alpha=2 / 255, num_steps=5)
    attacked = attack_visible(model, images, view.patches, noisy, view.keep, view.masked, True, threat)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert (attacked - view.patches).abs().max() <= 8 / 255 + 1e-6

    model.eval()

    def error(patches: Tensor) -> float:
        with torch.no_grad():
            return float((model(view._replace(patches=patches)).prediction - target).square().sum())

    assert error(attacked) > error(noisy)


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_starts_from_the_encoder(family: str) -> None:
    """Everything but head and pooling's norm comes from pre-training; PGD and all gradients work."""
    source = model_of(family)
    torch.manual_seed(1)
    config = ClassifierConfig(family=family, encoder="nano", patch_size=patch_of(family), drop_path=0.0)
    model = build_classifier(config, 32, 5)
    report = initialize(model, Weights(dict(file_state(source)), "the pre-trained model"))
    assert all(name.startswith(("head.", "fc_norm.", "norm.")) for name in report.fresh), report
    for name, tensor in source.encoder.state_dict().items():
        if name in model.encoder.state_dict() and not name.startswith("norm."):
            assert torch.equal(model.encoder.state_dict()[name], tensor), name
    nn.init.normal_(model.head.weight, std=0.2)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    adversarial = pgd(model, images, labels, LinfThreat(eps=0.1, alpha=0.05, num_steps=2))
    assert (adversarial - images).abs().max() > 0.05
    nn.functional.cross_entropy(model(adversarial), labels).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("vit", "cait", "swin") else [pytest.mark.slow]) for f in FAMILIES]
)
def test_resume_is_bit_exact(family: str, tmp_path: Path) -> None:
    whole = pretrain(config_of(family, output_dir=str(tmp_path / "whole")))
    parts = config_of(family, output_dir=str(tmp_path / "parts"))
    pretrain(replace(parts, run=replace(parts.run, stop_after=1)))
    pretrain(parts)
    wanted, found = (read_tensors(checkpoints_of(run)[-1], "") for run in (whole, tmp_path / "parts"))
    assert set(wanted) == set(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    model, objective = load_masked_model(whole)
    assert objective["mi"]["estimator"] == "hsic"
    assert all(torch.equal(t, wanted[f"model/{name}"]) for name, t in file_state(model).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_alone_tell_the_architecture(family: str) -> None:
    found = recognise(file_state(model_of(family)))
    assert found is not None
    assert (found.family, found.size, found.patch_size, found.channels) == (family, "nano", patch_of(family), 3)
    assert found.image_size == 32 or not all_families()[family].image_size_in_tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_computes_the_same_from_the_exported_file(family: str, tmp_path: Path) -> None:
    """A classifier's logits in timm's own class, built from nothing but the file; our reader takes it back."""
    torch.manual_seed(0)
    config = ClassifierConfig(family=family, encoder="nano", patch_size=patch_of(family))
    model = build_classifier(config, 32, 5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    run = tmp_path / "run"
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    save_checkpoint(
        run / "checkpoints" / "step-00000001",
        tensors,
        {"step": 1, "config": {"model": asdict(config), "data": {"image_size": 32}}},
    )
    path = export(ExportConfig(str(run), str(tmp_path / "timm.safetensors")))
    theirs = build_in_timm(path)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
    back = export(ExportConfig(str(run), str(tmp_path / "ours.safetensors"), format="safetensors"))
    assert torch.equal(load_classifier(back)(images), model(images))


def build_in_timm(path: Path) -> nn.Module:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    made: dict[str, Any] = {}
    exec(metadata["code"], made)  # a class of timm with its arguments, and layers that no argument describes
    model: nn.Module = made["model"]
    load_file_state(model, load_file(path))
    return model.eval()


def test_adversarial_adapters_are_exported_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AEMIM: the clean norms by default, which is said; both are plain timm models."""
    model = model_of("vit", adapters=True)
    with torch.no_grad():
        model.encoder.norm.weight_adversarial.fill_(3.0)
    run = tmp_path / "run"
    save_checkpoint(
        run / "checkpoints" / "step-00000001", {f"model/{n}": t.detach() for n, t in file_state(model).items()},
        {"step": 1, "config": {"model": {"adapters": True}}},
    )  # fmt: skip
    clean = build_in_timm(export(ExportConfig(str(run), str(tmp_path / "clean.safetensors"))))
    assert "the clean ones are exported" in capsys.readouterr().out
    adversarial = export(ExportConfig(str(run), str(tmp_path / "adversarial.safetensors"), domain="adversarial"))
    assert clean.norm.weight.eq(1).all() and build_in_timm(adversarial).norm.weight.eq(3).all()
    loaded, _ = load_masked_model(run)
    assert loaded.encoder.has_adapters


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_follow_one(family: str, command: Command, tmp_path: Path) -> None:
    """AEMIM, adapters and all, by DDP and sharded by FSDP2: the losses of one process up to float order."""
    line = [
        "--recipe", "digits/mimir_vit_nano", "--method", "aemim", "--model.family", family, "--model.patch_size",
        str(patch_of(family)), "--data.limit", "32", "--batch_size", "8", "--max_steps", "3", "--log_every", "1",
    ]  # fmt: skip

    def losses(name: str, *extra: str, ranks: int = 1) -> list[float]:
        run = tmp_path / name
        out = command("mimir_fast.pretrain", *line, "--output_dir", str(run), *extra, ranks=ranks)
        assert out.returncode == 0, out.stderr
        return [json.loads(text)["loss"] for text in (run / "metrics.jsonl").read_text().splitlines()]

    alone = losses("alone")
    # BatchNorm sees each rank's own half of the batch, so XCiT is another function on two ranks.
    rtol = 0.05 if family == "xcit" else 1e-3
    for strategy in ("ddp", "fsdp"):
        torch.testing.assert_close(losses(strategy, "--strategy", strategy, ranks=2), alone, rtol=rtol, atol=1e-4)


def test_the_wrong_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown encoder family 'vitt'; did you mean vit\?"):
        ModelConfig(family="vitt")
    with pytest.raises(ValueError, match=r"unknown size of ViT 'bse'; did you mean base\?"):
        ModelConfig(encoder="bse")
