"""MIMIR, text c, the latest, of which only numbers and a summary were at hand; and the README of the authors' code."""

from mimir_fast.recipes.published import Row, accuracies

_HAND = "the table itself was not at hand: conditions as in texts a and b"

ROWS = (
    *(
        Row(
            "MIMIR-c", f"CIFAR-10 {model}, MIMIR → PGD with 5 million EDM images", accuracies(natural, aa=aa),
            "eps 8/255", f"cifar10/mimir_{name}_official", f"cifar10/pgd_{name}_edm5m", remark=_HAND,
        )
        for model, name, natural, aa in (("ViT-S", "vit_small", 91.94, 61.06), ("ViT-B", "vit_base", 92.82, 63.43))
    ),
    *(
        Row(
            "MIMIR-c", f"ImageNet {model}, MIMIR → APGD-2 for 300 epochs", accuracies(natural, aa=aa),
            "eps 4/255, AutoAttack standard on RobustBench's 5000 images",
            f"imagenet/mimir_{name}_official", f"imagenet/apgd_{name}",
            remark=f"{_HAND}; the authors group visible windows, ours masks units of 32 pixels",
            unresolved="the authors' code fine-tunes Swin by ARES: 3 steps of PGD (README), 200 epochs, strong "
            "augmentation and a moving average (pgd_AT_ares); the recipe has APGD-2, 300 epochs",
        )
        for model, name, natural, aa in (("Swin-B", "swin_base", 76.62, 55.90), ("Swin-L", "swin_large", 78.62, 59.68))
    ),
    Row(
        "MIMIR-c Table I (summary)", "Generalist, a baseline", (("robust", 14.44),),
        why_not="only this number of the row was at hand; Generalist is no system of ours",
    ),
    Row(
        "MIMIR-c Table IV (summary)", "ViT-S, hours of training: end-to-end AT, MIMIR and fine-tuning",
        (("h end-to-end", 187), ("h MIMIR", 123)),
        why_not="a time of GPUs that were not at hand; python -m benchmarks times ours",
    ),
    *(
        Row(
            "MIMIR, README of the authors' code", f"ImageNet {model}, MIMIR → FastAT", accuracies(natural, pgd20=pgd),
            f"eps {eps}/255", f"imagenet/mimir_{name}_official", f"imagenet/fast_{name}{'_eps2' if eps == 2 else ''}",
            remark="fine-tuning not said there: 1-step PGD, as the other rows beside it",
        )
        for model, name, eps, natural, pgd in (
            ("CaiT-XXS24", "cait_xxs24", 2, 73.39, 53.39), ("CaiT-S36", "cait_s36", 2, 76.05, 56.78),
            ("CaiT-XXS24", "cait_xxs24", 4, 69.90, 40.53), ("CaiT-S36", "cait_s36", 4, 73.57, 40.03),
        )
    ),
)  # fmt: skip
