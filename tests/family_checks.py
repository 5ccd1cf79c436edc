"""What every family must do, written once; the families' own test files call these.

A `Case` is one model at a small size. Its parameters are shaken, so that no norm, bias or layer scale is at a value
that hides a mistake.
"""

from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from file_state import file_state, load_file_state
from torch import Tensor, nn

from mimir_fast.layers.norms import ADVERSARIAL, is_adapter
from mimir_fast.models.branches import Branches
from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.families import Architecture, architecture_of, build_encoder, find_family, recognise
from mimir_fast.models.masked_model import DecoderName, MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.ops.patches import masked_targets, patchify, patchify_gather
from mimir_fast.sizes import Size, height_width

assert timm  # what `TimmModel.code` refers to


@dataclass(frozen=True)
class Case:
    """One model."""

    family: str
    size: str
    image_size: Size
    patch_size: int
    channels: int = 3
    options: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """What the encoder is built from."""
        return architecture_of(self.family, self.size, self.image_size, self.patch_size, self.channels, self.options)

    def encoder(self, seed: int = 0) -> Encoder:
        """Shaken, in eval mode."""
        torch.manual_seed(seed)
        return shaken(build_encoder(self.architecture)).eval()

    def masked_model(self, decoder: DecoderName = "light") -> MaskedModel:
        """Shaken, in train mode."""
        torch.manual_seed(0)
        config = ModelConfig(self.family, self.size, self.patch_size, decoder, options=self.options)
        return shaken(build_masked_model(config, self.image_size, self.channels))

    def classifier(self, num_classes: int = 7, **options: Any) -> Classifier:
        """Shaken, in eval mode."""
        torch.manual_seed(0)
        config = ClassifierConfig(self.family, self.size, self.patch_size, options=self.options, **options)
        return shaken(Classifier(config, self.image_size, num_classes, self.channels)).eval()

    def images(self, batch: int = 2, seed: int = 1) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, self.channels, *height_width(self.image_size), generator=generator)


