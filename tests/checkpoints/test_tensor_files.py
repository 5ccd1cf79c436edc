"""safetensors files have the mode that the umask gives, whoever of ours writes them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.checkpoints.tensor_files import save_tensors

PACKAGE = Path(__file__).parents[2] / "mimir_fast"


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def wanted(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file under each umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_decides(wanted: int, tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(6).view(2, 3).T}, tmp_path / "a.safetensors", {"format": "pt"})
    assert mode(tmp_path / "a.safetensors") == wanted
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(6).view(2, 3).T)
    save_checkpoint(tmp_path / "step-00000001", {"model/a": torch.ones(3)}, {"step": 1})
    files = [path for path in (tmp_path / "step-00000001").iterdir() if path.name != ".metadata"]
    assert len(files) == 2 and {mode(path) for path in files} == {wanted}


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    path.chmod(0o640)
    save_tensors({"a": torch.ones(1)}, path)
    assert mode(path) == 0o640


def test_what_fails_leaves_no_file(tmp_path: Path) -> None:
    shared = torch.ones(2)
    with pytest.raises(RuntimeError, match="share memory"):
        save_tensors({"a": shared, "b": shared}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_of_ours_writes_them_otherwise() -> None:
    callers = [path.name for path in PACKAGE.rglob("*.py") if "import save_file" in path.read_text()]
    assert callers == ["tensor_files.py"]
