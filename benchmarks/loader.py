"""Does training wait for its data, and how many JPEG images a second does each loader decode?

Waiting: a ViT-T step fed by the resident loader, beside the same step on a batch that is already there; the loader's
own count of the seconds it made the loop wait is reported as `data-wait`. Decoding: one pass of random-resized-crops
over a folder of real photographs, files to uint8 tensors on the device, beside torchvision's usual pipeline, and the
same images as raw shards.

What an image of 500 × 375 costs on a CPU when its crop becomes 224² (ms of CPU time, in-memory files, two threads, DALI
2.4, 2-core Xeon with AVX-512, interleaved; whole batches of 32):

    decode: PIL 1.24, torchvision 0.89, DALI 0.92, DALI the crop only 0.77
    crop and resize: DALI 1.8 (without antialiasing 1.4, linear 1.1; 0.2 more for flip and CHW), PIL 1.2, ours 0.39

So on a CPU DALI only decodes, and our fused crop follows: 1.2 ms instead of 2.8. What else was tried for DALI: the fast
IDCT (no faster; other pixels, by up to 17 of 255), 3 and 4 threads, affinity, a queue of 4, the older executor, its
output as DLPack without a copy (none more than 7 %); no decoding at reduced size (DALI offers none, and crops are
less than twice the output). Raw shards need no decoding at all.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider, Size, finite
from benchmarks.training import build_model, method_step
from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.loaders import Loader
from mimir_fast.data.prepare import prepare
from mimir_fast.data.prepare_config import PrepareConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.models.masked_model import ModelConfig

SIDE = 224
BATCH: dict[Size, int] = {"tiny": 4, "quick": 32, "full": 128, "gpu": 1024}
FILES: dict[Size, int] = {"tiny": 8, "quick": 256, "full": 512, "gpu": 512}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """The cases: what a training loop waits for, then what decoding alone costs."""
    yield waiting_case(device, BATCH[size])
    with tempfile.TemporaryDirectory() as folder:
        photographs, prepared = Path(folder, "jpeg"), Path(folder, "raw")
        write_photographs(photographs, FILES[size])
        prepare(PrepareConfig(str(photographs), str(prepared), splits=("train",)))
        yield decoding_case(device, photographs, prepared, FILES[size])


def waiting_case(device: torch.device, batch: int) -> Case:
    """MIMIR of ViT-T/4 on 32² digits, as the recipe digits/mimir_vit_tiny has it."""
    model = build_model(ModelConfig(encoder="tiny", patch_size=4), 32, device)
    config = DataConfig(source="digits", image_size=32, augment="pad_crop", crop_padding=2, flip=False)
    loader = build_loader(config, split="train", batch_size=batch, device=device)
    batches, fixed = iter(loader), next(iter(build_loader(config, split="train", batch_size=batch, device=device)))
    step = method_step(model, Mimir(MimirConfig()), bf16=device.type == "cuda")
    elapsed: list[float] = []

    def fed(_: object) -> Outputs:
        started = time.perf_counter()
        outputs = step(next(batches))
        elapsed.append(time.perf_counter() - started)
        return outputs

    def waiting() -> dict[str, float]:
        """In per cent of the steps' time (on a GPU: of the time to queue them, which is no less)."""
        return {"data-wait %": 100 * loader.wait_seconds / sum(elapsed)}

    return Case(
        "data_wait",
        {"encoder": "tiny", "image": 32, "patch": 4, "batch": batch, "loader": "resident"},
        [
            Provider("mimir_fast resident loader + step", fed, law=finite, report=waiting),
            Provider("step on a batch that is there", lambda _: step(fixed), law=finite),
        ],
        baseline="step on a batch that is there",
        items=batch,
        memory=False,
    )


def decoding_case(device: torch.device, folder: Path, prepared: Path, num_files: int) -> Case:
    """One pass over the files, in batches of 32; `prepared` holds the same images as raw shards."""
    workers, batch = min(16, os.cpu_count() or 1), min(32, num_files)

    def ours(kind: Literal["dali", "torch", "raw"]) -> Loader:
        source, root = ("raw", prepared) if kind == "raw" else ("folder", folder)
        config = DataConfig(
            source=source, root=str(root), image_size=SIDE, augment="resized_crop", loader=kind, num_workers=workers
        )
        return build_loader(config, split="train", batch_size=batch, device=device, shuffle=False, augment=True)

    def provider(
        name: str, build: Callable[[], Iterable[Any]], images_of: Callable[[Any], Tensor], note: str
    ) -> Provider:
        """Built at first use: worker processes are costly and a missing library must fail this provider alone."""
        built = cache(build)

        def one_pass(_: object) -> Outputs:
            shapes = [images_of(piece).to(device).shape for piece in built()]
            return torch.tensor(sum(shape[0] for shape in shapes)), torch.tensor(sum(shape.numel() for shape in shapes))

        return Provider(name, one_pass, note=note)

    def loader(name: str, kind: Literal["dali", "torch", "raw"], note: str = "") -> Provider:
        return provider(f"mimir_fast {name}", partial(ours, kind), lambda batch: batch.images, note)

    return Case(
        "jpeg_decoding",
        {"files": num_files, "crop": SIDE, "batch": batch, "workers": workers},
        [
            loader("DALI", "dali"),
            loader("torch workers", "torch"),
            loader("raw shards", "raw", note="prepared once, 256 pixels, uint8"),
            provider(
                "torchvision ImageFolder",
                partial(usual_pipeline, folder, batch, workers),
                itemgetter(0),
                note="PIL, RandomResizedCrop, DataLoader",
            ),
        ],
        baseline="torchvision ImageFolder",
        reference=lambda _: (torch.tensor(num_files), torch.tensor(num_files * 3 * SIDE * SIDE)),
        items=num_files,
        memory=False,
    )


def usual_pipeline(folder: Path, batch: int, workers: int) -> "torch.utils.data.DataLoader[tuple[Tensor, int]]":
    """What a fine-tuning script has."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder / "train"), transform), batch, num_workers=workers, persistent_workers=True
    )


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of ImageNet's usual size (500 × 375, quality 90), cut from the two photographs of scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    for index in range(count):
        photograph = photographs[index % 2]
        left, top = 7 * index % (photograph.width - 500), 3 * index % (photograph.height - 375)
        path = folder / "train" / f"class{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + 500, top + 375)).save(path, quality=90)
