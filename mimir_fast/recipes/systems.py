"""What is implemented: the systems of the papers, where each is run, tested, and how large it was really run here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row of docs/systems.md.

    Attributes:
        recipe: of pretrain or finetune.
        test: file under the repository's root.
        largest: what was trained by this project, to the end and on two CPU cores.
    """

    name: str
    source: str
    recipe: str
    test: str
    largest: str


_MASKED = "tests/methods/test_pretraining_methods.py"
_VARIANTS = "tests/methods/test_masked_variants.py"
_FINETUNE = "tests/methods/test_classification_methods.py"
_FAMILIES = "tests/families/test_every_family.py"
_DIGITS = "ViT-nano/8 on digits"
_FASHION = "ViT-nano/8 on 16,384 images of Fashion-MNIST (docs/results)"
_TESTS = "the size of its tests"
_MIMIR = "Xu et al., arXiv 2312.04960"


def _nano(family: str) -> str:
    return f"{family}-nano on digits, pre-trained and fine-tuned"


# Pre-training methods, fine-tuning methods, what changes them, encoder families.
SYSTEMS = (
    System("MAE", "He et al., arXiv 2111.06377", "imagenet/mae_vit_base_800ep", _MASKED,
           _FASHION),
    System("MAE on noise, a control", "ours", "cifar10/noise_mae_vit_tiny", _VARIANTS, _DIGITS),
    System("adv-MAE", _MIMIR, "cifar10/adv_mae_vit_tiny_official", _MASKED, _FASHION),
    System("MIMIR, as the paper says", _MIMIR, "cifar10/mimir_vit_small", _MASKED,
           f"{_FASHION}; ViT-tiny/4 on digits"),
    System("MIMIR, as the authors' code does", _MIMIR, "cifar10/mimir_vit_small_official",
           "tests/methods/test_official_parity.py", _FASHION),
    System("MIMIR with Rényi's entropy", _MIMIR, "cifar10/mimir_vit_tiny_official_renyi_1e-5",
           "tests/ops/test_renyi_mi.py", _FASHION),
    System("SimMIM", "Xie et al., arXiv 2111.09886", "imagenet/simmim_vit_base", _VARIANTS, _DIGITS),
    System("AEMIM on MAE", "arXiv 2407.11537", "imagenet/aemim_vit_base_800ep", "tests/methods/test_aemim.py", _DIGITS),
    System("AEMIM on SimMIM", "arXiv 2407.11537", "imagenet/aemim_vit_base_simmim", "tests/methods/test_aemim.py",
           _TESTS),
    System("single stage, an experiment", f"open question of {_MIMIR}", "digits/single_stage_vit_nano", _VARIANTS,
           _DIGITS),
    System("natural fine-tuning", "He et al., arXiv 2111.06377", "imagenet/natural_vit_base_mae", _FINETUNE, _DIGITS),
    System("PGD adversarial training", "Madry et al., arXiv 1706.06083", "cifar10/pgd_vit_base", _FINETUNE, _FASHION),
    System("adversarial training from scratch", _MIMIR, "imagenet/fast_vit_small_scratch", _FINETUNE, _FASHION),
    System("clean pre-training, then adversarial", _MIMIR, "imagenet/fast_vit_small_clean_init",
           "tests/models/test_loading.py", _TESTS),
    System("FastAT", "Wong et al., arXiv 2001.03994", "imagenet/fast_vit_base", _FINETUNE, _TESTS),
    System("free adversarial training", "Shafahi et al., arXiv 1904.12843", "digits/free_vit_nano",
           "tests/methods/test_cheaper_finetuning.py", "ViT/8 of 2 layers 64 wide on digits (docs/results)"),
    System("APGD-k training", "Singh et al., arXiv 2303.01870", "imagenet/apgd_vit_base", _FINETUNE, _TESTS),
    System("TRADES", "Zhang et al., arXiv 1901.08573", "cifar10/trades_vit_base", _FINETUNE, _TESTS),
    System("MART", "Wang et al., ICLR 2020", "cifar10/mart_vit_base", _FINETUNE, _TESTS),
    System("ARD + PRM", "Mo et al., arXiv 2210.07540", "cifar10/ard_prm_vit_base", _FINETUNE, _TESTS),
    System("AGAT", "Wu et al., arXiv 2207.10498", "imagenet/fast_vit_small_agat", "tests/models/test_classifier.py",
           _TESTS),
    System("RandAugment, MixUp, CutMix with warm-up", "Bai et al., NeurIPS 2021",
           "cifar10/pgd_vit_base_p4_800ep_mix_randaugment", "tests/methods/test_augmentation.py", _TESTS),
    System("generated images (EDM)", "Wang et al. 2023", "cifar10/pgd_vit_base_edm5m", "tests/data/test_generated.py",
           _TESTS),
    System("ViT / DeiT", "arXiv 2010.11929, 2012.12877", "imagenet/mimir_vit_base_official", _FAMILIES,
           f"{_FASHION}; ViT-tiny/4 on digits"),
    System("ConViT", "arXiv 2103.10697", "cifar10/mimir_convit_base_official",
           "tests/models/test_convit.py", _nano("ConViT")),
    System("CaiT", "arXiv 2103.17239", "imagenet/mimir_cait_s36_official", "tests/models/test_cait.py", _nano("CaiT")),
    System("XCiT", "arXiv 2106.09681", "imagenet/mimir_xcit_medium12_official",
           "tests/models/test_xcit.py", _nano("XCiT")),
    System("ViT + ConvStem", "Xiao et al., Singh et al., arXiv 2303.01870", "imagenet/mimir_convstem_base_official",
           "tests/models/test_convstem.py", _nano("ConvStem")),
    System("Swin", "arXiv 2103.14030", "imagenet/mimir_swin_large_official",
           "tests/models/test_swin.py", _nano("Swin")),
    System("ConvNeXt, masked as SparK", "arXiv 2201.03545, 2301.03580", "imagenet/mimir_convnext_base",
           "tests/models/test_convnext.py", _nano("ConvNeXt")),
)  # fmt: skip