def shaken(model: nn.Module) -> Any:
    """Every trainable parameter moved by noise, so that nothing is 0, 1 or 1e-6."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.5 if name.endswith("gamma") else 0.1 if parameter.ndim < 2 else 0.02
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def some_places(encoder: Encoder, batch: int = 2, keep: int | None = None, seed: int = 3) -> Tensor:
    """(B, K) int64 in random order: a quarter of the patches unless `keep` says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, encoder.num_patches, generator=generator)
    return noise.argsort(dim=1)[:, : keep or max(1, encoder.num_patches // 4)]


def others(places_BK: Tensor, num_patches: int) -> Tensor:
    """(B, N − K): the places that are not named."""
    hidden = torch.ones(len(places_BK), num_patches).scatter(1, places_BK, 0)
    return hidden.nonzero()[:, 1].view(len(places_BK), -1)


def view_of(model: MaskedModel, images: Tensor, places: Tensor, domain: int = 0) -> View:
    """The visible patches of the images, and all the others asked for."""
    patches = patchify_gather(images, places, model.patch_size)
    return View(patches, places, others(places, model.num_patches), domain)


def timm_of(tensors: dict[str, Tensor], architecture: Architecture) -> nn.Module:
    """timm's model, made by the code that our export prints, with the weights."""
    exported = find_family(architecture.family).to_timm(tensors, architecture)
    namespace: dict[str, Any] = {}
    exec(exported.code, namespace)
    model: nn.Module = namespace["model"]
    load_file_state(model, exported.tensors)
    return model.eval()


def check_equals_timm(case: Case, tolerance: float = 1e-5, **options: Any) -> None:
    """Logits of the classifier and features of the pre-trained encoder, relative to their size; and the way back."""
    classifier, images = case.classifier(**options), case.images()
    state = file_state(classifier)
    theirs = timm_of(state, case.architecture)
    with torch.no_grad():
        ours, wanted = classifier(images), theirs(images)
        assert wanted.std() > 1e-3
        torch.testing.assert_close(ours, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    back = find_family(case.family).from_timm(theirs.state_dict())
    assert recognise(back) is not None and set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)

    encoder = case.encoder()
    theirs = timm_of(encoder.state_dict(), case.architecture)
    with torch.no_grad():
        latent = encoder.encode(encoder.embed(patchify(images, encoder.mask_unit), None), None)
        wanted = theirs.forward_features(images)  # type: ignore[operator]
        if wanted.ndim == 4:  # NCHW or NHWC
            wanted = (wanted if case.family == "swin" else wanted.permute(0, 2, 3, 1)).flatten(1, 2)
        torch.testing.assert_close(latent, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def check_all_visible_equals_whole(case: Case) -> None:
    """Naming all patches, in any order, is the whole image."""
    encoder, images = case.encoder(), case.images()
    places = some_places(encoder, keep=encoder.num_patches)
    with torch.no_grad():
        whole = encoder.encode(encoder.embed(patchify(images, encoder.mask_unit), None), None)
        patches = patchify_gather(images, places, encoder.mask_unit)
        latent = encoder.encode(encoder.embed(patches, places), places)
    prefix = encoder.num_prefix
    rows = whole[:, prefix:].gather(1, places.unsqueeze(-1).expand(-1, -1, encoder.width))
    torch.testing.assert_close(latent[:, prefix:], rows, rtol=1e-4, atol=1e-4)


def check_nothing_leaks(case: Case) -> None:
    """Other pixels under the mask: the same bits of the latent. Another visible pixel: other ones, in every token."""
    for decoder in ("light", "linear"):
        model = case.masked_model(decoder).eval()
        images, places = case.images(), some_places(model.encoder)
        hidden = others(places, model.num_patches)
        mask = torch.zeros(len(places), model.num_patches, 1).scatter(1, hidden.unsqueeze(-1), 1)
        patches = patchify(images, model.patch_size)
        changed = patches * (1 - mask) + torch.rand_like(patches) * mask
        with torch.no_grad():
            latent = model(View(patches.gather(1, expand(places, patches)), places), decode=False)
            again = model(View(changed.gather(1, expand(places, changed)), places), decode=False)
            assert torch.equal(latent, again)
            seen = patches.clone()
            seen[0, places[0, 0]] = 0
            other = model(View(seen.gather(1, expand(places, seen)), places), decode=False)
        assert not torch.equal(latent[0], other[0]) and torch.equal(latent[1], other[1])


def expand(places_BK: Tensor, rows_BNP: Tensor) -> Tensor:
    """(B, K, P) index for `gather`."""
    return places_BK.unsqueeze(-1).expand(-1, -1, rows_BNP.shape[-1])


def check_order_of_places(case: Case) -> None:
    """Visible patches in another order: the latent in that order."""
    encoder, images = case.encoder(), case.images()
    places = some_places(encoder)
    order = torch.randperm(places.shape[1], generator=torch.Generator().manual_seed(5))

    def latent(places: Tensor) -> Tensor:
        patches = patchify_gather(images, places, encoder.mask_unit)
        return encoder.encode(encoder.embed(patches, places), places)[:, encoder.num_prefix :]

    with torch.no_grad():
        torch.testing.assert_close(latent(places[:, order]), latent(places)[:, order], rtol=1e-4, atol=1e-5)


def check_gradients(case: Case) -> None:
    """A gradient reaches every parameter, and the visible pixels, in both kinds of masked model."""
    for decoder in ("light", "linear"):
        model, images = case.masked_model(decoder), case.images().requires_grad_()
        view = view_of(model, images, some_places(model.encoder))
        assert view.masked is not None
        prediction = model(view).prediction
        assert prediction.shape == (2, view.masked.shape[1], model.encoder.patch_dim)
        target = masked_targets(images.detach(), view.masked, model.patch_size)
        (prediction - target).square().mean().backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not without, (decoder, without)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert images.grad is not None
        seen = patchify(images.grad, model.patch_size).abs().sum(-1)
        hidden = seen.gather(1, view.masked)
        assert not hidden.any() and seen.gather(1, view.keep).all()


def check_adapters(case: Case) -> None:
    """Both domains give the same at first; then each norm of the second belongs to it alone, and gets a gradient."""
    model = case.masked_model().eval()
    model.encoder.add_adapters()
    images, places = case.images(), some_places(model.encoder)
    views = view_of(model, images, places), view_of(model, images, places, ADVERSARIAL)
    clean, adversarial = (model(view) for view in views)
    torch.testing.assert_close(clean.latent, adversarial.latent, rtol=1e-5, atol=1e-5)
    names = dict(model.encoder.named_parameters())
    norms = [
        f"{path}.{name}"
        for path, layer in model.encoder.named_modules()
        if isinstance(layer, nn.LayerNorm)
        for name in ("weight", "bias")
    ]
    assert norms and all(n + "_adversarial" in names for n in norms)
    adversarial.prediction.square().mean().backward()
    for name, parameter in names.items():
        if is_adapter(name):
            assert parameter.grad is not None and parameter.grad.any(), name
            assert names[name.removesuffix("_adversarial")].grad is None
    with torch.no_grad():
        for name, parameter in names.items():
            if is_adapter(name):
                parameter.add_(0.1)
    again, moved = (
        model(view) for view in views
    )  # with gradients, as before: another attention might be faster without
    assert torch.equal(again.latent, clean.latent) and not torch.equal(moved.latent, adversarial.latent)
    kept = {n: t for n, t in model.encoder.state_dict().items() if not is_adapter(n)}
    exported = find_family(case.family).to_timm(model.encoder.state_dict(), case.architecture)
    assert len(exported.tensors) == len(kept)


def check_branches(case: Case) -> None:
    """Factors 0 switch a sample's branches off, 1 change nothing; gates stop gradients, not values."""
    encoder, images = case.encoder(), case.images()
    places = some_places(encoder)
    patches = patchify_gather(images, places, encoder.mask_unit)

    def latent(branches: Branches | None) -> Tensor:
        return encoder.encode(encoder.embed(patches, places), places, branches=branches)

    shape = (2, encoder.num_layers, encoder.num_branches)
    plain = latent(None)
    torch.testing.assert_close(latent(Branches(scales=torch.ones(shape))), plain)
    scales = torch.ones(shape)
    scales[1] = 0
    dropped = latent(Branches(scales=scales))
    torch.testing.assert_close(dropped[0], plain[0])
    assert not torch.allclose(dropped[1], plain[1])
    inside = [p for n, p in encoder.named_parameters() if ".mlp." in n]
    gated = latent(Branches(gates=torch.zeros(shape)))
    torch.testing.assert_close(gated, plain)
    assert not any(g.any() for g in torch.autograd.grad(gated.square().sum(), inside))
    one_off = torch.ones(shape)
    one_off[:, -1] = 0  # the last layer only
    grads = torch.autograd.grad(latent(Branches(gates=one_off)).square().sum(), inside)
    assert grads[0].any() and not grads[-1].any()


def check_bf16(case: Case) -> None:
    """Finite values and gradients, near those of fp32."""
    model, images = case.masked_model(), case.images()
    view = view_of(model, images, some_places(model.encoder))
    exact = model(view).prediction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(view).prediction
    rough.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def check_layers(case: Case) -> None:
    """Every parameter has its layer, every layer has parameters, and they come in the order of the computation."""
    encoder = case.encoder()
    assert len(encoder.layers()) == encoder.num_layers
    found = [encoder.layer_of(name) for name, _ in encoder.named_parameters()]
    assert set(found) == set(range(encoder.num_layers + 2))
    for index, layer in enumerate(encoder.layers()):
        ids = {id(p) for p in layer.parameters()}
        names = [n for n, p in encoder.named_parameters() if id(p) in ids]
        assert {encoder.layer_of(name) for name in names} == {index + 1}


def check_recognised(case: Case) -> None:
    """From the tensors alone, of encoder, masked model and classifier."""
    family = find_family(case.family)
    wanted = case.architecture
    for model in (case.encoder(), case.masked_model(), case.classifier()):
        found = recognise(file_state(model), case.image_size)
        assert found is not None
        if not family.image_size_in_tensors:
            found = replace(found, image_size=case.image_size)
        assert found == wanted


def check_compiles(case: Case) -> None:
    """A layer in one graph: whole images, visible patches, frozen. In Swin the second is the one with moved windows."""
    encoder = case.encoder()
    images, places = case.images(), some_places(encoder)
    patches = patchify_gather(images, places, encoder.mask_unit)

    def whole() -> Tensor:
        return encoder.encode(encoder.embed(patchify(images, encoder.mask_unit), None), None)

    def visible() -> Tensor:
        return encoder.encode(encoder.embed(patches, places), places)

    wanted = {run: run() for run in (whole, visible)}
    torch.compiler.reset()
    layer = encoder.layers()[1]
    layer.compile(fullgraph=True, backend="aot_eager")
    for run, frozen in ((whole, False), (visible, False), (visible, True)):
        layer.frozen = frozen  # type: ignore[assignment]
        torch.testing.assert_close(run(), wanted[run], rtol=1e-4, atol=1e-4)


CHECKS = [
    check_all_visible_equals_whole, check_nothing_leaks, check_order_of_places, check_gradients, check_adapters,
    check_branches, check_bf16, check_layers, check_recognised, check_compiles,
]  # fmt: skip
