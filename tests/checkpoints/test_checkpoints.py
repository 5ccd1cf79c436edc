"""Checkpoints: what was written comes back, what was damaged is noticed, and training need not wait for the disk."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from file_state import file_state
from safetensors import safe_open
from small_models import masked_vit
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from mimir_fast.checkpoints import checksums, saving
from mimir_fast.checkpoints.durable import point, pointed_at, remove, write_text
from mimir_fast.checkpoints.reading import (
    CheckpointError,
    DamagedCheckpoint,
    UnreadableCheckpoint,
    load_checkpoint,
    read_meta,
    read_tensors,
    resolve_checkpoint,
    verify,
)
from mimir_fast.checkpoints.saving import ALONE, Saver, save_checkpoint
from mimir_fast.checkpoints.trial import try_storage
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.training.ema import Ema
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer
from mimir_fast.training.state import group_steps, make_room_for_optimizer, set_group_steps, training_tensors


@pytest.fixture
def model() -> MaskedModel:
    torch.manual_seed(0)
    return masked_vit(16, 4, 3, 32, 2, 2, 16, 1, 2)


class TestCheckpoint:
    @pytest.fixture
    def saved(self, model: MaskedModel, tmp_path: Path) -> Path:
        optimizer = build_optimizer(model, OptimizerConfig())
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        folder = tmp_path / "checkpoints" / "step-00000001"
        save_checkpoint(folder, training_tensors(model, optimizer, Ema(model, 0.9)), {"step": 1})
        return folder

    def test_comes_back_bit_for_bit(self, saved: Path, model: MaskedModel) -> None:
        other = masked_vit(16, 4, 3, 32, 2, 2, 16, 1, 2)
        optimizer = build_optimizer(other, OptimizerConfig())
        make_room_for_optimizer(saved, other, optimizer)
        tensors = training_tensors(other, optimizer, Ema(other, 0.9))
        load_checkpoint(saved, tensors)
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert optimizer.state[other.encoder.norm.weight]["step"] == 1

    @pytest.mark.parametrize("leaving", [SystemExit(0), KeyboardInterrupt()], ids=["signal", "Ctrl-C"])
    def test_who_is_asked_to_leave_meanwhile_leaves(
        self, saved: Path, leaving: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch.distributed.checkpoint catches what a signal's handler raises, as the failure of a rank."""
        tensors = read_tensors(saved, "")

        def read_data(*_: object) -> None:
            raise leaving

        monkeypatch.setattr(HuggingFaceStorageReader, "read_data", read_data)
        with pytest.raises(type(leaving)):
            load_checkpoint(saved, tensors)

    def test_holds_no_pickle(self, saved: Path) -> None:
        assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}

    def test_another_architecture_is_refused(self, saved: Path) -> None:
        other = masked_vit(16, 4, 3, 64, 2, 2, 16, 1, 2)
        tensors = {f"model/{name}": t for name, t in file_state(other).items()}
        with pytest.raises(CheckpointError, match=r"another architecture.*\(1, 1, 32\) in the file"):
            load_checkpoint(saved, tensors)

    def test_truncation_is_named(self, saved: Path) -> None:
        (file,) = saved.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"truncated .* use an older checkpoint"):
            read_tensors(saved)

    def test_a_stranger_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "meta.json").write_text('{"format": "something else"}')
        with pytest.raises(CheckpointError, match="not a mimir_fast checkpoint"):
            read_meta(tmp_path)
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            resolve_checkpoint(tmp_path / "nowhere")

    def test_one_flipped_bit_is_noticed(self, saved: Path) -> None:
        verify(saved)
        (file,) = saved.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        read_meta(saved)  # sizes say nothing
        for read in (verify, read_tensors):
            with pytest.raises(DamagedCheckpoint, match=r"changed after it was written .* use an older checkpoint"):
                read(saved)

    def test_a_cut_description_is_noticed(self, saved: Path) -> None:
        text = (saved / "meta.json").read_text()
        for length in (0, 1, len(text) // 2, len(text) - 3):
            (saved / "meta.json").write_text(text[:length])
            with pytest.raises(DamagedCheckpoint, match="use an older checkpoint"):
                verify(saved)

    @pytest.mark.parametrize(
        ("key", "value"), [("step", 2), ("version", 2), ("version", 7), ("format", "?"), ("new", None)]
    )
    def test_a_changed_description_is_noticed(self, saved: Path, key: str, value: object) -> None:
        """A step of another number would repeat samples, and nothing else would tell."""
        meta = json.loads((saved / "meta.json").read_text())
        (saved / "meta.json").write_text(json.dumps(meta | {key: value}))
        with pytest.raises(DamagedCheckpoint, match=r"meta.json was changed after it was written"):
            read_meta(saved)
        (saved / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))  # order and layout are no content
        assert read_meta(saved)["step"] == 1

    @pytest.mark.parametrize("version", [1, 2])
    def test_checkpoints_of_older_versions_are_read(self, saved: Path, version: int) -> None:
        meta = json.loads((saved / "meta.json").read_text())
        del meta["crc32"]
        for name, info in meta["files"].items():
            old = {"size": info["size"], "crc32": f"{zlib.crc32((saved / name).read_bytes()):08x}"}
            meta["files"][name] = info["size"] if version == 1 else old
        (saved / "meta.json").write_text(json.dumps(meta | {"version": version}))
        verify(saved)
        assert read_tensors(saved)
        (saved / "meta.json").write_text(json.dumps({**meta, "version": version, "files": None}))
        with pytest.raises(DamagedCheckpoint, match="names no files"):
            verify(saved)

    def test_storage_that_fails_for_a_moment_is_asked_again(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pauses: list[float] = []
        monkeypatch.setattr("time.sleep", pauses.append)
        failing = iter([True, False, True])
        read = checksums.crc32

        def stale(*args: Any) -> str:
            if next(failing, False):
                raise OSError(errno.ESTALE, "Stale file handle")
            return read(*args)

        monkeypatch.setattr(checksums, "crc32", stale)
        verify(saved)
        assert len(pauses) == 1
        failing = iter([True] * 10)
        with pytest.raises(UnreadableCheckpoint, match=r"safetensors cannot be read \(Stale file handle\)"):
            verify(saved)
        assert len(pauses) == 4

    def test_the_half_that_another_host_wrote_is_missed(self, tmp_path: Path) -> None:
        """What two hosts left that did not share a folder: each half loads as if it were whole, without this check."""
        from safetensors.torch import save_file

        folder = tmp_path / "step-00000001"
        folder.mkdir()
        offsets = {"model/w": {"saved_offsets": [0, 0]}}
        file = folder / "shard-00001-model-00001-of-00001.safetensors"
        save_file({"model/w": torch.ones(2, 3)}, file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        info = {"size": file.stat().st_size}
        meta = {"format": "mimir_fast.checkpoint", "version": 1, "step": 1, "files": {file.name: info["size"]}}
        (folder / "meta.json").write_text(json.dumps(meta))
        assert read_tensors(folder)["w"].shape == (2, 3)
        second = {"model/w": {"saved_offsets": [4, 0]}}  # rows 2 and 3 lie on another host
        file = folder / "shard-00003-model-00001-of-00001.safetensors"
        save_file({"model/w": torch.ones(2, 3)}, file, metadata={"DCP_SHARDING_INFO": json.dumps(second)})
        with pytest.raises(DamagedCheckpoint, match="holds 12 of the 18 numbers of model/w"):
            read_tensors(folder)


def test_blocks_together_cover_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 1000)
    content = bytes(range(256)) * 14  # the last block is not full
    (tmp_path / "file").write_bytes(content)
    wanted = [f"{zlib.crc32(content[start : start + 1000]):08x}" for start in range(0, len(content), 1000)]
    assert checksums.block_checksums(tmp_path / "file") == checksums.block_checksums(tmp_path / "file", 3) == wanted
    assert checksums.crc32(tmp_path / "file") == f"{zlib.crc32(content):08x}"


class TestSaver:
    def tensors(self) -> dict[str, Tensor]:
        return {f"model/{i}": torch.full((1024, 1024), float(i)) for i in range(8)}

    @pytest.mark.parametrize("again", [False, True])
    def test_training_goes_on_while_a_copy_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
    ) -> None:
        """By one stager, or by one for each save, as torch 2.11 needs."""
        monkeypatch.setattr(saving, "STAGES_AGAIN", again and saving.STAGES_AGAIN)
        tensors, saver = self.tensors(), Saver(ALONE)
        saver.start(tmp_path / "step-00000001", tensors, {"step": 1})
        for tensor in tensors.values():
            tensor.add_(1)  # the next step
        saver.start(tmp_path / "step-00000002", tensors, {"step": 2})  # waits for the first
        saver.wait()
        for step in (1, 2):
            found = read_tensors(tmp_path / f"step-0000000{step}")
            assert all(torch.equal(found[str(i)], torch.full((1024, 1024), i + step - 1.0)) for i in range(8))
        saver.close()

    def test_a_failure_comes_out_of_wait_and_the_next_save_works(self, tmp_path: Path) -> None:
        saver = Saver(ALONE)
        saver.start(tmp_path / "step-00000001", self.tensors(), {"step": 1}, _fail)
        with pytest.raises(OSError, match=r"could not write checkpoint .*no space"):
            saver.wait()
        saver.start(tmp_path / "step-00000002", self.tensors(), {"step": 2})
        saver.wait()
        verify(tmp_path / "step-00000002")
        saver.close()

    def test_a_folder_that_cannot_be_made_is_an_error_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match="could not write checkpoint"):
            Saver(ALONE).start(tmp_path / "file" / "step-00000001", self.tensors(), {"step": 1})


