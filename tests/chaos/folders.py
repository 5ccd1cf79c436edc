"""Folders of other people, named by mistake: whatever is typed, nothing in them changes."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from chaos.runs import FINETUNE, PATIENCE, PRETRAIN, Runs, contents, step_checkpoints
from safetensors.torch import save_file

Make = Callable[[Path, Path, random.Random], None]


def hugging_face(folder: Path, run: Path, rng: random.Random) -> None:
    """A downloaded model."""
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    (folder / "preprocessor_config.json").write_text("{}")
    save_file({"head.weight": torch.rand(2, 8)}, folder / "model.safetensors")


def trainer(folder: Path, run: Path, rng: random.Random) -> None:
    """A checkpoint of transformers' Trainer."""
    hugging_face(folder, run, rng)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(rng.randbytes(50))


def torchtitan(folder: Path, run: Path, rng: random.Random) -> None:
    """A checkpoint of torch.distributed.checkpoint."""
    dcp.save({"model": {"weight": torch.rand(3)}}, checkpoint_id=folder, no_dist=True)


def notes(folder: Path, run: Path, rng: random.Random) -> None:
    """Notes and pictures, with a folder that is called as one of ours."""
    (folder / "README.md").write_text("# My notes")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "epoch-3.pth").write_bytes(rng.randbytes(50))


def ours(folder: Path, run: Path, rng: random.Random) -> None:
    """The checkpoints of a run, without the run."""
    folder.rmdir()
    step_checkpoints(run)[-1].parent.rename(folder)


FOLDERS: dict[str, Make] = {make.__name__: make for make in (hugging_face, trainer, torchtitan, notes, ours)}


def foreign_folders(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """Every command that writes into a folder, into each of these."""
    runs.finish(run, "--stop_after", "2")
    source = str(run.with_name("exported.safetensors"))
    process = runs.zygote.start("mimir_fast.export", [str(run), "--format", "safetensors", "--output", source])
    assert process.wait(PATIENCE) == 0, process.said()
    tried = 0
    for name, make in FOLDERS.items():
        folder = run.with_name(name)
        folder.mkdir()
        make(folder, run, rng)
        before = contents(folder)
        assert before
        lines: list[tuple[str, list[str]]] = [
            (job.module, [*job.args, "--output_dir", str(folder), *extra])
            for job in (PRETRAIN, FINETUNE)
            for extra in ([], ["--overwrite"])
        ]
        lines += [
            ("mimir_fast.export", [source, "--format", form, "--output", str(folder), "--overwrite"])
            for form in ("hf", "dcp")
        ]
        lines.append(("mimir_fast.hub", [source, "--output", str(folder)]))
        for module, line in rng.sample(lines, 4):
            process = runs.zygote.start(module, line)
            code, said = process.wait(PATIENCE), process.said()
            assert code == 2 and "Traceback" not in said, f"{module} {line}: {code}: {said}"
            assert contents(folder) == before, f"{module} {line} changed {name}: {said}"
            tried += 1
    return {"somebody else's folder named as the output": tried}
