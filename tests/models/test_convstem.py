"""ConvStem: ViT behind Singh et al.'s stem, with masked pixels zero in front of it."""

from collections.abc import Callable

import pytest
import torch
from family_checks import CHECKS, Case, check_equals_timm, expand, some_places, timm_of
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimir_fast.models.classifier import load_classifier
from mimir_fast.models.families import Architecture, build_encoder
from mimir_fast.models.families.convstem import stem_widths
from mimir_fast.ops.patches import patchify_gather

NANO = Case("convstem", "nano", 32, 4)
SMALL = Case("convstem", "small", 224, 16)


@pytest.mark.parametrize("case", [NANO, SMALL, Case("convstem", "nano", 64, 16, channels=1)], ids=str)
def test_whole_images_equal_timm(case: Case) -> None:
    check_equals_timm(case)


@pytest.mark.parametrize("check", CHECKS)
def test_every_family(check: Callable[[Case], None]) -> None:
    check(NANO)


def test_masked_images_equal_timm_on_images_with_zeros() -> None:
    """The stem over the whole image with zeros under the mask, then timm's blocks on the visible tokens."""
    encoder, images = NANO.encoder(), NANO.images()
    places = some_places(encoder)
    theirs = timm_of(encoder.state_dict(), NANO.architecture)
    assert isinstance(theirs, VisionTransformer)
    hidden = torch.ones(2, 64).scatter(1, places, 0).view(2, 1, 8, 8)
    zeroed = images * (1 - hidden).repeat_interleave(4, -1).repeat_interleave(4, -2)
    with torch.no_grad():
        tokens = theirs.patch_embed(zeroed) + theirs.pos_embed[:, 1:]
        cls = (theirs.cls_token + theirs.pos_embed[:, :1]).expand(2, -1, -1)
        x = torch.cat([cls, tokens.gather(1, expand(places, tokens))], dim=1)
        wanted = theirs.norm(theirs.blocks(x))
        latent = encoder.encode(encoder.embed(patchify_gather(images, places, 4), places), places)
    torch.testing.assert_close(latent, wanted, rtol=1e-4, atol=1e-5)


def test_the_stem_sees_beyond_a_patch_but_not_under_the_mask() -> None:
    """A visible neighbour changes a token of the stem, as a convolution must; only visible ones do."""
    encoder, images = NANO.encoder(), NANO.images(1).requires_grad_()
    places = torch.tensor([[9, 10, 40]])
    tokens = encoder.embed(patchify_gather(images, places, 4), places)
    (gradient,) = torch.autograd.grad(tokens[0, 1].square().sum(), images)
    assert gradient[..., 4:8, 4:8].any() and gradient[..., 4:8, 8:12].any()  # patches 9 and 10
    assert not gradient[..., 8:, :].any() and not gradient[..., :4, :].any()


def test_bf16_keeps_the_first_convolution_in_fp32() -> None:
    """bf16 has a spacing of 1/256 at the top of [0, 1]: a change of half of that must not vanish."""
    encoder = NANO.encoder()
    patches = torch.full((1, 64, 48), 0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        first = encoder.patch_embed.proj["stem"][0]
        seen: list[Tensor] = []
        hook = first.register_forward_hook(lambda _, inputs, output: seen.append(output))
        encoder.embed(patches, None)
        encoder.embed(patches + 0.5 / 256, None)
        hook.remove()
    assert seen[0].dtype == torch.float32 and not torch.equal(seen[0], seen[1])


class PublishedStem(nn.Module):
    """The stem of the published robust models, by the description in arXiv 2303.01870: `patch_embed.proj.stem.N`."""

    def __init__(self, widths: list[int], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after), nn.GELU()]
        self.stem = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


@pytest.mark.parametrize("size, dim, heads", [("small", 384, 6), ("base", 768, 12)])
def test_a_published_checkpoint_loads(size: str, dim: int, heads: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """As they are written: a timm model with a cls token, its projection replaced, behind a normalisation and DDP."""
    torch.manual_seed(0)
    theirs = VisionTransformer(embed_dim=dim, depth=12, num_heads=heads, num_classes=5).eval()
    theirs.patch_embed.proj = PublishedStem([48, 96, 192, 384], dim)
    state = {f"module.model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state |= {"module.normalize.mean": torch.zeros(3), "module.normalize.std": torch.ones(3)}
    torch.save(state, tmp_path / "robust.pth")
    ours = load_classifier(tmp_path / "robust.pth")
    assert (ours.config.family, ours.config.encoder, ours.config.global_pool) == ("convstem", size, "cls")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_stem_widths() -> None:
    assert stem_widths(384, 16) == stem_widths(768, 16) == [48, 96, 192, 384]
    assert stem_widths(96, 4) == [48, 96] and stem_widths(384, 2) == [384]


@pytest.mark.parametrize("patch_size, words", [(7, "2, 4, 8 or 16 pixels"), (1, "2, 4, 8"), (5, "not divisible")])
def test_patches_that_do_not_fit(patch_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_encoder(Architecture("convstem", "small", 224, patch_size))
