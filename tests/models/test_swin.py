"""Swin: timm's values on whole images, on masked ones those of a dense network that looks at no masked key."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_checks import CHECKS, Case, check_equals_timm, some_places, timm_of
from file_state import file_state
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor

from mimir_fast.models.families import Architecture, build_encoder
from mimir_fast.models.families.swin import keep_apart, slots_of
from mimir_fast.models.loading import initialize
from mimir_fast.ops.patches import patchify_gather, unpatchify_visible

NANO = Case("swin", "nano", 32, 2)
TINY = Case("swin", "tiny", 224, 4)


@pytest.mark.parametrize("case", [NANO, TINY, Case("swin", "nano", 40, 2, channels=1)], ids=str)
def test_whole_images_equal_timm(case: Case) -> None:
    """A grid of 4, 7 and 5 units: even and odd windows."""
    check_equals_timm(case)


@pytest.mark.parametrize("check", CHECKS)
def test_every_family(check: Callable[[Case], None]) -> None:
    check(NANO)


def test_windows_and_their_shift_equal_timm() -> None:
    block = SwinTransformerBlock(8, (10, 10), 2, window_size=5, shift_size=2)
    assert torch.equal(keep_apart(10, 5, 2), block.attn_mask)
    tokens = torch.arange(100).view(1, 10, 10, 1)
    wanted = window_partition(tokens.roll((-2, -2), (1, 2)), (5, 5)).flatten()
    assert torch.equal(wanted[slots_of(10, 5, 2).flatten()], torch.arange(100))


def attend_to_visible(block: SwinTransformerBlock, x: Tensor, visible: Tensor) -> Tensor:
    """timm's `_attn` with −inf on masked keys; x (B, S, S, D), visible (B, S, S)."""
    (window, _), (shift, _) = block.window_size, block.shift_size
    B, S, _, D = x.shape
    windows = window_partition(x.roll((-shift, -shift), (1, 2)), (window, window)).view(-1, window**2, D)
    keys = window_partition(visible.roll((-shift, -shift), (1, 2)).unsqueeze(-1), (window, window))
    attn = block.attn
    q, k, v = attn.qkv(windows).view(len(windows), window**2, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q * attn.scale @ k.transpose(-2, -1) + attn._get_rel_pos_bias()
    if block.attn_mask is not None:
        scores = scores + block.attn_mask.repeat(B, 1, 1).unsqueeze(1)
    scores = scores.masked_fill(~keys.view(-1, 1, 1, window**2), -torch.inf)
    out = attn.proj((scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2))
    out = window_reverse(out.view(-1, window, window, D), (window, window), S, S)
    return out.roll((shift, shift), (1, 2))


@pytest.mark.parametrize("case", [NANO, TINY], ids=str)
def test_masked_images_equal_a_dense_network_without_masked_keys(case: Case) -> None:
    """One visible unit leaves windows that are all masked, beside four and a quarter of them."""
    for keep in (1, None):
        encoder, images = case.encoder(), case.images()
        places = some_places(encoder, keep=keep)
        patches = patchify_gather(images, places, encoder.mask_unit)
        dense = timm_of(encoder.state_dict(), case.architecture)
        assert isinstance(dense, SwinTransformer)
        mask = torch.zeros(2, encoder.num_patches, dtype=torch.bool).scatter(1, places, True)
        mask = mask.view(2, encoder.grid, encoder.grid)
        zeroed = unpatchify_visible(patches, places, encoder.mask_unit, case.image_size, case.image_size)
        with torch.no_grad():
            x = dense.patch_embed(zeroed)
            for stage in dense.layers:
                x = stage.downsample(x)
                scale = x.shape[1] // encoder.grid
                visible = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
                for block in stage.blocks:
                    x = x + attend_to_visible(block, block.norm1(x), visible)
                    x = x + block.mlp(block.norm2(x))
            wanted = dense.norm(x).flatten(1, 2)
            wanted = wanted.gather(1, places.unsqueeze(-1).expand(-1, -1, encoder.width))
            latent = encoder.encode(encoder.embed(patches, places), places)
        assert latent.shape == (2, places.shape[1], encoder.width)
        torch.testing.assert_close(latent, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_windows_without_a_visible_token_give_finite_gradients() -> None:
    encoder, images = NANO.encoder(), NANO.images().requires_grad_()
    places = torch.tensor([[0], [15]])
    for dtype in (torch.float32, torch.bfloat16):
        patches = patchify_gather(images, places, encoder.mask_unit)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            latent = encoder.encode(encoder.embed(patches, places), places)
        assert latent.isfinite().all()
        gradients = torch.autograd.grad(latent.float().square().sum(), [*encoder.parameters(), images])
        assert all(g.isfinite().all() for g in gradients)


def test_weights_of_another_image_size_are_resized(tmp_path: Path) -> None:
    """SimMIM pre-trains with windows of 6 and fine-tunes with windows of 7."""
    small, large = NANO.classifier(), Case("swin", "nano", 56, 2).classifier()
    theirs = timm_of(file_state(small), NANO.architecture)
    path = tmp_path / "swin.safetensors"
    save_file(theirs.state_dict(), path)
    report = initialize(large, path)
    assert len(report.resized) == 6 and not report.fresh and not report.skipped
    name = "stages.0.blocks.0.attn.relative_position_bias_table"
    before, after = file_state(small)[name], file_state(large)[name]
    assert after.shape == (13**2, 2)
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(file_state(large)["head.weight"], file_state(small)["head.weight"])


@pytest.mark.parametrize("size, millions", [("tiny", 27.5), ("base", 86.7), ("large", 195.0)])
def test_sizes_are_the_papers(size: str, millions: float) -> None:
    """Table 1 counts the head of 1000 classes too (28.3, 87.8, 196.5)."""
    with torch.device("meta"):
        encoder = build_encoder(Architecture("swin", size, 224, 4))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_images_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"image size 230 .* images of 224 or 256 pixels"):
        build_encoder(Architecture("swin", "base", 230, 4))
