"""How long a start takes to know its data where there are as many files as in ImageNet-1k.

python tests/chaos/startup.py [--files 1281167] [--folder /tmp/startup]

The files are hard links to one small JPEG a class: a million names to list, and no disk filled. Each start is a new
process; the page cache is warm.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 1000


def make(root: Path, num_files: int) -> None:
    """root/train and a small root/val."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 30)).save(content, "JPEG")
    for split, count in (("train", -(-num_files // CLASSES)), ("val", 1)):
        for number in range(CLASSES):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / f"{folder.name}_0.JPEG").write_bytes(content.getvalue())
            for image in range(1, count):
                os.link(folder / f"{folder.name}_0.JPEG", folder / f"{folder.name}_{image}.JPEG")


def start(root: str, rank: int, ranks: int) -> dict[str, float]:
    """Seconds for the imports, then for source, order and loader, then for the first batch."""
    times = [time.perf_counter()]
    from mimir_fast.data import DataConfig, build_loader

    times.append(time.perf_counter())
    config = DataConfig(source="folder", root=root, loader="torch", num_workers=1, image_size=32, resident_gib=0)
    loader = build_loader(config, split="train", batch_size=8, rank=rank, world_size=ranks)
    times.append(time.perf_counter())
    next(iter(loader))
    times.append(time.perf_counter())
    loader.close()
    names = ("imports", "index_and_loader", "first_batch")
    return {name: round(after - before, 3) for name, before, after in zip(names, times, times[1:], strict=False)}


def starts(root: Path, ranks: int) -> list[dict[str, float]]:
    """All ranks at the same time."""
    line = [sys.executable, __file__, "--start", str(root), "--ranks", str(ranks), "--rank"]
    processes = [subprocess.Popen([*line, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
    found = [json.loads(process.communicate()[0]) for process in processes]
    assert not any(process.returncode for process in processes)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_281_167)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, options.rank, options.ranks)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        make(root, options.files)
        print("first start, two ranks at once:", starts(root, 2))
        print("second start, one rank:", starts(root, 1))
        print("second start, two ranks at once:", starts(root, 2))
        shutil.rmtree(root / ".mimir_fast")
        print("first start, one rank:", starts(root, 1))


if __name__ == "__main__":
    main()
