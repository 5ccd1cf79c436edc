"""The suite `strongest`: its order, its progress through kills and time limits, and what counts for the headline."""

import copy
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command_environment, run_module, start_module
from planted_defences import before
from small_classifier import EPS, SmallNet
from torch import Tensor, nn

from mimir_fast.evaluate import config_from
from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import ShardRun
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import Results, validity_verdict
from mimir_fast.evaluation.run import evaluate as evaluate_options
from mimir_fast.evaluation.sequence import Progress, fastest_first, run_in_sequence, taken
from mimir_fast.evaluation.strongest_attacks import FROM_OTHERS, NAMES
from mimir_fast.validation import refuse_idle

CPU, TESTS = torch.device("cpu"), Path(__file__).parents[1]
SHORT: dict[str, Any] = {
    "strongest_steps": 1, "strongest_targets": 2, "strongest_restarts": 1, "strongest_queries": 20
}  # fmt: skip


def test_the_order_is_by_breaks_a_second_of_what_is_left() -> None:
    pilot = {"slow": [0, 1, 2, 3], "fast": [0, 1], "other": [3], "none": [], "again": [0]}
    seconds = {"slow": 8.0, "fast": 1.0, "other": 1.0, "none": 0.5, "again": 1.0}
    # After fast (2 a second) and other (1) only slow breaks one more; then those that break most a second of any.
    assert fastest_first(pilot, seconds) == ["fast", "other", "slow", "again", "none"]


