"""Published rows that have no recipe, so that nobody takes the list of recipes for the whole of the papers' tables."""

# Row → natural / robust in per cent and what is missing (MIMIR, arXiv 2312.04960).
NOT_BUILT: dict[str, tuple[str, str]] = {
    "CIFAR-10 ConViT-S": ("87.49 / 52.54 AA", "ConViT is not built yet"),
    "CIFAR-10 ConViT-B": ("89.30 / 55.64 AA", "ConViT is not built yet"),
    "ImageNet ViT-B + ConvStem": ("76.72 / 54.04 AA", "ConvStem is not built yet"),
    "ImageNet Swin-B": ("76.62 / 55.90 AA", "Swin is not built yet"),
    "ImageNet Swin-L": ("78.62 / 59.68 AA", "Swin is not built yet"),
    "XCiT, CaiT": ("", "not built yet"),
    "ImageNet ViT-S, supervised pre-training": ("67.04 / 33.70 PGD", "imagenet/fast_vit_small with --init timm:NAME"),
}

# Attacks of an evaluation rather than recipes: `python -m mimir_fast.evaluate --suite paper`.
ADAPTIVE: dict[str, str] = {
    "CIFAR-10 ViT-S, PGD-20 / PGD-MI-100 / PGD-fea-100": "56.63 / 56.31 / 78.41",
    "ImageNet ViT-S, PGD-20 / PGD-MI-100 / PGD-fea-100": "54.56 / 54.55 / 72.27",
}
