"""One start of a run, in this process: precision, accumulation, dry runs, traces, and what is saved in the end."""

import json
from pathlib import Path

import pytest
import torch
from commands import run_code
from hypothesis import given
from hypothesis import strategies as st

from mimir_fast.checkpoints.reading import checkpoints_of, read_meta, read_tensors
from mimir_fast.data.order import BatchPlan, Cursor
from mimir_fast.methods.registry import all_methods
from mimir_fast.pretrain import config_from
from mimir_fast.training import flops, precision, session
from mimir_fast.training.health import LossWatch, TrainingDiverged
from mimir_fast.training.precision import choose_precision
from mimir_fast.training.pretraining import PretrainConfig, Pretraining, pretrain
from mimir_fast.training.run_config import RunConfig

# 64 digits in batches of 16, patches of 16 pixels.
SMALL = [
    "--recipe", "digits/mimir_vit_nano", "--data.limit", "64", "--model.patch_size", "16", "--batch_size", "16",
    "--max_steps", "4", "--save_every", "2", "--log_every", "1", "--device", "cpu",
]  # fmt: skip


PEAK = 1e12


def small(folder: Path, *extra: str) -> PretrainConfig:
    return config_from([*SMALL, "--output_dir", str(folder), *extra])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, never interrupted, on a device whose peak is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "peak_flops", lambda device, *, bf16: PEAK)
        return pretrain(small(tmp_path_factory.mktemp("whole") / "run", "--precision", "fp32"))


