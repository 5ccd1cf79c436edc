"""Damaged and foreign files: one line with the true reason and what to do, whatever is done with them."""

import argparse
import collections
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save, save_file
from torch import Tensor
from weight_cases import vit

from mimir_fast.cli import exit_on_error
from mimir_fast.export import ExportConfig, export
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, classifier_of, load_classifier
from mimir_fast.models.loading import initialize
from mimir_fast.models.weight_files import WeightsError, read_weights

STATE: dict[str, Tensor] = dict(vit().state_dict())
QKV = "blocks.0.attn.qkv.weight"
Content = Any


class Runs:
    """Creates a file when it is unpickled, as any code could."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class Stranger:
    """A class that no reader of weights knows."""


def pickled(content: Content) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def legacy(content: Content) -> bytes:
    """As torch.save wrote it before 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def changed(**tensors: Any) -> dict[str, Any]:
    """A whole state dict with some tensors replaced; `__` stands for a dot, None takes one away."""
    named = STATE | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def with_qkv(tensor: Any) -> dict[str, Any]:
    return STATE | {QKV: tensor}


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in STATE.items()}


def header(text: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    return struct.pack("<Q", len(text)) + text + data


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


SAFE, ZIP = save(STATE), pickled({"model": STATE})
F8 = STATE[QKV].to(torch.float8_e4m3fn)

# what it is: (bytes, what the message says)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty .0 bytes.: copy or download it again"),
    "zeros": (bytes(4096), "zeros only"),
    "text": (b"hello, these are my weights", "no file of weights: it begins with"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "web page, lower case": (b"<html><head></head></html>", "web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "JSON": (b'{"a": 1}', "is JSON"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "GGUF": (b"GGUF" + bytes(64), "GGUF"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "gunzip"),
    "bzip2": (b"BZh9" + b"1" * 64, "bunzip2"),
    "xz": (b"\xfd7zXZ\x00" + bytes(64), "unxz"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "7z archive"),
    "NumPy array": (b"\x93NUMPY\x01\x00" + bytes(64), "NumPy array"),
    "tar": (tarred(), "tar archive: unpack it"),
    "torch, cut in the middle": (ZIP[: len(ZIP) // 2], "truncated"),
    "torch, last bytes missing": (ZIP[:-10], "truncated"),
    "torch, first bytes only": (ZIP[:100], "truncated"),
    "torch, bytes changed": (ZIP[:64] + b"\xff" * 200 + ZIP[264:], "truncated"),
    "legacy torch, cut": (legacy(STATE)[:5000], "truncated"),
    "zip without data.pkl": (zipped(readme_dot_txt=b"hi"), r"zip archive without data.pkl .readme.txt"),
    "zip around a file": (zipped(model_dot_pth=ZIP), "unpack it"),
    "empty zip": (zipped(), "without data.pkl|truncated"),
    "NumPy archive": (zipped(w_dot_npy=b"x"), "NumPy archive .JAX"),
    "TorchScript": (zipped(m__code__a_dot_py=b"", m__data_dot_pkl=b""), "TorchScript program"),
    "zip with an empty pickle": (zipped(a__data_dot_pkl=b""), "truncated or not"),
    "safetensors, cut": (SAFE[: len(SAFE) // 2], "no whole safetensors"),
    "safetensors, last byte missing": (SAFE[:-1], "no whole safetensors"),
    "safetensors, header no JSON": (header(b"{nothing"), "no whole safetensors"),
    "safetensors, shape lies": (
        header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4)), "no whole safetensors"),
    "safetensors, offsets lie": (
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', bytes(4)), "no whole safetensors"),
    "safetensors, unknown dtype": (
        header(b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "no whole safetensors"),
    "safetensors, header longer than the file": (struct.pack("<Q", 10**9) + b"{}", "no whole safetensors"),
    "safetensors without tensors": (save({}), "no tensors at all"),
    "ours, config no JSON": (save(STATE, {"format": "mimir_fast", "config": "{no"}), "metadata `config`"),
    "ours, config missing": (save(STATE, {"format": "mimir_fast"}), "metadata `config`"),
    "ours, config a number": (save(STATE, {"format": "mimir_fast", "config": "3"}), "no table of options"),
    "a list": (pickled([1, 2]), "no named tensors, it is a list"),
    "a tensor": (pickled(torch.zeros(3)), "no named tensors, it is a Tensor"),
    "no tensors": (pickled({"epoch": 3, "args": argparse.Namespace(lr=1)}), "no tensors at all, only epoch, args"),
    "an optimizer": (pickled({"optimizer": {"state": {}, "param_groups": []}}), "no tensors at all"),
    "a stranger's class": (pickled({"model": STATE, "config": Stranger()}), r"wants to create .*Stranger"),
    "a whole module": (pickled(torch.nn.Linear(2, 2)), r"wants to create torch.nn.modules.linear.Linear"),
    "a plain pickle of a class": (pickle.dumps({"a": Stranger()}), r"wants to create .*Stranger"),
    "a defaultdict": (pickled({"a": collections.defaultdict(dict)}), "wants to create collections.defaultdict"),
    "another network": (pickled({"conv1.weight": torch.zeros(2, 2)}), "no vision transformer: it has 1 tensor, such"),
    "renamed layers": (pickled(renamed("blocks.", "layers_")), "no encoder of ours"),
    "renamed attention": (pickled(renamed(".attn.qkv.", ".attn.to_qkv.")), "no encoder of ours"),
    "a layer missing": (pickled(changed(blocks__1__mlp__fc1__weight=None)), r"blocks\.1\.mlp\.fc1\.weight"),
    "positions missing": (pickled(changed(pos_embed=None)), "pos_embed"),
    "a cls token without its dimensions": (pickled(changed(cls_token=torch.zeros(64))), "no encoder of ours"),
    "a tensor too many": (pickled(changed(blocks__0__attn__gate=torch.ones(1))), r"blocks\.0\.attn\.gate"),
    "a layer of another width": (
        pickled(changed(blocks__1__mlp__fc1__weight=torch.zeros(8, 8))), r"blocks\.1\.mlp\.fc1"),
    "positions of no square": (pickled(changed(pos_embed=torch.zeros(1, 14, 64))), "pos_embed"),
    "int8": (pickled(with_qkv(STATE[QKV].to(torch.int8))), rf"{QKV} holds int8"),
    "complex": (pickled(with_qkv(STATE[QKV].to(torch.complex64))), rf"{QKV} holds complex64"),
    "fp8": (save(with_qkv(F8)), rf"{QKV} holds float8_e4m3fn"),
    "bool": (pickled(with_qkv(STATE[QKV] > 0)), rf"{QKV} holds bool"),
    "meta tensors": (pickled({n: t.to("meta") for n, t in STATE.items()}), "a shape and no numbers"),
    "sparse": (pickled(with_qkv(STATE[QKV].to_sparse())), rf"{QKV} is quantised or sparse"),
    "quantised": (
        pickled(with_qkv(torch.quantize_per_tensor(STATE[QKV], 0.1, 0, torch.qint8))), rf"{QKV} is quantised"),
    "two models": (
        pickled({"actor": STATE, "critic": {n: t + 1 for n, t in STATE.items()}}),
        "2 encoders: actor, critic.*--init_part"),
    "parametrised": (
        pickled(renamed("qkv.weight", "qkv.parametrizations.weight.original0")), "remove the parametrisation"),
    "FSDP's flat parameters": (
        pickled(STATE | {"blocks.0._flat_param": torch.zeros(9)}), "FULL_STATE_DICT"),
}  # fmt: skip


def judge(path: Path) -> None:
    """Whatever reads weights: evaluation, export, fine-tuning."""
    weights = read_weights(path)
    classifier_of(weights)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FILES)
def test_one_line_with_the_true_reason(what: str, tmp_path: Path) -> None:
    content, wanted = FILES[what]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    model = build_classifier(ClassifierConfig(global_pool="cls", patch_size=8, options=("width=64", "depth=2")), 32, 5)
    output = tmp_path / "new" / "encoder.safetensors"
    actions: tuple[Callable[[], Any], ...] = (
        lambda: judge(path),
        lambda: initialize(model, path),
        lambda: export(ExportConfig(str(path), str(output))),
    )
    for action in actions:
        with pytest.raises(WeightsError, match=wanted) as error:
            action()
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and str(path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


def test_a_command_ends_with_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimir_fast.cli.leave_at_once", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(SystemExit) as left:
        exit_on_error(lambda: export(ExportConfig(str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"))) and None)
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_nan_is_said_and_evaluated_but_not_trained(tmp_path: Path) -> None:
    save_file(with_qkv(STATE[QKV] * torch.nan), tmp_path / "nan.safetensors")
    _, report = classifier_of(read_weights(tmp_path / "nan.safetensors"))
    assert any(f"{QKV} holds NaN" in note for note in report.notes)
    model = build_classifier(ClassifierConfig(global_pool="cls", patch_size=8, options=("width=64", "depth=2")), 32, 5)
    with pytest.raises(WeightsError, match=f"{QKV} holds NaN"):
        initialize(model, tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (b"{", "no index of weights"),
        (b"[]", "no index of weights"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}).encode(), "gone.safetensors, which is not beside it"),
        (json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode(), "wanted names of files beside it"),
        (json.dumps({"weight_map": {"a": "x.safetensors"}}).encode(), "a .1 in all. should be in x.safetensors"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, index: bytes, wanted: str) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(WeightsError, match=wanted):
        read_weights(tmp_path / "model.safetensors.index.json")


def test_the_part_is_asked_for(tmp_path: Path) -> None:
    torch.save({"actor": STATE, "critic": {n: t + 1 for n, t in STATE.items()}}, tmp_path / "two.pth")
    for part, shift in (("actor", 0), ("critic", 1)):
        found = read_weights(tmp_path / "two.pth", part=part)
        assert torch.equal(found.tensors["cls_token"], STATE["cls_token"] + shift) and found.facts.part == part
    with pytest.raises(WeightsError, match=r"no part 'critik'; did you mean critic"):
        read_weights(tmp_path / "two.pth", part="critik")


def test_numbers_of_half_precision_are_taken(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({name: tensor.to(dtype) for name, tensor in STATE.items()}, tmp_path / "half.pth")
        assert load_classifier(tmp_path / "half.pth").head.weight.dtype == torch.float32


def test_paths_of_any_python_and_system(tmp_path: Path) -> None:
    """Python 3.13 pickles a path as pathlib._local.PosixPath, Windows as WindowsPath."""
    content = pickled({"model": STATE, "args": argparse.Namespace(out=Path("/x"))})
    for name in (b"pathlib._local\nPosixPath", b"pathlib\nWindowsPath", b"pathlib._local\nWindowsPath"):
        source = zipfile.ZipFile(io.BytesIO(content))
        with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
            for member in source.namelist():
                data = source.read(member)
                if member.endswith("data.pkl"):
                    assert b"pathlib\nPosixPath" in data
                    data = data.replace(b"pathlib\nPosixPath", name)
                archive.writestr(member, data)
        assert len(read_weights(tmp_path / "other.pth").tensors) == len(STATE)


class TestDcp:
    """Folders of torch.distributed.checkpoint, whose list of tensors is a pickle."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        dcp.save({"model": {"blocks.0.norm1.weight": torch.ones(4)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        return tmp_path / "dcp"

    def test_runs_no_code(self, folder: Path) -> None:
        (folder / ".metadata").write_bytes(pickle.dumps({"tensors": Runs(folder / "ran")}))
        with pytest.raises(WeightsError, match=r"is not loaded: it wants to create pathlib\.Path\.touch"):
            read_weights(folder)
        assert not (folder / "ran").exists()

    @pytest.mark.parametrize("place", ["../outside", "/etc/passwd"])
    def test_reads_in_its_folder_only(self, folder: Path, place: str) -> None:
        listed = pickle.loads((folder / ".metadata").read_bytes())
        for info in listed.storage_data.values():
            info.relative_path = place
        (folder / ".metadata").write_bytes(pickle.dumps(listed))
        with pytest.raises(WeightsError, match="wanted names of files in its folder"):
            read_weights(folder)

    def test_damage_is_said(self, folder: Path) -> None:
        whole = (folder / ".metadata").read_bytes()
        for content in (whole[:-20], b"", b"text", pickle.dumps([1])):
            (folder / ".metadata").write_bytes(content)
            with pytest.raises(WeightsError, match="copy the folder again"):
                read_weights(folder)
        (folder / ".metadata").unlink()  # as `cp folder/* elsewhere` leaves it out
        with pytest.raises(WeightsError, match=r"has no \.metadata, .*hidden files too"):
            read_weights(folder)
        (folder / ".metadata").write_bytes(whole)
        next(folder.glob("*.distcp")).unlink()
        with pytest.raises(WeightsError, match=r"cannot be read .*copy the whole folder again"):
            read_weights(folder)
