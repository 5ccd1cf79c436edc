"""What data to read and how: its typed configuration.

Plain Python on purpose: importing it loads neither numpy nor an image library; making one loads the sources' files.
"""

from dataclasses import dataclass
from typing import Literal

from mimir_fast.data.registry import SOURCES, reads_root
from mimir_fast.sizes import Size, as_size, height_width, typed
from mimir_fast.validation import check_fields, without

LOADERS = ("auto", "resident", "torch", "dali", "raw")
MAX_SIDE = 8192  # of three channels 0.8 GB in fp32: more is a slip of the hand, and would fill the memory
AUGMENTATIONS = ("pad_crop", "resized_crop", "none")


@dataclass
class DataConfig:
    """One data set and the way it reaches the model."""

    source: str = "digits"
    """digits, fashion_mnist, idx, cifar10, cifar100, tiny_imagenet, imagenet, folder, images (any folder, zip or tar of
    images, without labels), webdataset, parquet (Hugging Face's folders), raw (what `python -m mimir_fast.data.prepare`
    wrote: uint8 images mapped into memory, the fastest), or one that a module of yours registers (--import)"""
    root: str | None = None
    """where the files lie; a brace pattern of tar shards for webdataset; not needed for digits and fashion_mnist. A run
    goes on where they were moved to, if classes and file names are the same"""
    image_size: Size = 32
    """pixels along a side of the images a batch holds; two numbers, height and width, where they are not square"""
    channels: int = 3
    """1 or 3; grey is repeated to colour, colour is weighed to luminance"""
    loader: Literal["auto", "resident", "torch", "dali", "raw"] = "auto"
    """how images come, not which: all give the same pixels on a CPU (DALI on a GPU rounds otherwise). auto: resident
    when the decoded data set fits resident_gib, raw for source raw, else DALI when installed (GPU), else torch
    workers"""
    num_workers: int = 4
    """processes of a rank that read files (torch) or read and parse them (dali), threads that read ahead (raw); 0 works
    in the main process"""
    read_threads: int = 1
    """files that each process of the torch loader reads at a time; 8 or more hide the delay of a network disk"""
    augment: Literal["pad_crop", "resized_crop", "none"] = "pad_crop"
    """pad_crop: shift by up to crop_padding, zeros outside; resized_crop: random area and ratio, bicubic"""
    crop_padding: int = 4
    """largest shift of pad_crop in pixels"""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """area of a resized_crop as a part of the image's area"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """width / height of the part that a resized_crop cuts out, whatever the shape of the result"""
    flip: bool = True
    """mirror half of the images; turn it off for digits and letters"""
    generated: str | None = None
    """npz of generated images (EDM: arrays `image` and `label`) mixed into the training split"""
    generated_ratio: float = 0.7
    """part of each batch that is generated: 0.7 is 7 to 3 real; an epoch is one pass over the real images"""
    shuffle_block: int | None = None
    """neighbouring samples that are read together while training, for disks that seek slowly; 0 shuffles all samples;
    unset: 64 for webdataset, a row group for parquet, 0 for the others"""
    max_bad_files: int = 50
    """unreadable files that are skipped and reported before the run stops"""
    limit: int | None = None
    """use n samples only, evenly spaced so that a folder sorted by class keeps its classes"""
    hold_out: int = 0
    """training images that are kept aside, evenly spaced, at most a tenth; fine-tuning sets it to --probe.num_images"""
    resident_gib: float = 4.0
    """`auto` keeps a data set on the device up to this size in GiB"""
    hw_decoder_load: float = 0.75
    """part of the JPEG files DALI gives to the GPU's hardware decoder, the rest go to its CUDA decoder"""

    def __post_init__(self) -> None:
        check_fields(self)
        SOURCES.find(self.source)
        try:
            self.image_size = as_size(self.image_size)
        except ValueError as error:
            raise ValueError(f"image_size must be at least 1 pixel: {error}") from None
        if max(height_width(self.image_size)) > MAX_SIDE:
            raise ValueError(f"image_size must be at most {MAX_SIDE} pixels, got {typed(self.image_size)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {self.channels}")
        if self.loader not in LOADERS:
            raise ValueError(f"loader must be one of {', '.join(LOADERS)}, got {self.loader!r}")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {self.augment!r}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")
        if self.read_threads < 1:
            raise ValueError(f"read_threads must be at least 1, got {self.read_threads}")
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be 0 or more pixels, got {self.crop_padding}")
        if self.augment == "pad_crop" and self.crop_padding > (most := max(4, *height_width(self.image_size))):
            raise ValueError(
                f"crop_padding must be at most {most} pixels at that image_size, got {self.crop_padding}: a crop would "
                "hold nothing of the image"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop_scale must satisfy 0 < low <= high <= 1, got {self.crop_scale}; MAE uses (0.2, 1.0)"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio must satisfy 0 < low <= high, got {self.crop_ratio}")
        if not 0 < self.generated_ratio < 1:
            raise ValueError(
                f"generated_ratio must lie strictly between 0 and 1, got {self.generated_ratio}; "
                "leave `generated` unset to train on real images only"
            )
        if self.max_bad_files < 0:
            raise ValueError(f"max_bad_files must be 0 or more, got {self.max_bad_files}")
        if self.shuffle_block is not None and self.shuffle_block < 0:
            raise ValueError(f"shuffle_block must be 0 (shuffle all) or more samples, got {self.shuffle_block}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 sample, got {self.limit}; leave it unset for all")
        if self.hold_out < 0:
            raise ValueError(f"hold_out must be 0 or more training images, got {self.hold_out}")
        if self.resident_gib < 0:
            raise ValueError(f"resident_gib must be 0 or more, got {self.resident_gib}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load must lie in [0, 1], got {self.hw_decoder_load}")

    def idle_without_training(self, why: str) -> dict[str, str]:
        """Options of training and its loaders that do nothing in a command that does not train."""
        names = ("augment", "flip", "crop_padding", "crop_scale", "crop_ratio", "shuffle_block", "hold_out",
                 "generated", "generated_ratio", "loader", "read_threads", "resident_gib",
                 "hw_decoder_load")  # fmt: skip
        return {f"data.{name}": why for name in names}

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return {
            **without(reads_root(self.source), f"--{{}}source is {self.source}, which reads no files", "root"),
            **without(self.augment == "pad_crop", "--{}augment is not pad_crop", "crop_padding"),
            **without(self.augment == "resized_crop", "--{}augment is not resized_crop", "crop_scale", "crop_ratio"),
            **without(self.generated, "--{}generated names no file", "generated_ratio"),
            **without(self.loader == "auto", "--{}loader is not auto", "resident_gib"),
            **without(self.loader in ("auto", "torch"), "--{}loader is not torch", "read_threads"),
            **without(self.loader in ("auto", "dali"), "--{}loader is not dali", "hw_decoder_load"),
        }
