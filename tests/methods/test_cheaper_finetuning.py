"""Cheaper adversaries of fine-tuning: attacks that see a part of the patches, or come in some steps, and replays."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import Command
from torch import Tensor, nn

from mimir_fast.attacks.pgd import pgd, random_start
from mimir_fast.attacks.training_attack import ClassifierAttack
from mimir_fast.checkpoints.reading import checkpoints_of, read_meta, read_tensors
from mimir_fast.data.batch import Batch
from mimir_fast.finetune import config_from
from mimir_fast.methods.apgd import Apgd
from mimir_fast.methods.ard_prm import ArdPrm, ArdPrmObjective
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.fast import Fast
from mimir_fast.methods.free import Free, FreeConfig, FreeObjective
from mimir_fast.methods.mart import Mart, MartObjective
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.trades import Trades, TradesObjective, gaussian_start
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier
from mimir_fast.ops.linf_step import linf_step
from mimir_fast.ops.patches import patchify, unpatchify
from mimir_fast.ops.random_masks import random_masks
from mimir_fast.philox import Stream
from mimir_fast.training.finetuning import finetune

EPS = 8 / 255
ATTACK = ClassifierAttack(eps=EPS, alpha=3 / 255, num_steps=3)


def small(family: str = "vit") -> Classifier:
    torch.manual_seed(0)
    patch_size = 2 if family in ("swin", "convnext") else 8
    config = ClassifierConfig(family=family, encoder="nano", patch_size=patch_size, drop_path=0.0)
    model = build_classifier(config, 32, 10)
    nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.fixture
def model() -> Classifier:
    return small()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)
    samples = torch.arange(100, 106)
    return Batch(images, torch.randint(0, 10, (6,), generator=generator), samples, torch.zeros_like(samples))


class TestVisible:
    def test_all_patches_are_plain_pgd(self, model: Classifier, batch: Batch) -> None:
        inputs = Pgd(ClassificationConfig()).prepare(model, batch, seed=3, step=4)
        wanted = pgd(model, inputs.images, inputs.targets, ATTACK, samples=batch.samples, seed=3, step=4)
        for same in (ATTACK, replace(ATTACK, visible=0.5, whole_steps=3)):
            assert torch.equal(Pgd(ClassificationConfig(attack=same)).perturb(model, inputs), wanted)

    def test_early_steps_see_and_move_their_patches_only(self, model: Classifier, batch: Batch) -> None:
        """Two steps on a half each and one on all, written out."""
        method = Pgd(ClassificationConfig(attack=replace(ATTACK, visible=0.5)))
        inputs = method.prepare(model, batch, seed=3, step=4)
        order, _ = random_masks(batch.samples, 16, 16, seed=3, step=4, stream=Stream.ATTACK_MASK, order="shuffled")
        x = start = random_start(inputs.images, EPS, samples=batch.samples, seed=3, step=4)
        for seen in (order[:, :8].sort().values, order[:, 8:].sort().values, None):
            point = x.clone().requires_grad_()
            F.cross_entropy(model(point, places_BV=seen), inputs.targets, reduction="sum").backward()
            assert point.grad is not None
            moved = linf_step(x, point.grad, inputs.images, alpha=3 / 255, eps=EPS)
            if seen is not None:
                where = (patchify(moved, 8) != patchify(x, 8)).any(dim=2)
                assert all(set(w.nonzero()[:, 0].tolist()) <= set(s.tolist()) for w, s in zip(where, seen, strict=True))
            x = moved
        found = method.perturb(model, inputs)
        assert not torch.equal(found, start)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-6)

    def test_patches_have_equal_turns(self) -> None:
        attack = ClassifierAttack(num_steps=7, visible=0.4, whole_steps=2)
        order = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(s)) for s in range(3)])
        turns = [attack.places(step, order) for step in range(7)]
        assert turns[5] is None and turns[6] is None
        seen = torch.stack([t for t in turns if t is not None])  # (5, 3, 2)
        assert (seen[..., 0] < seen[..., 1]).all()
        assert all(seen[:, b].flatten().bincount().tolist() == [2] * 5 for b in range(3))

    @pytest.mark.parametrize("family", ["vit", "convit", "cait", "xcit", "convstem", "swin", "convnext"])
    def test_every_family_looks_at_the_given_patches_alone(self, family: str, batch: Batch) -> None:
        model = small(family).eval()
        unit, places = model.encoder.mask_unit, torch.tensor([[0, 3, 9], [2, 5, 14]])
        images = batch.images[:2].float() / 255
        other = patchify(images, unit)
        hidden = torch.ones(other.shape[:2], dtype=torch.bool).scatter(1, places, False)
        other = unpatchify(torch.where(hidden.unsqueeze(2), 1 - other, other), unit, 32)
        with torch.no_grad():
            assert torch.equal(model(images, places_BV=places), model(other, places_BV=places))
            every = torch.arange(16).expand(2, -1)
            torch.testing.assert_close(model(images, places_BV=every), model(images), rtol=1e-4, atol=1e-5)
            assert not torch.equal(model(images, places_BV=places), model(images))


class TestRamp:
    ATTACK = ClassifierAttack(eps=EPS, alpha=2 / 255, num_steps=4, ramp_steps=10)

    def test_the_attack_grows_by_equal_turns_and_few_steps_are_larger(self) -> None:
        found = [self.ATTACK.in_training_step(step) for step in range(12)]
        assert [attack.num_steps for attack in found] == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
        # 4 steps of 2/255 reach as far as one of 8/255 or two of 4/255.
        assert [round(255 * attack.alpha, 4) for attack in found[::3]] == [8, 4, 2.6667, 2]
        assert replace(self.ATTACK, alpha=EPS).in_training_step(0).alpha == 1.25 * EPS  # a single step is FastAT's
        assert replace(self.ATTACK, alpha=2 * EPS).in_training_step(0).alpha == 2 * EPS  # never smaller than asked for
        for same in (replace(self.ATTACK, ramp_steps=0), replace(self.ATTACK, num_steps=0)):
            assert same.in_training_step(0) == same

    @pytest.mark.parametrize("kind", [Pgd, Trades, Mart, ArdPrm])
    def test_each_training_step_makes_its_attack(self, kind: Any, model: Classifier, batch: Batch) -> None:
        objective = {Trades: TradesObjective, Mart: MartObjective, ArdPrm: ArdPrmObjective}.get(
            kind, ClassificationConfig
        )
        growing = kind(objective(attack=self.ATTACK))
        for step in (0, 5, 9):
            of_step = replace(self.ATTACK.in_training_step(step), ramp_steps=0)
            inputs = growing.prepare(model, batch, seed=0, step=step)
            assert torch.equal(growing.perturb(model, inputs), kind(objective(attack=of_step)).perturb(model, inputs))


@pytest.mark.parametrize("kind", [Pgd, Fast, Apgd, Trades, Mart, ArdPrm])
def test_steps_without_attack_train_on_its_start(kind: Any, model: Classifier, batch: Batch) -> None:
    objective = {Trades: TradesObjective, Mart: MartObjective, ArdPrm: ArdPrmObjective}.get(kind, ClassificationConfig)
    seldom, always = (kind(objective(attack=replace(ATTACK, every=n))) for n in (3, 1))
    for step in (0, 1, 2, 3):
        inputs = seldom.prepare(model, batch, seed=0, step=step)
        noise = random_start(inputs.images, EPS, samples=batch.samples, seed=0, step=step)
        start = {Apgd: inputs.images, Trades: gaussian_start(inputs), Mart: gaussian_start(inputs)}.get(kind, noise)
        wanted = always.perturb(model, inputs) if step % 3 == 0 else start
        assert torch.equal(seldom.perturb(model, inputs), wanted)


class TestFree:
    def test_replays_are_steps_of_the_trainings_own_gradient(self, model: Classifier, batch: Batch) -> None:
        """Algorithm 1 by hand, twice three steps on two micro-batches, to the bit."""
        reference = copy.deepcopy(model)
        method = Free(FreeObjective(free=FreeConfig(3), attack=ATTACK))
        assert method.replays == 3
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference)]
        halves = [[Batch(*(t[at : at + 3] for t in vars(batch).values())) for at in (0, 3)]]
        halves.append([Batch(b.images.flip(3), b.labels, b.samples + 50, b.epochs) for b in halves[0]])
        points: list[Tensor] = []
        for step in range(6):
            micro = halves[step // 3]
            for run in method.passes(model, micro, seed=2, step=step):
                run()["loss"].backward()
            gradients = [p.grad for p in points]
            points = [
                random_start(b.images / 255, EPS, samples=b.samples, seed=2, step=step)
                if step % 3 == 0
                else linf_step(points[i].detach(), gradients[i], b.images / 255, alpha=EPS, eps=EPS)  # type: ignore[arg-type]
                for i, b in enumerate(micro)
            ]
            for point, b in zip(points, micro, strict=True):
                F.cross_entropy(reference(point.requires_grad_()), b.labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))

    def test_two_passes_without_an_update_are_fgsm_from_a_random_start(self, model: Classifier, batch: Batch) -> None:
        method = Free(FreeObjective(free=FreeConfig(2), attack=ATTACK))
        noise = Pgd(ClassificationConfig(attack=replace(ATTACK, num_steps=0)))
        single = Pgd(ClassificationConfig(attack=replace(ATTACK, num_steps=1, alpha=EPS)))
        losses = []
        for step in (4, 5):
            (run,) = method.passes(model, [batch], seed=0, step=step)
            losses.append(run()["loss"])
            losses[-1].backward()
        assert torch.equal(losses[0], noise(model, batch, seed=0, step=4)["loss"])
        torch.testing.assert_close(losses[1], single(model, batch, seed=0, step=4)["loss"], rtol=1e-4, atol=0)
        assert losses[1] > losses[0]


SMALL = [
    "--recipe", "digits/pgd_vit_nano", "--data.limit", "64", "--model.patch_size", "16", "--model.drop_path", "0.2",
    "--batch_size", "16", "--max_steps", "5", "--log_every", "1", "--save_every", "2", "--attack.eps", "24/255",
    "--mixing.mixup", "0.8", "--probe.num_images", "0", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip
VISIBLE = ["--attack.visible", "0.5", "--attack.num_steps", "2", "--attack.every", "2", "--attack.ramp_steps", "4"]
FREE = ["--method", "free", "--free.replays", "3"]


@pytest.fixture(scope="module")
def free_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replays that nothing has interrupted."""
    return finetune(config_from([*SMALL, *FREE, "--output_dir", str(tmp_path_factory.mktemp("free") / "run")]))


