"""Patches must tile the image."""


def check_patch_size(image_size: int, patch_size: int) -> int:
    """The patch size; raises ValueError, naming those that would do, when the patches do not tile the image."""
    if patch_size < 1 or image_size % patch_size:
        fits = [p for p in (2, 4, 7, 8, 14, 16, 28, 32) if image_size % p == 0]
        raise ValueError(
            f"image size {image_size} is not divisible by patch size {patch_size}; "
            f"patch sizes that fit: {', '.join(map(str, fits)) or 'none of the usual ones, resize the images'}"
        )
    return patch_size