def _fail() -> None:
    raise OSError("no space left on device")


def test_steps_counted_in_groups_are_kept_as_nvidia_apex_has_them(model: MaskedModel) -> None:
    """apex's FusedAdam keeps `step` in its parameter groups; lost, Adam would correct its bias as if it began anew."""
    optimizer = build_optimizer(model, OptimizerConfig())
    for group in optimizer.param_groups:
        group["step"] = 7
    saved = json.loads(json.dumps(group_steps(optimizer)))
    other = build_optimizer(model, OptimizerConfig())
    set_group_steps(other, saved)
    assert group_steps(other) == [7] * len(other.param_groups)
    on_device = build_optimizer(model, OptimizerConfig())
    for group in on_device.param_groups:
        group["step"] = torch.zeros(1, dtype=torch.int)
    set_group_steps(on_device, saved)
    assert all(isinstance(g["step"], Tensor) and int(g["step"]) == 7 for g in on_device.param_groups)


def test_the_files_are_those_of_torch(tmp_path: Path) -> None:
    """Our writer differs in how the bytes get there: names, header and tensors are what torch's own writes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from mimir_fast.checkpoints.writer import Writer

    tensors = {
        "matrix": torch.arange(12.0).reshape(3, 4), "scalar": torch.tensor(3), "part": torch.arange(10)[2:5],
        "half": torch.ones(5, dtype=torch.bfloat16), "empty": torch.ones(0, 2),
    }  # fmt: skip
    found = []
    for writer in (Writer(tmp_path / "ours"), HuggingFaceStorageWriter(str(tmp_path / "torch"), save_distributed=True)):
        torch.distributed.checkpoint.save(tensors, storage_writer=writer, no_dist=True)
        (file,) = Path(writer.path).iterdir()
        with safe_open(file, "pt") as content:
            header = {**content.metadata(), "DCP_SHARDING_INFO": json.loads(content.metadata()["DCP_SHARDING_INFO"])}
            found.append((file.name, header, {name: content.get_tensor(name) for name in content.keys()}))  # noqa: SIM118
    (name, header, ours), (name_, header_, theirs) = found
    assert (name, header) == (name_, header_)
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_a_transposed_tensor_is_saved(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    save_checkpoint(tmp_path / "step-00000001", {"model/a": tensor}, {"step": 1})
    assert torch.equal(read_tensors(tmp_path / "step-00000001")["a"], tensor)


class TestDurable:
    def test_a_failed_write_leaves_the_old_content(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        write_text(path, "old")
        (tmp_path / "config.json.partial").mkdir()  # in the way of the new one
        with pytest.raises(OSError):
            write_text(path, "new")
        assert path.read_text() == "old"

    def test_a_link_always_points_somewhere(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        (tmp_path / "best").mkdir()  # as an older version wrote it
        for name in ("a", "b"):
            point(tmp_path / "best", name)
            assert (tmp_path / "best").resolve() == tmp_path / name

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EIO])
    def test_without_links_a_file_says_the_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """On a bucket's mount a run had no best checkpoint, and was told to free some space."""
        best = tmp_path / "best"
        assert pointed_at(best) is None
        point(best, "a")  # on a disk, from where the run was copied
        forbid_links(monkeypatch, number)
        for name in ("b", "a"):
            point(best, name)
            assert not best.is_symlink() and best.read_text() == f"{name}\n" and pointed_at(best) == tmp_path / name
        monkeypatch.undo()
        point(best, "b")  # and back
        assert best.is_symlink() and pointed_at(best) == tmp_path / "b"
        assert [path.name for path in tmp_path.iterdir()] == ["best"]

    @pytest.mark.parametrize("content", [b"", b"\n", b"../elsewhere\n", b"\xff\xfe"])
    def test_a_file_without_a_name_stands_for_nothing(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "best").write_bytes(content)
        assert pointed_at(tmp_path / "best") is None

    def test_a_deletion_that_fails_is_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """rclone numbers files anew after a rename, for which rmtree gives up: every deleted checkpoint stayed."""
        (tmp_path / "folder" / "inside").mkdir(parents=True)
        rmtree, calls, pauses = shutil.rmtree, iter(range(100)), list[float]()

        def fails_at_first(path: Path, **options: Any) -> None:
            if path.exists() and next(calls) < 2:
                assert options == {"ignore_errors": True}
            else:
                rmtree(path, **options)

        monkeypatch.setattr(shutil, "rmtree", fails_at_first)
        monkeypatch.setattr("time.sleep", pauses.append)
        remove(tmp_path / "folder")
        assert not list(tmp_path.iterdir()) and len(pauses) == 2


