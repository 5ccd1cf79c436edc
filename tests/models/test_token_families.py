"""What ConViT, CaiT and XCiT have in common: no leak, gradients everywhere, adapters, SimMIM, branches, compilation."""

import re
from collections.abc import Iterator

import pytest
import torch
from file_state import file_state
from small_families import BATCH, IMAGE, KEPT, PATCH, draw, make, view

from mimir_fast.layers.norms import ADVERSARIAL, CLEAN, is_adapter
from mimir_fast.models.branches import Branches, draw_drop_path
from mimir_fast.models.families import all_families, recognise
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.models.masked_model import ModelConfig, View, build_masked_model
from mimir_fast.ops.patches import gather_patches, patchify, patchify_gather, unpatchify

# Shifts of all scores of a softmax: their gradients are zero but for rounding.
NO_EFFECT = re.compile(r"pos_proj\.bias|proj_l\.bias|attn\.k\.bias")
# XCiT's decoder predicts patches, and of its class attention only the norms and gamma1 touch these.
CLS_ONLY = re.compile(r"decoder_cls_attn_blocks\.\d+\.(attn|mlp|gamma2)")


@pytest.fixture(params=["convit", "cait", "xcit"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["true", "official"])
def positions(request: pytest.FixtureRequest, family: str) -> Iterator[str]:
    if family == "cait" and request.param == "official":
        pytest.skip("CaiT has no positions but the embedding")
    yield request.param


def test_masked_pixels_do_not_reach_the_latent(family: str, positions: str) -> None:
    model = make(family, positions=positions)
    images, keep, masked = draw()
    patches = patchify(images, PATCH)
    noise = torch.rand(BATCH, masked.shape[1], patches.shape[2])
    other = unpatchify(patches.scatter(1, masked.unsqueeze(-1).expand_as(noise), noise), PATCH)
    assert not torch.equal(images, other)
    for mode in (model.train(), model.eval()):
        first, second = (mode(View(patchify_gather(x, keep, PATCH), keep, masked)) for x in (images, other))
        assert torch.equal(first.latent, second.latent)
        assert torch.equal(first.prediction, second.prediction)


def test_gradients_reach_every_parameter(family: str, positions: str) -> None:
    model = make(family, positions=positions)
    shown = view()
    shown = shown._replace(patches=shown.patches.requires_grad_())
    latent, prediction, *_ = model(shown)
    (prediction.square().mean() + latent.sin().mean()).backward()
    trained = {name: p.grad for name, p in parameters_by_file_name(model) if p.requires_grad}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in trained.values())
    silent = {name for name, grad in trained.items() if grad is not None and not grad.any()}
    assert not {name for name in silent if not NO_EFFECT.search(name) and not CLS_ONLY.match(name)}
    assert shown.patches.grad is not None and bool(shown.patches.grad.ne(0).any(dim=-1).all())