def tensors_of(run: Path) -> dict[str, Tensor]:
    return read_tensors(checkpoints_of(run)[-1], "")


@pytest.mark.parametrize(("options", "saved"), [(VISIBLE, [2, 4, 5]), (FREE, [3, 5])], ids=["visible", "free"])
def test_a_run_resumes_to_the_bit(options: list[str], saved: list[int], free_run: Path, tmp_path: Path) -> None:
    """Replays are not left half-way: a run stops and saves between batches, of which it reads one for three steps."""
    whole = free_run if options is FREE else finetune(config_from([*SMALL, *options, "--output_dir", f"{tmp_path}/w"]))
    parts = [*SMALL, *options, "--output_dir", str(tmp_path / "parts")]
    run = finetune(config_from([*parts, "--stop_after", "2"]))
    assert read_meta(checkpoints_of(run)[-1])["step"] == saved[0]
    finetune(config_from(parts))
    wanted, found = tensors_of(whole), tensors_of(run)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    metas = [read_meta(path) for path in checkpoints_of(whole)]
    assert [meta["step"] for meta in metas] == saved
    assert metas[-1]["loader"]["position"] == (32 if options is FREE else 80)


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["accumulated", "two_ranks_accumulated"]
)
def test_replays_of_parts_are_those_of_the_whole(ranks: int, free_run: Path, tmp_path: Path, command: Command) -> None:
    parts = [*SMALL, *FREE, "--accum_iter", "2", "--output_dir", str(tmp_path / "parts")]
    if ranks == 1:
        finetune(config_from(parts))
    else:
        out = command("mimir_fast.finetune", *parts, ranks=ranks)
        assert out.returncode == 0, out.stdout + out.stderr
    wanted, found = tensors_of(free_run), tensors_of(tmp_path / "parts")
    np.testing.assert_allclose(wanted["model/head.bias"], found["model/head.bias"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreeConfig(1), "free.replays=1, wanted at least 2"),
        (lambda: ClassifierAttack(visible=0), "attack.visible=0, wanted more than 0 and at most 1"),
        (lambda: ClassifierAttack(ramp_steps=-1), "attack.ramp_steps=-1, wanted at least 0"),
        (lambda: ClassifierAttack(whole_steps=0), "attack.whole_steps=0, wanted at least 1"),
    ],
)
def test_bad_values_name_the_fix(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
