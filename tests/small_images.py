"""Images in every layout, and patches to take out of them."""

import torch
from torch import Tensor

# B, C, H, W, patch size, patches taken: the real one, then the awkward
CASES = [
    (2, 3, 224, 224, 16, 49),
    (3, 3, 32, 32, 2, 64),
    (1, 1, 5, 5, 5, 1),
    (2, 4, 6, 10, 2, 7),
    (2, 3, 8, 12, 4, 0),
    (0, 3, 8, 8, 4, 2),
]
LAYOUTS = ["contiguous", "channels_last", "cropped", "one_gray_channel"]


def images_of(case: tuple[int, ...], dtype: torch.dtype = torch.uint8, layout: str = "contiguous") -> Tensor:
    B, C, H, W = case[:4]
    pixels = torch.randint(0, 256, (B, C, H + 2, W + 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(H))
    images = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    if layout == "cropped":
        return images[..., 1:-1, 2:-1]
    images = images[..., 2:, 3:].contiguous()
    if layout == "one_gray_channel":
        return images[:, :1].expand(-1, C, -1, -1)
    return images.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else images


def ids_of(case: tuple[int, ...]) -> Tensor:
    B, _, H, W, p, K = case
    return torch.rand(B, H // p * (W // p), generator=torch.Generator().manual_seed(W)).argsort(1)[:, :K]
