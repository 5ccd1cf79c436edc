"""Command lines of every command that cannot be meant, with files that are not what they should be: written by hand.

Each line stands with what its message must name. `{x}` is one of the files of `bad_files`; a line runs in a folder that
holds them, and leaves nothing there.
"""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np

TINY = "--model.encoder nano --model.patch_size 8 --data.limit 32 --batch_size 16 --max_steps 1 --device cpu"

_PRETRAIN = f"pretrain {TINY} --output_dir new "
_FINETUNE = f"finetune {TINY} --output_dir new "

LINES: tuple[tuple[str, str], ...] = (
    # names
    ("pretrain --recipe", "recipe"),
    ('pretrain --recipe "" --output_dir new', "recipe"),
    ('finetune --recipe "" --output_dir new', "recipe"),
    ("pretrain --recipe digits/pgd_vit_nano --output_dir new", "digits/pgd_vit_nano"),
    ("finetune --recipe digits/mimir_vit_nano --output_dir new", "digits/mimir_vit_nano"),
    ("finetune --recipe digits/pgd_vit_nana --output_dir new", "digits/pgd_vit_nana"),
    ("pretrain --recipe digits/mimir_vit_nano --recipe digits/nope --output_dir new", "digits/nope"),
    ("finetune --recipe digits/pgd_vit_nano --recipe=digits/nope --output_dir new", "digits/nope"),
    ("pretrain --method pgd --output_dir new", "pgd"),
    ("finetune --method mimir --output_dir new", "mimir"),
    ("pretrain --preset fast --output_dir new", "fast"),
    (_PRETRAIN + "--import nope", "nope"),
    (_PRETRAIN + "--data.source nope", "nope"),
    (_PRETRAIN + "--model.family nope", "nope"),
    (_PRETRAIN + "--freeze nope", "nope"),
    (_FINETUNE + "--freeze nope", "nope"),
    (_PRETRAIN + "--device cuda:99", "cuda"),
    (_PRETRAIN + "--device cuda", "cuda"),
    (_PRETRAIN + "--strategy fsdp", "fsdp"),
    # sizes and ranges that only the data or the model can judge
    (_PRETRAIN + "--batch_size 1", "batch_size"),
    (_PRETRAIN + "--batch_size 0", "batch_size"),
    (_PRETRAIN + "--accum_iter 0", "accum_iter"),
    (_PRETRAIN + "--accum_iter 17", "accum_iter"),
    (_PRETRAIN + "--data.crop_padding 100000", "crop_padding"),
    (_PRETRAIN + "--data.crop_padding -1", "crop_padding"),
    (_PRETRAIN + "--data.image_size 0", "image_size"),
    (_PRETRAIN + "--data.image_size 30", "image size 30"),
    (_PRETRAIN + "--data.channels 2", "channels"),
    (_PRETRAIN + "--data.limit 0", "limit"),
    (_PRETRAIN + "--data.num_workers -1", "num_workers"),
    (_PRETRAIN + "--data.read_threads 0", "read_threads"),
    (_PRETRAIN + "--data.crop_scale 1 0.2", "crop_scale"),
    (_PRETRAIN + "--data.crop_scale 0 1", "crop_scale"),
    (_PRETRAIN + "--data.crop_ratio 2 1", "crop_ratio"),
    (_PRETRAIN + "--data.generated_ratio 0.5", "generated"),
    (_PRETRAIN + "--data.resident_gib -1", "resident_gib"),
    (_PRETRAIN + "--data.hw_decoder_load 2", "hw_decoder_load"),
    (_PRETRAIN + "--data.max_bad_files -1", "max_bad_files"),
    (_PRETRAIN + "--model.patch_size 0", "patch_size"),
    (_PRETRAIN + "--model.patch_size 7", "patch"),
    (_PRETRAIN + "--model.patch_size 64", "patch"),
    (_PRETRAIN + "--mask_ratio 0", "mask_ratio"),
    (_PRETRAIN + "--mask_ratio 1", "mask_ratio"),
    (_PRETRAIN + "--mask_ratio 1.5", "mask_ratio"),
    (_PRETRAIN + "--epochs 0", "epochs"),
    (_PRETRAIN + "--warmup_epochs -1", "warmup_epochs"),
    (_PRETRAIN + "--max_steps 0", "max_steps"),
    (_PRETRAIN + "--stop_after 0", "stop_after"),
    (_PRETRAIN + "--micro_batch 0", "micro_batch"),
    (_PRETRAIN + "--seed -1", "seed"),
    (_PRETRAIN + "--seed 1e3", "seed"),
    (_PRETRAIN + "--keep_last 0", "keep_last"),
    (_PRETRAIN + "--keep_every -1", "keep_every"),
    (_PRETRAIN + "--max_bad_steps 0", "max_bad_steps"),
    (_PRETRAIN + "--save_minutes -1", "save_minutes"),
    (_PRETRAIN + "--profile -1", "profile"),
    (_PRETRAIN + "--ema_decay 1.5", "ema_decay"),
    (_PRETRAIN + "--clip_grad 0", "clip_grad"),
    (_PRETRAIN + "--betas 0.9 1.5", "betas"),
    (_PRETRAIN + "--betas 0.9", "betas"),
    (_PRETRAIN + "--lr 0", "lr"),
    (_PRETRAIN + "--weight_decay -1", "weight_decay"),
    (_PRETRAIN + "--optimizer adam_w", "adam_w"),
    (_PRETRAIN + "--attack.eps 8", "8/255"),
    (_PRETRAIN + "--attack.eps -1/255", "eps"),
    (_PRETRAIN + "--lr 1e-3 --blr 1e-3", "blr"),
    (_PRETRAIN + "--no_resume --overwrite --resume maybe", "maybe"),
    (_PRETRAIN + "stray", "stray"),
    # data that is not there, or not what it should be
    (_PRETRAIN + "--data.source folder", "root"),
    (_PRETRAIN + "--data.source folder --data.root nope", "nope"),
    (_PRETRAIN + "--data.source folder --data.root {empty}", "empty"),
    (_PRETRAIN + "--data.source folder --data.root {text}", "notes.txt"),
    (_PRETRAIN + "--data.source imagenet --data.root {empty}", "empty"),
    (_PRETRAIN + "--data.source raw --data.root {empty}", "empty"),
    (_PRETRAIN + "--data.source raw --data.root {bad_manifest}", "bad_manifest"),
    (_PRETRAIN + "--data.source raw --data.root {list_manifest}", "list_manifest"),
    (_PRETRAIN + "--data.source webdataset --data.root {empty}", "empty"),
    (_PRETRAIN + "--data.source cifar10 --data.root {empty}", "empty"),
    (_PRETRAIN + "--data.source fashion_mnist --data.root {empty}", "empty"),
    (_PRETRAIN + "--data.generated nope.npz", "nope.npz"),
    (_PRETRAIN + "--data.generated {text}", "notes.txt"),
    (_PRETRAIN + "--data.generated {empty_file}", "empty.pth"),
    (_PRETRAIN + "--data.generated {negative_labels}", "negative_labels.npz"),
    (_FINETUNE + "--data.generated {no_labels}", "no_labels.npz"),
    (_FINETUNE + "--data.generated {negative_labels}", "negative_labels.npz"),
    (_FINETUNE + "--data.generated {large_labels}", "large_labels.npz"),
    (_FINETUNE + "--data.generated {float_labels}", "float_labels.npz"),
    (_FINETUNE + "--data.generated {few_labels}", "few_labels.npz"),
    (_FINETUNE + "--data.generated {float_images}", "float_images.npz"),
    (_FINETUNE + "--data.generated {no_images}", "no_images.npz"),
    (_FINETUNE + "--data.generated {empty}", "empty"),
    # weights that are not there, or not what they should be
    *((f"{command} {option} {file}", name)
      for command, option in ((_PRETRAIN, "--init"), (_FINETUNE, "--init"), ("evaluate", "--checkpoint"),
                              ("probe", "--checkpoint"), ("hub", "--output new"),
                              ("export", "--output new.safetensors"))
      for file, name in (("nope.pth", "nope.pth"), ("{empty_file}", "empty.pth"), ("{text}", "notes.txt"),
                         ("{text_pth}", "text.pth"), ("{bad_tensors}", "bad.safetensors"), ("{empty}", "empty"),
                         ("{cut_run}", "cut_run"), ("{bad_json}", "bad.json"), ("timm:nope", "nope"))),
    (_PRETRAIN + "--init_part encoder", "init"),
    (_FINETUNE + "--init_weights ema", "init"),
    (_FINETUNE + "--init_image_size 64", "init"),
    # evaluations, probings, comparisons, exports
    ("evaluate", "checkpoint"),
    ("evaluate --checkpoint nope.pth --suite everything", "everything"),
    ("evaluate --checkpoint nope.pth --eps 8", "8/255"),
    ("evaluate --checkpoint nope.pth --eps", "eps"),
    ("evaluate --checkpoint nope.pth --limit 0", "limit"),
    ("evaluate --checkpoint nope.pth --batch_size 0", "batch_size"),
    ("evaluate --checkpoint {classifier} --transfer_from nope.pth --limit 8 --device cpu --output_dir new", "nope"),
    ("evaluate --checkpoint {classifier} --device cuda --output_dir new", "cuda"),
    ("evaluate --checkpoint {classifier} --data.source folder --data.root nope --output_dir new", "nope"),
    ("probe", "checkpoint"),
    ("probe --checkpoint {encoder} --probes", "probes"),
    ("probe --checkpoint {encoder} --probes nope", "nope"),
    ("probe --checkpoint {encoder} --label_fractions 2", "label_fractions"),
    ("probe --checkpoint {encoder} --label_fractions 0", "label_fractions"),
    ("probe --checkpoint {encoder} --neighbours 0", "neighbours"),
    ("probe --checkpoint {encoder} --against nope.pth --output_dir new --device cpu", "nope.pth"),
    ("probe --checkpoint {encoder} --limit 0", "limit"),
    ("compare", "evaluations"),
    ("compare nope", "nope"),
    ("compare {empty}", "empty"),
    ("compare {list_json}", "list.json"),
    ("compare {bad_json}", "bad.json"),
    ("compare {number_json}", "number.json"),
    ("compare {binary_json}", "binary.json"),
    ("compare {empty_file}", "empty.pth"),
    ("compare {object_json}", "object.json"),
    ("compare {cut_run}", "cut_run"),
    ("compare nope --format pdf", "pdf"),
    ("export", "output"),
    ("export {encoder}", "output"),
    ("export {encoder} --output new.txt", "new.txt"),
    ("export {encoder} --format nope --output new.safetensors", "nope"),
    ("export {encoder} --format onnx --output new.safetensors", "new.safetensors"),
    ("export {encoder} --format safetensors --output {folder_tensors}", "folder.safetensors"),
    ("export {encoder} --format safetensors --output {folder_tensors} --overwrite", "folder.safetensors"),
    ("export {encoder} --format hf --output {full} --overwrite", "full"),
    ("export {encoder} --format hf --output {text} --overwrite", "notes.txt"),
    ("export {encoder} --format safetensors --output {text}/new.safetensors", "notes.txt"),
    ("export {encoder} --format timm --output new.safetensors --mean 0.5", "mean"),
    ("export {encoder} --format safetensors --output new.safetensors --domain clean", "domain"),
    ("hub", "source"),
    ("hub {encoder}", "output"),
    ("hub {encoder} --output new --results nope.json", "nope.json"),
    ("hub {encoder} --output new --results {list_json}", "list.json"),
    ("hub {encoder} --repo_id a/b/c/d", "a/b/c/d"),
    ("reproduce", "digits_demo"),
    ("reproduce nope", "nope"),
    ("reproduce digits_demo --output_dir new --device gpu", "gpu"),
    ("reproduce digits_demo --output_dir new --max_steps 0", "max_steps"),
    ("reproduce digits_demo --output_dir new --autoattack_images -1", "autoattack_images"),
    ("reproduce fashion_ablation --output_dir new --seeds 0", "seeds"),
    ("reproduce fashion_ablation --output_dir new --seeds -1", "seeds"),
    ("reproduce fashion_ablation --output_dir new --size huge", "huge"),
    ("reproduce fashion_ablation --output_dir new --rows nope", "nope"),
    ("reproduce fashion_ablation --output_dir new --device gpu", "gpu"),
    ("reproduce faster --output_dir new --seeds 0", "seeds"),
    ("reproduce faster --output_dir new --attack_seeds 0", "attack_seeds"),
    ("reproduce faster --output_dir new --data nope", "nope"),
    ("recipes lost", "lost"),
    ("recipes list a b", "b"),
)  # fmt: skip


