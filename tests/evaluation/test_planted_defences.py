"""Planted defences, and what the report must say of each: refused, noted, masked, or nothing, as it is honest.

And for every one that is judged: its robust accuracy lies no more than its interval above that of a direct attack by
others' code on the same images, or the report says that it cannot be trusted.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import planted_defences as planted
import pytest
import torch
import torch.nn.functional as F
from planted_defences import after, before, gradient
from small_classifier import DIGITS, EPS
from torch import nn

from mimir_fast.attacks.pgd import is_correct, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import load_images
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.evaluation.wrappers import AsLogits

EXIST, NOISE, BLACK = "gradients exist", "gradient beats noise", "black-box never beats white-box"


class Defence(NamedTuple):
    """One row: what stands around the net, and what must be said of it.

    Attributes:
        refused: the words of the refusal.
        noted: words of a note at the top.
        failed: checks that must fail; none and no `noted`: none may.
        low: the robust accuracy is not told from chance.
    """

    name: str
    build: Callable[[nn.Module], nn.Module]
    refused: str = ""
    noted: str = ""
    failed: tuple[str, ...] = ()
    low: bool = False


NO_GRADIENT, RANDOM = "no gradient with respect to its images", "not deterministic"
DEFENCES = [
    Defence("nothing", lambda net: net),
    Defence("log-softmax", after(lambda z: z.log_softmax(1))),
    Defence("shifted logits", after(lambda z: z + 50)),
    Defence("blurred input", before(lambda x: F.avg_pool2d(x, 3, 1, 1))),
    Defence("rounded input, straight-through gradient", before(planted.straight_through)),
    Defence("gradient 1e-20 times as large", gradient(lambda g: 1e-20 * g)),
    Defence("logits a hundredth as large", after(lambda z: 0.01 * z), failed=(BLACK,)),  # CE then aims at all classes
    Defence("rounded input", before(lambda x: (4 * x).round() / 4), failed=(EXIST, BLACK, NOISE)),
    Defence("JPEG", before(planted.blocks), failed=(EXIST,)),
    Defence("rounded logits", after(torch.round), noted="gradient.*is zero on a first look", failed=(EXIST,)),
    Defence("clipped logits", after(lambda z: z.clamp(-0.5, 0.5)), failed=(EXIST,)),
    Defence("flat logits", after(lambda z: (1000 * z).tanh()), failed=(EXIST,)),
    Defence("steep logits", after(lambda z: 1000 * z), failed=(EXIST,)),
    Defence("gradient flipped", gradient(lambda g: -g), failed=(NOISE,)),
    Defence("gradient zero", gradient(lambda g: 0 * g), noted="is zero on a first look", failed=(EXIST, BLACK)),
    Defence("gradient NaN", gradient(lambda g: g * torch.nan), failed=(EXIST,)),
    Defence("gradient infinite", gradient(lambda g: g * torch.inf), failed=(EXIST,)),
    Defence("gradient random", gradient(torch.randn_like), failed=(NOISE,)),
    Defence("gradient of another pixel", gradient(lambda g: g.roll((3, 5), (2, 3))), failed=(BLACK,)),
    Defence("square root of black", before(lambda x: x.sqrt().square()), failed=(EXIST,)),
    Defence("rippled input", before(lambda x: x + 0.02 * (3000 * x).sin()), failed=(NOISE,)),
    Defence("noise", before(lambda x: x + 0.05 * torch.randn_like(x)), noted=RANDOM),
    Defence("dropout", after(lambda z: F.dropout(z, 0.1)), noted=RANDOM),
    Defence("random shift", before(planted.shifted), noted=RANDOM),
    Defence("one net of two", planted.of_two, noted=RANDOM),
    Defence("random rounding", before(lambda x: (8 * x + torch.rand_like(x)).floor() / 8), noted=RANDOM),
    Defence("tuple", after(lambda z: (z, z)), noted="Judged by the first tensor of the tuple"),
    Defence("half precision", after(lambda z: z.half()), noted="answers in float16"),
    Defence("constant", after(planted.constant), noted="guessing gives 10.0 %", low=True),
    Defence("probabilities", after(lambda z: z.softmax(1)), refused="--outputs probabilities"),
    Defence("binary input", before(lambda x: (x > 0.5).float()), refused=NO_GRADIENT),
    Defence("thermometer", before(lambda x: sum((x > t).float() for t in (0.2, 0.5, 0.8)) / 3), refused=NO_GRADIENT),
    Defence("integers", before(lambda x: (x * 255).int().float() / 255), refused=NO_GRADIENT),
    Defence("nearest stored image", planted.nearest_of, refused=NO_GRADIENT),
    Defence("decision only", after(lambda z: 10 * F.one_hot(z.argmax(1), 10).float()), refused=NO_GRADIENT),
    Defence("detached", planted.without_gradient, refused=NO_GRADIENT),
    Defence("class numbers", after(lambda z: z.argmax(1)), refused="int64"),
]
SHORT = {"nothing", "rounded input", "decision only"}


def judge(model: nn.Module, folder: Path, limit: int = 40) -> Results:
    """The report of suite `quick`."""
    planted.CHOSEN[:] = [model]
    config = EvaluateConfig(
        "planted_defences:judged", data=DIGITS, eps=EPS, limit=limit, batch_size=64, output_dir=str(folder)
    )
    return evaluate(config, log=lambda line: None)


def directly(model: nn.Module, net: nn.Module, indices: list[int]) -> float:
    """Accuracy of a model on images that PGD made on the bare net, and APGD of AutoAttack's package on the model."""
    package = pytest.importorskip("pyautoattack.autopgd_base")
    images = load_images(DIGITS, np.array(indices))
    x, y = images.images.float() / 255, images.labels
    with torch.random.fork_rng([]):
        attack = package.APGDAttack(model, norm="Linf", eps=EPS, n_iter=50, n_restarts=1, seed=0, device="cpu")
        tried = [x, pgd(net, x, y, LinfThreat(EPS, EPS / 8, 50)), attack.perturb(x.clone(), y.clone())]
    with torch.no_grad():
        return float(torch.stack([is_correct(model(x), y) for x in tried]).all(0).float().mean())


@pytest.mark.parametrize(
    "defence", [pytest.param(d, id=d.name, marks=() if d.name in SHORT else pytest.mark.slow) for d in DEFENCES]
)
def test_what_the_report_says_of_a_planted_defence(defence: Defence, small_model: nn.Module, tmp_path: Path) -> None:
    net = copy.deepcopy(small_model)
    model = defence.build(net).eval()
    if defence.refused:
        with pytest.raises(ValueError, match=defence.refused):
            judge(model, tmp_path / "out")
        return
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        results = judge(model, tmp_path / "out")
    validity, failed = results.verdicts["validity"], failed_checks(results)
    assert not defence.noted or any(re.search(defence.noted, note) for note in results.notes)
    assert set(defence.failed) <= failed and (not defence.failed or validity["kind"] == "bad")
    assert defence.failed or defence.noted or defence.low or not failed, "an honest model"
    assert not defence.low or results.verdicts["robustness"]["kind"] != "good"
    distrusted = validity["kind"] == "bad" or any(RANDOM in note for note in results.notes)
    if not distrusted:
        assert results.robust["interval"][0] <= directly(AsLogits(model), net, results.images["indices"])


def failed_checks(results: Results) -> set[str]:
    """Names of the gradient-masking checks that failed."""
    return {check["name"] for check in results.sections["masking"]["checks"] if not check["passed"]}
