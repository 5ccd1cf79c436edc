"""What may differ between the parts of one run changes nothing of what is computed: each option, with two values.

A run of one step is copied and gone on with, once as it was and once with the option changed; all tensors of the last
checkpoint are compared: bit for bit where the arithmetic is the same, within 1e-5 where sums have another order.
"""

import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from small_runs import assert_same, last, pretrained, small, stopped_and_resumed
from torch import Tensor

from mimir_fast.checkpoints.reading import checkpoints_of, read_tensors
from mimir_fast.pretrain import config_from
from mimir_fast.training.finetuning import finetune
from mimir_fast.training.pretraining import pretrain
from mimir_fast.training.run_folder import FREE_TO_CHANGE

SMALL = [
    "--recipe", "digits/mimir_vit_nano", "--model.patch_size", "8", "--data.limit", "32", "--batch_size", "8",
    "--max_steps", "2", "--save_every", "1", "--log_every", "1", "--precision", "fp32", "--device", "cpu",
    "--data.num_workers", "0", "--mi.accumulated", "--mi.weight", "1",
]  # fmt: skip
# What changes nothing together changes nothing alone, so few runs will do. Equal bits:
SAME_BITS = {
    "housekeeping": {
        "run.log_every": ["--log_every", "2"], "run.save_every": ["--save_every", "2"],
        "run.keep_last": ["--keep_last", "1"], "run.resume": ["--resume"],
        "run.save_minutes": ["--save_minutes", "0.0001"], "run.picture_every": ["--picture_every", "1"],
        "run.keep_every": ["--keep_every", "1"], "run.max_bad_steps": ["--max_bad_steps", "1"],
        "run.stop_after": ["--stop_after", "1"], "run.hang_minutes": ["--hang_minutes", "0"],
        "run.allow_changes": ["--allow_changes"], "run.profile": ["--profile", "1"],
    },
    "recomputation": {"run.checkpoint_activations": ["--checkpoint_activations"]},
    "loader": {
        "data.loader": ["--data.loader", "torch"], "data.num_workers": ["--data.num_workers", "1"],
        "data.max_bad_files": ["--data.max_bad_files", "1"],
    },
    "loader by size": {"data.resident_gib": ["--data.resident_gib", "0"]},
}  # fmt: skip
# Within 1e-5. A penalty that is estimated on a micro-batch sees other images if that changes, which a start says; with
# --mi.accumulated, as here, it sees the whole batch.
ROUNDED = {
    "accumulation": {"run.accum_iter": ["--accum_iter", "2"]},
    "micro-batches": {"run.micro_batch": ["--micro_batch", "4"]},
    "compiled": {"run.compile": ["--compile"]},
}
ELSEWHERE = {
    "run.strategy": "tests/training/test_runs.py", "run.shard_ranks": "tests/training/test_elastic.py",
    "data.root": "tests/data/test_loaders.py", "data.hw_decoder_load": "of a GPU's decoders",
    "run.device": "test_a_gpu_goes_on", "model.head_std": "test_fine_tuning_has_its_head",
    "run.output_dir": "each case here",
    "run.overwrite": "deletes the run", "run.dry_run": "goes on with no run", "run.wandb": "needs an account",
    "format": "of config.json", "recipe": "a name", "preset": "a name; what it sets is compared", "imports": "modules",
}  # fmt: skip


def tensors_of(run: Path) -> dict[str, Tensor]:
    (newest,) = [path for path in checkpoints_of(run) if path.name == "step-00000002"]
    return read_tensors(newest, "")


def go_on(begun: Path, folder: Path, *flags: str) -> dict[str, Tensor]:
    shutil.copytree(begun, folder, symlinks=True)
    pretrain(config_from([*SMALL, "--output_dir", str(folder), *flags]))
    return tensors_of(folder)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("free") / "begun"
    pretrain(config_from([*SMALL, "--output_dir", str(folder), "--stop_after", "1"]))
    return folder


@pytest.fixture(scope="module")
def wanted(begun: Path) -> dict[str, Tensor]:
    return go_on(begun, begun.with_name("wanted"))


def test_every_free_option_is_tried() -> None:
    tried = [option for groups in (SAME_BITS, ROUNDED) for group in groups.values() for option in group]
    assert {*tried, *ELSEWHERE} == FREE_TO_CHANGE


@pytest.mark.parametrize("group", SAME_BITS)
def test_equal_bits(group: str, begun: Path, wanted: dict[str, Tensor], tmp_path: Path) -> None:
    found = go_on(begun, tmp_path / "run", *chain(*SAME_BITS[group].values()))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("group", ["accumulation", "micro-batches", pytest.param("compiled", marks=pytest.mark.slow)])
def test_equal_up_to_the_order_of_sums(group: str, begun: Path, wanted: dict[str, Tensor], tmp_path: Path) -> None:
    assert_close(go_on(begun, tmp_path / "run", *chain(*ROUNDED[group].values())), wanted)


@pytest.mark.cuda
def test_a_gpu_goes_on(begun: Path, wanted: dict[str, Tensor], tmp_path: Path) -> None:
    assert_close(go_on(begun, tmp_path / "run", "--device", "cuda"), wanted)


@pytest.mark.slow
def test_fine_tuning_has_its_head(tmp_path: Path) -> None:
    init = pretrained("vit", tmp_path / "pretrained")
    wanted = stopped_and_resumed(small("vit", init, tmp_path), tmp_path / "one")
    finetune(small("vit", init, tmp_path / "two", "--stop_after", "1"))
    finetune(small("vit", init, tmp_path / "two", "--model.head_std", "0.5"))
    assert_same(last(tmp_path / "two"), wanted)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    far = [name for name in wanted if (found[name].double() - wanted[name].double()).abs().max() > 1e-5]
    assert not far