def test_order_of_the_kept_patches_is_the_order_of_the_latent(family: str) -> None:
    model = make(family).double().eval()
    images, keep, _ = draw()
    order = torch.randperm(KEPT, generator=torch.Generator().manual_seed(2))
    first, second = (
        model(View(patchify_gather(images.double(), ids, PATCH), ids), decode=False) for ids in (keep, keep[:, order])
    )
    torch.testing.assert_close(second[:, 1:], first[:, 1:][:, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second[:, 0], first[:, 0], rtol=1e-9, atol=1e-9)


def test_all_patches_with_places_are_the_whole_image(family: str) -> None:
    model = make(family).double().eval()
    patches = patchify(draw()[0].double(), PATCH)
    places = torch.arange(patches.shape[1]).expand(BATCH, -1)
    encoder = model.encoder
    with_places = encoder.encode(encoder.embed(patches, places), places)
    whole = encoder.encode(encoder.embed(patches, None), None)
    torch.testing.assert_close(with_places, whole, rtol=1e-9, atol=1e-9)


def test_wanted_predictions_are_rows_of_all_predictions(family: str) -> None:
    model = make(family).double().eval()
    shown = view()
    shown = shown._replace(patches=shown.patches.double())
    everywhere = model(shown._replace(masked=None)).prediction
    assert everywhere.shape == (BATCH, model.num_patches, PATCH**2 * 3)
    wanted = gather_patches(everywhere, shown.masked)
    torch.testing.assert_close(model(shown).prediction, wanted, rtol=1e-9, atol=1e-9)


def test_adapters_start_equal_and_take_their_own_gradients(family: str) -> None:
    model = make(family, adapters=True).eval()
    with torch.no_grad():  # `moved` moved both copies apart
        state = dict(model.encoder.named_parameters()) | dict(model.encoder.named_buffers())
        for name, tensor in state.items():
            if is_adapter(name):
                tensor.copy_(state[name.removesuffix("_adversarial")])
    clean, adversarial = (model(view(domain)) for domain in (CLEAN, ADVERSARIAL))
    assert torch.equal(clean.latent, adversarial.latent)
    (adversarial.prediction.square().mean() + adversarial.latent.sin().mean()).backward()
    twice = {name.removesuffix("_adversarial") for name in state if is_adapter(name)}
    assert {"cls_token", "norm.weight", "blocks.0.norm1.bias"} <= twice
    assert ("patch_embed.proj.0.1.weight" in twice) == (family == "xcit")
    for name, parameter in model.encoder.named_parameters():
        if name in twice:
            assert parameter.grad is None or not parameter.grad.any(), name
        elif not NO_EFFECT.search(name):
            assert parameter.grad is not None and parameter.grad.any(), name


def test_batch_statistics_of_the_domains_are_apart() -> None:
    model = make("xcit", adapters=True).train()
    before = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    model(view(ADVERSARIAL))
    changed = {name for name, buffer in model.encoder.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed and all(is_adapter(name) for name in changed)
    assert {name for name in before if is_adapter(name) and "running" in name} <= changed


def test_simmim_runs_at_full_length(family: str) -> None:
    model = make(family, decoder="linear")
    out = model(view())
    assert out.latent.shape == (BATCH, 1 + model.num_patches, 96)
    assert out.prediction.shape == (BATCH, model.num_patches - KEPT, PATCH**2 * 3)
    out.prediction.square().mean().backward()
    assert model.mask_token.grad is not None and bool(model.mask_token.grad.any())


def test_stochastic_depth_drops_branches(family: str) -> None:
    encoder = make(family).encoder.eval()
    shown = view()
    tokens = encoder.embed(shown.patches, shown.keep)
    shape = (BATCH, encoder.num_layers, encoder.num_branches)
    plain = encoder.encode(tokens, shown.keep)
    kept = encoder.encode(tokens, shown.keep, branches=Branches(scales=torch.ones(shape)))
    torch.testing.assert_close(plain, kept)
    scales = draw_drop_path(0.5, encoder.num_layers, encoder.num_branches, torch.arange(BATCH), seed=3, step=1)
    assert scales is not None and scales.shape == shape
    scales[0] = 1
    dropped = encoder.encode(tokens, shown.keep, branches=Branches(scales=scales))
    torch.testing.assert_close(dropped[0], plain[0])
    assert not torch.allclose(dropped[1:], plain[1:])
    for branch in range(encoder.num_branches):  # each has its own factor
        scales = torch.ones(shape)
        scales[:, 1, branch] = 0
        assert not torch.allclose(encoder.encode(tokens, shown.keep, branches=Branches(scales=scales)), plain)


def test_gates_stop_gradients_and_leave_values(family: str) -> None:
    encoder = make(family).encoder.eval()
    shown = view()
    gates = torch.ones(BATCH, encoder.num_layers, encoder.num_branches)
    gates[:, 1] = 0
    tokens = encoder.embed(shown.patches, shown.keep)
    gated = encoder.encode(tokens, shown.keep, branches=Branches(gates=gates))
    torch.testing.assert_close(gated, encoder.encode(tokens, shown.keep))
    gated.sin().sum().backward()
    for name, parameter in encoder.blocks.named_parameters():  # type: ignore[union-attr]
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached != name.startswith("1.") or NO_EFFECT.search(name), name


def test_layers_compile_whole(family: str) -> None:
    """One layer of each class."""
    model = make(family).eval()
    expected = model(view())
    for layer in {type(layer): layer for layer in model.layers()}.values():
        layer.compile(fullgraph=True, backend="aot_eager")
    got = model(view())
    torch.testing.assert_close(got.latent, expected.latent)
    torch.testing.assert_close(got.prediction, expected.prediction)
    got.prediction.square().mean().backward()


def test_half_precision_stays_near(family: str) -> None:
    model = make(family).eval()
    expected = model(view())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(view())
    for name in ("latent", "prediction"):
        exact, half = getattr(expected, name), getattr(got, name).float()
        assert (half - exact).norm() / exact.norm() < 0.03


def test_layers_are_numbered_from_the_embedding_up(family: str) -> None:
    model = make(family)
    layers = {name: model.encoder.layer_of(name) for name, _ in model.encoder.named_parameters()}
    assert set(layers.values()) == set(range(model.num_layers + 2))
    assert layers["cls_token"] == 0 and layers["norm.weight"] == model.num_layers + 1
    last = {"cait": "blocks_token_only.1.attn.q.weight", "xcit": "cls_attn_blocks.1.attn.q.weight"}
    assert layers[last.get(family, "blocks.3.attn.proj.weight")] == model.num_layers


def test_recognised_by_its_own_family_only(family: str) -> None:
    state = file_state(make(family))
    found = recognise(state)
    assert found is not None
    assert (found.family, found.size, found.image_size, found.patch_size, found.channels) == (
        family, "nano", IMAGE, PATCH, 3,
    )  # fmt: skip
    for other in all_families().values():
        if other.name != family and other.anchor in state:
            assert other.recognise(state) is None, other.name


def test_attention_without_qkv_bias_is_recognised(family: str) -> None:
    state = {n: t for n, t in file_state(make(family)).items() if not re.search(r"attn\.(qkv|qk|q|k|v)\.bias", n)}
    found = recognise(state)
    assert found is not None and found.options["qkv_bias"] is False


def test_patches_that_do_not_fit_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"patch sizes that fit: 2, 4, 8, 16"):
        build_masked_model(ModelConfig(family=family, encoder="nano", patch_size=5), IMAGE)


def test_unknown_size_suggests_one(family: str) -> None:
    with pytest.raises(ValueError, match="did you mean nano"):
        ModelConfig(family=family, encoder="nanno")