def breaks(numbers: set[int], seen: list[tuple[str, list[int]]], name: str) -> Callable[..., Tensor]:
    """An attack that turns the images of some samples black, and tells which it was given."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        seen.append((name, samples.tolist()))
        hit = torch.tensor([int(s) in numbers for s in samples])
        return torch.where(hit.view(-1, 1, 1, 1), torch.zeros_like(x), x)

    return attack


class Bright(nn.Module):
    """Class 1 where there is any light, else class 0."""

    lives = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        return torch.stack([torch.full((len(x),), 1e-3), x.flatten(1).sum(1)], dim=1)


COUNT = 24
LIT = EvaluationImages(
    torch.full((COUNT, 1, 2, 2), 200, dtype=torch.uint8), torch.ones(COUNT, dtype=torch.long), torch.arange(COUNT),
    ("dark", "light"), "lit", {},
)  # fmt: skip
BROKEN = {"few": {0, 1}, "many": set(range(10)), "late": {20, 21}}


def in_sequence(
    folder: Path, model: nn.Module | None = None, budget: float | None = None, inside: Any = None, order: Any = None
) -> tuple[Progress, list[tuple[str, list[int]]]]:  # fmt: skip
    seen: list[tuple[str, list[int]]] = []
    attacks = {name: breaks(numbers, seen, name) for name, numbers in BROKEN.items()}
    if order is not None:
        (folder / "order.json").write_text(json.dumps(order))
    found = run_in_sequence(
        model or Bright(), LIT, attacks, ShardRun(4, CPU, folder / "state.json"), short=attacks, identity="these",
        inside=inside or (lambda x, images: torch.ones(len(x), dtype=torch.bool)), budget=budget,
        order_file=folder / "order.json",
    )  # fmt: skip
    return found, seen


def by_sample(progress: Progress) -> dict[int, str]:
    return dict(zip(taken(COUNT, 0).tolist(), progress.broken_by, strict=True))


def test_every_image_is_attacked_until_it_is_broken(tmp_path: Path) -> None:
    found, seen = in_sequence(tmp_path, order=["many", "few", "late"])
    assert found.order == ["many", "few", "late"] and not found.pilot, "the order was there: no pilot"
    wanted = {s: "many" if s < 10 else "late" if s in (20, 21) else "none" for s in range(COUNT)}
    assert by_sample(found) == wanted
    assert found.faced == {"many": 24, "few": 14, "late": 14} and set(found.reached.values()) == {COUNT}
    given = {name: [s for n, part in seen if n == name for s in part] for name in BROKEN}
    assert sorted(given["many"]) == list(range(24)) and sorted(given["late"]) == list(range(10, 24))


def test_killed_anywhere_it_ends_with_the_same_numbers_and_in_the_same_order(tmp_path: Path) -> None:
    whole, _ = in_sequence(tmp_path)
    folder = tmp_path / "killed"
    folder.mkdir()
    orders, starts = list[Any](), 0
    while True:
        starts += 1
        model = Bright()
        model.lives = 9 if starts == 1 else 3
        try:
            found, _ = in_sequence(folder, model)
            break
        except KeyboardInterrupt:
            saved = json.loads((folder / "state.json").read_text())
            orders.append(saved["order"])
    assert starts > 4 and by_sample(found) == by_sample(whole)
    known = [order for order in orders if order]
    assert (
        all(order == found.order for order in known) and json.loads((folder / "order.json").read_text()) == found.order
    )


def test_what_lies_outside_of_the_ball_breaks_nothing(tmp_path: Path) -> None:
    nowhere, _ = in_sequence(tmp_path, inside=lambda x, images: (x == images).flatten(1).all(dim=1))
    assert set(nowhere.broken_by) == {"none"}


def test_when_time_is_up_it_stops_and_a_larger_budget_goes_on(tmp_path: Path) -> None:
    none, seen = in_sequence(tmp_path, budget=1e-9, order=["many", "few", "late"])
    assert none.faced == {"many": 4} and [name for name, _ in seen] == ["many"], "the batch under way is finished"
    some, _ = in_sequence(tmp_path, budget=1e-9)
    assert some.faced == none.faced, "what was spent counts for all starts together"
    rest, _ = in_sequence(tmp_path, budget=1e9)
    assert rest.faced == {"many": 24, "few": 14, "late": 14}


@pytest.fixture
def environment(small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of the command: the small model, eight digits, attacks of one step."""
    torch.save(small_model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setenv("SMALL_NET", str(tmp_path / "weights.pt"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
    assert command_environment()["SMALL_NET"]
    return [
        "--checkpoint", "small_classifier:small_net", "--data.source", "digits", "--data.image_size", "8",
        "--data.channels", "1", "--eps", "40/255", "--limit", "8", "--batch_size", "4", "--suite", "strongest",
        "--transfer_from", "small_classifier:small_net", "--transfer_lgv", "1",
        *(word for name, value in SHORT.items() for word in (f"--{name}", str(value))),
    ]  # fmt: skip


def killed_when(moment: Callable[[], bool], folder: Path, words: list[str]) -> None:
    """The command, killed by SIGKILL at a moment of its work."""
    process = start_module(folder, "mimir_fast.evaluate", *words)
    while not moment():
        assert process.poll() is None, process.said()
        time.sleep(0.02)
    process.kill()


def test_the_command_killed_at_work_and_resumed(environment: list[str], tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack")
    state, order = (tmp_path / "out/progress" / name for name in ("strongest.0of1.json", "strongest.order.json"))
    # In the sequence, once the order is known.
    killed_when(order.exists, tmp_path, [*environment, "--output_dir", "out"])
    surrogates = sorted((tmp_path / "out/surrogates").rglob("*.safetensors"))
    written = [file.stat().st_mtime_ns for file in surrogates]
    known = json.loads(order.read_text())
    results = evaluate_options(
        config_from([*environment, "--output_dir", str(tmp_path / "out")]), log=lambda line: None
    )
    assert json.loads(order.read_text()) == known == json.loads(state.read_text())["order"]
    numbers = results.sections["strongest"]
    assert [row["name"] for row in numbers["attacks"]] == known and set(known) == set(NAMES) - {"hopskipjump"}
    assert numbers["whole"] and not numbers["complete"], "attacks of one step are not the strongest"
    assert numbers["faced_all"] == numbers["total"] == 8 and set(numbers["left_out"]) == {"hopskipjump"}
    tried = results.sections["accuracy"]["faced"]
    assert {row["label"] for row in numbers["attacks"]} <= set(tried)
    assert tried["APGD-1, 2 targets"]["targets"] == 2 and results.robust["correct"] <= numbers["correct"]
    assert {"recolor", "patch", "elastic"} <= set(results.sections["unforeseen"])
    assert "recolor" not in results.sections["accuracy"]["broken_by"].values()
    page = (tmp_path / "out/report.html").read_text()
    assert "RayS, 4 decisions" in page and page == render(results)
    # The four models around the other one are those of the first start; its own section attacks them, too.
    assert len(written) == 4 and written == [file.stat().st_mtime_ns for file in surrogates]
    around = {row["name"]: row["parameters"] for row in numbers["attacks"]}["pgn-lgv"]
    assert around["lgv"]["models"] == 4 and around["from"] == ["small_classifier:small_net"]
    shown = results.sections["transfer"]
    assert list(shown) == ["small_classifier:small_net", "small_classifier:small_net (LGV)"]
    assert "LGV-50 on 4 models around small_classifier:small_net" in page
    assert shown["small_classifier:small_net (LGV)"]["correct"] < results.clean["correct"]


@pytest.mark.slow
def test_kills_change_no_verdict(environment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of AutoAttack and of the sequence after it: killed three times by SIGKILL, against a start that is not."""
    pytest.importorskip("pyautoattack")
    # Nothing else than these two, which keep progress of their own: other topics take minutes.
    words = [*environment, "--suite", "table", "--strongest", "yes", "--limit", "24", "--strongest_steps", "5"]

    def progress(folder: str, topic: str) -> dict[str, Any]:
        file = tmp_path / folder / "progress" / f"{topic}.0of1.json"
        return json.loads(file.read_text()) if file.exists() else {"attack": -1, "batch": 0, "order": []}

    def reached(topic: str, attack: int, batch: int) -> bool:
        found = progress("out", topic)
        return bool((found["attack"], found["batch"]) >= (attack, batch))

    # In the order of the work, and each true from then on, however rarely one looks. The first attacks break most.
    begun = list[tuple[int, int]]()
    for topic, attack, batch in (("autoattack", 0, 1), ("strongest", 0, 1), ("strongest", 2, 0)):
        killed_when(partial(reached, topic, attack, batch), tmp_path, [*words, "--output_dir", "out"])
        begun.append((progress("out", topic)["attack"], len(progress("out", topic).get("order", []))))
    assert begun[0][0] < 4 and all(attack < count for attack, count in begun[1:]), "each was killed at work"
    killed = evaluate_options(config_from([*words, "--output_dir", str(tmp_path / "out")]), log=lambda line: None)
    # The order is that of a clock.
    order = progress("out", "strongest")["order"]
    monkeypatch.setattr("mimir_fast.evaluation.sequence.fastest_first", lambda *pilot: order)
    whole = evaluate_options(config_from([*words, "--output_dir", str(tmp_path / "whole")]), log=lambda line: None)
    for topic in ("strongest", "autoattack"):
        one, other = (progress(folder, topic)["broken_by"] for folder in ("out", "whole"))
        assert one == other and 0 < one.count("none") < 24, topic
    assert killed.sections["accuracy"]["broken_by"] == whole.sections["accuracy"]["broken_by"]
    assert killed.robust == whole.robust


@pytest.mark.slow
def test_two_processes_attack_in_one_order(environment: list[str], tmp_path: Path) -> None:
    """And break what one breaks, but for packages that draw by batches."""
    pytest.importorskip("pyautoattack")
    found = []
    for ranks in (1, 2):
        done = run_module(tmp_path, "mimir_fast.evaluate", *environment, "--output_dir", f"out{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(Results.read(tmp_path / f"out{ranks}/results.json"))
    one, two = found
    assert two.choices["num_shards"] == 2 and two.sections["strongest"]["whole"]
    assert abs(two.sections["strongest"]["correct"] - one.sections["strongest"]["correct"]) <= 1
    states = [json.loads((tmp_path / f"out2/progress/strongest.{k}of2.json").read_text()) for k in range(2)]
    assert [len(state["broken_by"]) for state in states] == [4, 4]


def test_attacks_that_time_did_not_suffice_for_count_apart(
    small_model, digits_images: EvaluationImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the images they reached; and the same call with more time finishes them."""
    few = digits_images.evenly(32)
    asked: dict[str, Any] = {
        "suite": "table", "autoattack": "no", "strongest": "yes", "eps": EPS, "batch_size": 4,
        "strongest_attacks": ("pgd-margin", "apgd-margin", "pgd-targets"), "strongest_steps": 10,
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    ticks = iter(range(10**6))
    with monkeypatch.context() as patch:  # each batch takes one second
        patch.setattr("mimir_fast.evaluation.sequence.time.perf_counter", lambda: float(next(ticks)))
        # Three for the pilot, eight for the first attack, one for the second; none is left for the third.
        part = evaluate(small_model, few.images, few.labels, strongest_budget=0.2, **asked)
    numbers = part.sections["strongest"]
    (first, whole), (second, some), (_, none) = [(row["label"], row["reached"]) for row in numbers["attacks"]]
    assert whole == 32 and 4 <= some < 32 and none == 0 and not numbers["whole"]
    assert numbers["faced_all"] == 32 - numbers["correct"] > 0, "whoever stands has the third before him"
    assert first in part.sections["accuracy"]["faced"] and second not in part.sections["accuracy"]["faced"]
    (apart,) = part.partial
    assert apart["tried"] == [second] and apart["total"] == some
    assert any("Time was up (0.2 minutes)" in note and second in note for note in part.notes)
    assert f"{numbers['faced_all']} of 32 images are broken or faced all" in render(part)
    rest = evaluate(small_model, few.images, few.labels, **asked)
    assert rest.sections["strongest"]["whole"] and rest.partial == []
    assert rest.robust["correct"] <= min(part.robust["correct"], rest.sections["strongest"]["correct"])
    # Three of ten steps are not all of them; only these may be called the strongest.
    assert not rest.sections["strongest"]["complete"] and "The strongest attacks ran" not in words_of(rest)
    rest.sections["strongest"]["complete"] = True
    assert words_of(rest).endswith("The strongest attacks ran on every image until it was broken.")


def words_of(results: Results) -> str:
    return validity_verdict(results)["text"]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_of_two_or_three_classes_it_says_what_is_left_out(
    digits_images: EvaluationImages, num_classes: int
) -> None:  # fmt: skip
    pytest.importorskip("pyautoattack")
    model, images = SmallNet(num_classes=num_classes).eval(), digits_images.evenly(8).images
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    results = evaluate(
        model,
        images,
        labels,
        suite="table",
        autoattack="no",
        strongest="yes",
        eps=0.9,
        **{**SHORT, "strongest_steps": 20},
    )
    numbers = results.sections["strongest"]
    left = {"pgd-targets", "pgd-restarts", "apgd-targets"} if num_classes == 2 else set()
    assert set(numbers["left_out"]) == left | {*FROM_OTHERS, "hopskipjump"}
    assert numbers["whole"] and numbers["correct"] == 0
    assert ("of two classes there is one target" in render(results)) == (num_classes == 2)
    named = {row["name"]: row["parameters"] for row in numbers["attacks"]}
    if num_classes == 3:
        assert named["apgd-targets"]["loss"] == "margin at targets" and named["apgd-targets"]["targets"] == 2


def test_decisions_lower_the_headline_of_a_defence_without_gradients(
    small_model, digits_images: EvaluationImages
) -> None:
    few = digits_images.evenly(16)
    model = before(lambda x: (4 * x).round() / 4)(copy.deepcopy(small_model)).eval()
    results = evaluate(
        model, few.images, few.labels, suite="table", autoattack="no", strongest="yes", eps=EPS,
        strongest_attacks=("pgd-margin", "apgd-margin", "rays"), strongest_steps=20,
    )  # fmt: skip
    found = {row["name"]: row["broken"] for row in results.sections["strongest"]["attacks"]}
    assert found["rays"] > found["pgd-margin"] + found["apgd-margin"]
    assert results.robust["correct"] <= results.sections["strongest"]["correct"]


def test_l2_and_l1(small_model, digits_images: EvaluationImages) -> None:
    pytest.importorskip("pyautoattack")
    few = digits_images.evenly(8)
    for norm, eps in (("l2", 0.8), ("l1", 2.0)):
        results = evaluate(
            small_model, few.images, few.labels, suite="table", autoattack="no", strongest="yes", norm=norm, eps=eps,
            **SHORT,
        )  # fmt: skip
        numbers = results.sections["strongest"]
        assert numbers["whole"] and ("hopskipjump" in numbers["left_out"]) == (norm == "l1")


class TestOptions:
    @pytest.mark.parametrize("option", ["budget", "attacks", "steps", "targets", "restarts", "queries"])
    def test_do_nothing_where_these_attacks_do_not_run(self, option: str) -> None:
        with pytest.raises(ValueError, match="the strongest attacks do not run"):
            refuse_idle(EvaluateConfig("run"), [f"--strongest_{option}", "9"])
        refuse_idle(EvaluateConfig("run", suite="strongest"), [f"--strongest_{option}", "9"])

    @pytest.mark.parametrize(
        ("attack", "option"),
        [("square", "steps"), ("square", "targets"), ("pgd-targets", "restarts"), ("pgd-margin", "queries")],
    )
    def test_do_nothing_where_no_attack_has_them(self, attack: str, option: str) -> None:
        config = EvaluateConfig("run", suite="strongest", strongest_attacks=(attack,))
        with pytest.raises(ValueError, match="--strongest_attacks has no"):
            refuse_idle(config, [f"--strongest_{option}", "9"])

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"strongest_attacks": ("pgd",)}, "none of apgd-ce"), ({"strongest_budget": 0.0}, "minutes"),
            ({"strongest_steps": 0}, "strongest_steps=0"),
        ],
    )  # fmt: skip
    def test_bad_ones_are_refused(self, wrong: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            EvaluateConfig("run", **wrong)

    def test_an_attack_that_is_not_defined_is_refused_by_name(self, small_model, digits_images) -> None:
        few = digits_images.evenly(4)
        for name, norm, words in (
            ("mi-ensemble", "linf", "names no other model"), ("pgn-lgv", "linf", "names no other model"),
            ("hopskipjump", "l1", "L∞ and L2"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"--strongest_attacks {name}: .*{words}"):
                evaluate(
                    small_model,
                    few.images,
                    few.labels,
                    suite="strongest",
                    norm=norm,
                    eps=0.2,
                    strongest_attacks=(name,),
                )