class TestUtilization:
    def test_is_what_the_formula_says(self, whole_run: Path) -> None:
        first, *lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
        ideal = flops.flops_of_step(small(whole_run)) / PEAK
        assert "mfu" not in first and all(line["mfu"] * line["step_s"] == pytest.approx(ideal) for line in lines)

    @pytest.mark.parametrize(
        ("name", "peak"),
        [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GB200", 2.5e15),
         ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA A100-SXM4-80GB", 312e12),
         ("NVIDIA A40-48Q", 149.7e12), ("NVIDIA RTX A4000", None), ("NVIDIA GH200 480GB", 989e12),
         ("AMD Instinct MI250X", 191.5e12), ("NVIDIA GeForce GTX 1080", None),
         ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)],
    )  # fmt: skip
    def test_knows_devices(self, name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert flops.peak_flops(torch.device("cuda"), bf16=True) == peak
        assert flops.peak_flops(torch.device("cuda"), bf16=False) is flops.peak_flops(torch.device("cpu"), bf16=True)

    @pytest.mark.parametrize("method", all_methods("pretrain"))
    def test_counts_every_method(self, method: str, tmp_path: Path) -> None:
        assert flops.flops_of_step(small(tmp_path, "--method", method)) > 0


class TestPrecision:
    @pytest.mark.parametrize(
        ("wanted", "device", "parity", "recorded", "speedup", "name"),
        [
            ("auto", "cpu", False, None, 4.0, "bf16"),
            ("auto", "cpu", False, None, 1.4, "fp32"),
            ("auto", "cpu", False, None, None, "fp32"),  # no such instructions: not measured
            ("auto", "cpu", True, None, 4.0, "fp32"),  # the official preset promises the authors' numbers
            ("auto", "cpu", False, "fp32", 4.0, "fp32"),  # a resumed run stays what it was
            ("auto", "cpu", True, "bf16", 1.0, "bf16"),
            ("auto", "cuda", False, None, 1.0, "bf16"),
            ("auto", "cuda", True, None, 1.0, "fp32"),
            ("bf16", "cpu", True, "fp32", 1.0, "bf16"),
        ],
    )
    def test_choice(
        self, monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, parity: bool, recorded: str | None,
        speedup: float | None, name: str,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(precision, "multiplies_bf16", lambda: speedup is not None)
        monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
        chosen = choose_precision(wanted, torch.device(device), parity=parity, recorded=recorded)  # type: ignore[arg-type]
        assert chosen.name == name

    def test_measuring_gives_a_number_and_leaves_the_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No more can be said of the number: where bf16 is emulated, it was seen 121 times as slow as fp32."""
        monkeypatch.setattr(precision, "ROUNDS", 2)
        threads = torch.get_num_threads()
        assert 0 < precision.bf16_speedup.__wrapped__() < float("inf")
        assert torch.get_num_threads() == threads

    def test_a_resumed_run_does_not_flip(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
        monkeypatch.setattr(precision, "bf16_speedup", lambda: 3.0)
        pretrain(small(tmp_path / "run", "--stop_after", "1"))
        assert "bf16 (bf16 products are 3.0x as fast as fp32 here)" in capsys.readouterr().out
        monkeypatch.setattr(precision, "bf16_speedup", lambda: 1.0)  # another machine
        pretrain(small(tmp_path / "run", "--stop_after", "1"))
        assert "bf16 (as before)" in capsys.readouterr().out
        assert read_meta(checkpoints_of(tmp_path / "run")[-1])["precision"] == "bf16"


class TestAccumulation:
    def test_follows_the_number_of_ranks(self) -> None:
        run = RunConfig(batch_size=2048, micro_batch=64)
        assert [run.accumulation(ranks) for ranks in (64, 32, 8, 7, 1)] == [1, 1, 4, 5, 32]
        before = {"world_size": 32, "micro_batch": 64}
        assert RunConfig(batch_size=2048).accumulation(8, before) == 4  # as much memory a rank as before
        assert RunConfig(batch_size=2048).accumulation(64, before) == 1
        with pytest.raises(ValueError, match="--batch_size 32 or more"):
            RunConfig(batch_size=16, accum_iter=4).accumulation(8)

    @given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
    def test_micro_batches_of_any_number_of_ranks_make_up_the_batch(
        self, total: int, ranks: int, accum: int, step: int
    ) -> None:
        parts = ranks * accum
        if total < parts:
            return
        size = -(-total // parts)
        plans = [BatchPlan(size, rank, ranks, accum, total=total) for rank in range(ranks)]
        spans = [plan.span(Cursor(step * total, micro)) for plan in plans for micro in range(accum)]
        assert all(0 < stop - start <= size and stop - start >= size - 1 for start, stop in spans)
        assert [i for span in spans for i in range(*span)] == list(range(step * total, (step + 1) * total))

    def test_uneven_micro_batches_count_by_their_images(self, whole_run: Path, tmp_path: Path) -> None:
        """16 images as 5 + 5 + 6 are the same batch; a mean of the three means would not be."""
        flags = ["--precision", "fp32", "--mi.estimator", "none"]
        pretrain(small(tmp_path / "plain", *flags))
        pretrain(small(tmp_path / "uneven", *flags, "--accum_iter", "3"))
        torch.testing.assert_close(losses(tmp_path / "uneven"), losses(tmp_path / "plain"), rtol=2e-5, atol=0)

    def test_a_global_estimate_needs_even_ones(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"mi\.scope=global needs ranks with as many images"):
            pretrain(small(tmp_path / "run", "--accum_iter", "3", "--mi.scope", "global"))


class TestWhatIsSaved:
    def test_an_unexpected_error_keeps_the_last_whole_step(
        self, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, config = tmp_path / "run", small(tmp_path / "run", "--precision", "fp32", "--save_every", "100")
        original = Pretraining.passes

        def losing(self: Pretraining, *args: object, step: int, **options: object) -> object:
            if step == 3:
                raise RuntimeError("the network disk is ill")
            return original(self, *args, step=step, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="is ill"):
            patch.setattr(Pretraining, "passes", losing)
            pretrain(config)
        assert [p.name for p in checkpoints_of(run)] == ["step-00000003"]
        pretrain(config)
        wanted, found = (read_tensors(checkpoints_of(r)[-1], "") for r in (whole_run, run))
        assert all(torch.equal(wanted[name], found[name]) for name in wanted) and losses(run) == losses(whole_run)

    def test_minutes(self, tmp_path: Path) -> None:
        pretrain(small(tmp_path, "--save_every", "100", "--save_minutes", "0.000001", "--keep_last", "9"))
        assert len(checkpoints_of(tmp_path)) == 4

    def test_divergence_is_remembered(self, tmp_path: Path) -> None:
        config = small(tmp_path, "--lr", "1e30", "--max_bad_steps", "2", "--max_steps", "9", "--save_every", "1")
        with pytest.raises(TrainingDiverged, match="2 steps in a row"):
            pretrain(config)
        saved = [p.name for p in checkpoints_of(tmp_path)]
        with pytest.raises(TrainingDiverged, match="would do so again with the same options"):
            pretrain(config)
        assert [p.name for p in checkpoints_of(tmp_path)] == saved
        assert saved == ["step-00000001"]  # none while steps were skipped; its weights are those that gave NaN
        pretrain(small(tmp_path, "--lr", "1e-4", "--max_steps", "9", "--allow_changes"))
        assert (tmp_path / "checkpoints" / "step-00000001.diverged").is_dir()
        assert read_meta(checkpoints_of(tmp_path)[-1])["skipped"] == 0

    def test_losses_that_explode_are_told_from_healthy_ones(self) -> None:
        watch = LossWatch()
        assert watch.healthy
        for loss, healthy in ((1.0, True), (0.4, True), (1.9, True), (2.1, False), (float("inf"), False), (0.3, True)):
            watch.note(loss)
            assert watch.healthy is healthy


class TestACommandLineThatFails:
    """A typo, missing data, weights that cannot be read: whatever it is, the folder is as it was."""

    def fails(self, folder: Path, *flags: str) -> str:
        with pytest.raises((ValueError, OSError)) as failure:
            pretrain(small(folder, *flags))
        return str(failure.value)

    def test_leaves_nothing_behind(self, tmp_path: Path) -> None:
        flags = ("--data.source", "cifar10", "--data.root", "nowhere")
        assert "nowhere does not exist" in self.fails(tmp_path / "runs" / "new", *flags)
        assert "mi.scope=global" in self.fails(tmp_path / "runs" / "new", "--accum_iter", "3", "--mi.scope", "global")
        assert not list(tmp_path.iterdir())

    def test_deletes_nothing(self, tmp_path: Path) -> None:
        run = pretrain(small(tmp_path / "run", "--max_steps", "2"))
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
        self.fails(run, "--overwrite", "--data.source", "cifar10", "--data.root", "nowhere")
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
        assert read_meta(checkpoints_of(run)[-1])["step"] == 2


@pytest.mark.parametrize(("before", "now"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimizer_starts_without_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, now: str
) -> None:
    """State of one is a KeyError in the other, or lies in its checkpoints for ever."""
    run = pretrain(small(tmp_path, "--stop_after", "2", "--optimizer", before))
    pretrain(small(tmp_path, "--optimizer", now, "--allow_changes"))
    assert f"{now} starts without the state of {before}" in capsys.readouterr().out
    kinds = {name.rpartition("/")[2] for name in read_tensors(checkpoints_of(run)[-1], "optimizer/")}
    assert kinds == ({"exp_avg", "exp_avg_sq", "step"} if now == "adamw" else {"momentum_buffer"})


def test_fewer_steps_than_were_made_are_refused(tmp_path: Path) -> None:
    pretrain(small(tmp_path, "--stop_after", "2"))
    with pytest.raises(ValueError, match=r"is at step 2, and this run has 1: give more --max_steps"):
        pretrain(small(tmp_path, "--max_steps", "1", "--allow_changes"))


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(small(tmp_path / "run", "--dry_run"))
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for word in ("nothing was written", "s a step", "4 steps take", "GiB a rank", "GB a checkpoint"):
        assert word in said


def test_a_trace_can_be_looked_at(tmp_path: Path) -> None:
    pretrain(small(tmp_path, "--profile", "1"))
    assert (tmp_path / "profile" / "rank-0.json.gz").stat().st_size > 1000
    assert "aten::" in (tmp_path / "profile" / "rank-0.txt").read_text()


HANG = """
import sys, time, torch
from pathlib import Path
from mimir_fast.training.watchdog import Watchdog
from mimir_fast.world import World
dog = Watchdog(World(0, 2, torch.device("cpu")), Path(sys.argv[1]), 0.005)
dog.beat(7)
def stuck_here():
    time.sleep(60)
stuck_here()
"""


def test_a_hang_ends_with_a_record_and_a_name(tmp_path: Path) -> None:
    out = run_code(tmp_path, HANG, str(tmp_path))
    assert out.returncode == 75
    assert "after step 7" in out.stderr and "rank 1 gives no sign" in out.stderr and "--hang_minutes" in out.stderr
    assert "stuck_here" in (tmp_path / "step-00000007" / "rank-0.txt").read_text()