def bad_files(folder: Path) -> dict[str, str]:
    """Make them in `folder`; name → path from there."""
    from mimir_fast.checkpoints.saving import save_checkpoint
    from mimir_fast.models.classifier import ClassifierConfig, build_classifier
    from mimir_fast.models.file_names import to_files
    from mimir_fast.models.masked_model import ModelConfig, build_masked_model

    names = {
        "text": "notes.txt", "text_pth": "text.pth", "empty_file": "empty.pth", "bad_tensors": "bad.safetensors",
        "list_json": "list.json", "bad_json": "bad.json", "number_json": "number.json", "binary_json": "binary.json",
        "object_json": "object.json", "folder_tensors": "folder.safetensors",
    }  # fmt: skip
    contents = {
        "notes.txt": b"notes\n", "text.pth": b"weights\n", "empty.pth": b"", "bad.safetensors": b"\xff" * 100,
        "list.json": b"[]", "bad.json": b'{"a": ', "number.json": b"7", "binary.json": b"\xff\xfe\x00",
        "object.json": b"{}",
        "folder.safetensors/mine.txt": b"mine", "full/mine.txt": b"mine", "bad_manifest/train.json": b"{",
        "list_manifest/train.json": b"[]", "cut_run/config.json": b'{"format": "mimir_fast.run", ',
        "cut_run/checkpoints/step-00000001/meta.json": b"{",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    images, labels = np.zeros((64, 32, 32, 1), np.uint8), np.zeros(64, np.int64)
    arrays = {
        "no_labels": {"image": images}, "no_images": {"label": labels},
        "negative_labels": {"image": images, "label": labels - 1},
        "large_labels": {"image": images, "label": labels + 10}, "few_labels": {"image": images, "label": labels[:3]},
        "float_labels": {"image": images, "label": labels + 0.5},
        "float_images": {"image": images / 1.0, "label": labels},
    }  # fmt: skip
    for name, held in arrays.items():
        np.savez(folder / f"{name}.npz", **held)
    models = {
        "encoder": ("pretrain", build_masked_model(ModelConfig(encoder="nano", patch_size=8), image_size=32)),
        "classifier": ("finetune", build_classifier(ClassifierConfig(encoder="nano", patch_size=8), 32, 10)),
    }
    for name, (kind, model) in models.items():
        tensors = {f"model/{n}": t.detach() for n, t in to_files(model, model.state_dict()).items()}
        save_checkpoint(
            folder / name / "checkpoints" / "step-00000001", tensors, {"step": 1, "kind": kind, "config": {}}
        )
    others = ("empty", "full", "bad_manifest", "list_manifest", "cut_run", *models)
    return names | {name: f"{name}.npz" for name in arrays} | {name: name for name in others}


def contents_of(folder: Path) -> dict[str, int]:
    """All that is in a folder, with sizes."""
    return {str(path.relative_to(folder)): path.stat().st_size * path.is_file() for path in folder.rglob("*")}


def run_here(words: list[str]) -> tuple[int | str | None, str]:
    """A command of ours in this process and folder: its exit status and what it said on both streams."""
    said = io.StringIO()
    code: int | str | None = 0
    with patch.object(sys, "argv", ["mimir_fast", *words[1:]]), redirect_stdout(said), redirect_stderr(said):
        try:
            runpy.run_module(f"mimir_fast.{words[0]}", run_name="__main__", alter_sys=False)
        except SystemExit as stop:
            code = stop.code
    return code, said.getvalue()
