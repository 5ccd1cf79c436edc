"""An ONNX file: `images` (B, C, H, W) float32 in [0, 1] to `logits` (B, K) or `tokens` (B, T, D), for any B."""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.exporting.compare import EXAMPLE, difference
from mimir_fast.exporting.formats import Format, register
from mimir_fast.exporting.original import Original


def write(original: Original, path: Path) -> float:
    """Read back by onnxruntime."""
    import onnxruntime

    # Its remarks are on torchvision's operators and on constants, which a user can do nothing about.
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                original.model, (original.images(EXAMPLE),), dynamo=True, dynamic_shapes=({0: "batch"},),
                input_names=["images"], output_names=[original.output], verbose=False,
            )  # fmt: skip
    finally:
        log.setLevel(level)
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of our source, and where it lies on this machine
    program.save(path, external_data=False)  # our largest model is below protobuf's limit of 2 GB
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([original.output], {"images": images.numpy()})[0])

    return difference(run, original)


def use(original: Original, path: Path) -> str:
    """In Python."""
    return (
        f"session = onnxruntime.InferenceSession({str(path)!r})"
        f'\n     session.run(["{original.output}"], {{"images": images}})[0]  # numpy, float32 in [0, 1]'
    )


register(Format("onnx", ".onnx", write, use, needs=("onnx", "onnxscript", "onnxruntime"), extra="onnx"))