class TestTrial:
    def test_passes_on_a_disk_and_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        try_storage(tmp_path / ".trial-0")
        forbid_links(monkeypatch, errno.EIO)
        try_storage(tmp_path / ".trial-0")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("where", "number", "said"),
        [
            ("os.pwrite", errno.ESPIPE, r"seek in a file that it writes \(Illegal seek\): .*--vfs-cache-mode writes"),
            ("os.ftruncate", errno.EPERM, r"seek in a file .*\(Operation not permitted\): .*--vfs-cache-mode writes"),
            ("os.ftruncate", errno.ENOSPC, r"seek in a file .*\(No space left on device\): free some space"),
            ("os.fsync", errno.EDQUOT, r"replace a file \(Disk quota exceeded\): free some space"),
            ("os.fsync", errno.EINVAL, r"replace a file \(Invalid argument\): train on another file system"),
            ("os.replace", errno.EEXIST, r"replace a file \(File exists\): train on another file system"),
            ("os.mkdir", errno.EROFS, r"make a folder \(Read-only file system\): ask for the right to write there"),
            ("os.unlink", errno.EPERM, r"delete \(Operation not permitted\): train on another file system"),
        ],
    )
    def test_names_what_is_missing_and_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, said: str
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(where, failing(number))
            patch.setattr("time.sleep", lambda _: None)
            with pytest.raises(OSError, match=rf"the storage of {tmp_path} cannot {said}"):
                try_storage(tmp_path / ".trial-0")
        if where != "os.unlink":
            assert not list(tmp_path.iterdir())

    def test_a_rename_that_does_not_replace_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.replace", lambda old, new: None)
        with pytest.raises(OSError, match="cannot replace a file"):
            try_storage(tmp_path / ".trial-0")


def failing(number: int) -> Callable[..., None]:
    """A system call that fails."""

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def forbid_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without symbolic links."""
    monkeypatch.setattr(os, "symlink", failing(number))
