"""What the ops refuse, and how they say it: "NAME must be …, got …: what to type".

Checks of shapes, dtypes and devices cost nothing and always run. Checks of *values* read the tensor; on CUDA that
would stop the pipeline, so there they run only with `MIMIR_FAST_DEBUG=1`.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops._dispatch import runs_native


def values_are_checked(tensor: Tensor) -> bool:
    """Whether to look at the numbers in this tensor: on the CPU always, elsewhere in debug mode.

    Never while PyTorch compiles, transforms or records the call, when there may be no numbers, nor while a CUDA graph
    is recorded, which may not wait. The kernels of compiled ops look when they run.
    """
    if torch.compiler.is_compiling() or _native.transformed():
        return False
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return tensor.device.type == "cpu" or os.environ.get("MIMIR_FAST_DEBUG", "0") == "1"


def check_tensors(**values: object) -> None:
    """Raises TypeError for what is no tensor: an array, a number, a list."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            kind = type(value)
            make = "torch.from_numpy" if kind.__module__ == "numpy" and kind.__name__ == "ndarray" else "torch.tensor"
            raise TypeError(f"{name} must be a torch.Tensor, got {_type_name(kind)}: use {make}({name})")


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_same_device(**tensors: Tensor) -> None:
    """Raises ValueError if the tensors lie on different devices."""
    check_tensors(**tensors)
    if len({tensor.device for tensor in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {where}: move them with .to(device)")


def check_floating(**tensors: Tensor) -> None:
    """Raises TypeError for what is no tensor, and for one of integers, booleans or complex numbers."""
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}: {_as_floating(name, tensor)}")


def _as_floating(name: str, tensor: Tensor) -> str:
    """What to type, by what integers usually are: bytes are pixels, a column of long integers is labels."""
    if tensor.dtype == torch.uint8:
        return f"images are {name}.float() / 255"
    if tensor.dtype.is_complex:
        return f"use torch.view_as_real({name})"
    if tensor.dtype == torch.int64 and tensor.ndim == 1:
        return f"class labels are torch.nn.functional.one_hot({name}).float()"
    return f"use {name}.float()"


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError if the shapes differ."""
    check_tensors(**tensors)
    first, *others = tensors.values()
    if any(tensor.shape != first.shape for tensor in others):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal, got {shapes}")


def check_index_dtype(name: str, ids: Tensor) -> None:
    """Raises TypeError unless the ids are an int64 tensor, the only dtype the ops index with."""
    check_tensors(**{name: ids})
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}: use {name}.long()")


def check_ids_of(name: str, ids_BK: Tensor, of_B: Tensor) -> None:
    """Raises ValueError or TypeError unless the ids are int64 (B, K), for the batch and on the device of `of_B`."""
    check_index_dtype(name, ids_BK)
    if ids_BK.ndim != 2 or ids_BK.shape[0] != of_B.shape[0]:
        raise ValueError(f"{name} must be (B, K) with B = {of_B.shape[0]}, got {tuple(ids_BK.shape)}")
    if ids_BK.device != of_B.device:
        raise ValueError(
            f"{name} is on {ids_BK.device}, the data on {of_B.device}: use {name}.to({str(of_B.device)!r})"
        )


def check_ids(name: str, ids_BK: Tensor, num_patches: int) -> None:
    """Raises ValueError if an id is outside [0, num_patches) or twice in one image (when `values_are_checked`)."""
    if ids_BK.numel() == 0 or not values_are_checked(ids_BK):
        return
    B, K = ids_BK.shape
    if runs_native("check_ids", ids_BK, dtype=torch.int64):
        fault = _native.run("check_ids", ids_BK.contiguous(), B, K, num_patches)
    else:
        outside = ((ids_BK < 0) | (ids_BK >= num_patches)).any()
        ordered = ids_BK.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any()
        fault = "outside" if outside else "repeated" if repeated else ""
    if fault == "outside":
        low, high = int(ids_BK.min()), int(ids_BK.max())
        raise ValueError(f"{name} must lie in [0, {num_patches}), got ids from {low} to {high}")
    if fault == "repeated":
        raise ValueError(f"{name} must be distinct, got a patch twice among the {K} of one image")


def check_eps(eps: float | Tensor, shape: torch.Size, clamp: tuple[float, float]) -> None:
    """Raises unless 0 ≤ eps ≤ the width of `clamp`, the data's range, and radii of a tensor broadcast against `shape`.

    Raises:
        TypeError: neither a number nor a tensor.    ValueError: another size.
    """
    width = clamp[1] - clamp[0]
    if isinstance(eps, Tensor):
        sizes = zip(reversed(eps.shape), reversed(shape), strict=False)
        if eps.ndim > len(shape) or any(size not in (1, full) for size, full in sizes):
            raise ValueError(
                f"eps must broadcast against {tuple(shape)}, got {tuple(eps.shape)}: "
                f"one radius per channel of (B, C, H, W) is (C, 1, 1)"
            )
        bad = values_are_checked(eps) and not bool(((eps >= 0) & (eps <= width)).all())
    elif isinstance(eps, (int, float)):
        bad = not 0 <= eps <= width
    else:
        raise TypeError(f"eps must be a number or a torch.Tensor of radii, got {_type_name(type(eps))}")
    if bad:
        hint = "write 8/255, not 8" if width == 1 else f"clamp is [{clamp[0]:g}, {clamp[1]:g}]"
        raise ValueError(f"eps must be in [0, {width:g}], in the units of the data, got {eps}: {hint}")


def check_range(clamp: tuple[float, float]) -> None:
    """Raises ValueError unless clamp is (low, high) with low ≤ high."""
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2 or not clamp[0] <= clamp[1]:
        raise ValueError(f"clamp must be (low, high) with low <= high, got {clamp}")


def check_in_range(name: str, x: Tensor, low: float, high: float) -> None:
    """Raises ValueError if a number of x lies outside of [low, high]; a NaN is let through (`values_are_checked`)."""
    if not x.numel() or not values_are_checked(x):
        return
    smallest, largest = x.detach().aminmax()
    if smallest < low or largest > high:  # aminmax hands on NaN, which is neither
        raise ValueError(
            f"{name} must lie in clamp, [{low:g}, {high:g}], got numbers from {smallest:g} to {largest:g}: put the "
            "normalisation of images into the model (mimir_fast.evaluation.adapters.Normalized), or give clamp the "
            "range of your data"
        )


def as_samples(x: Tensor, y: Tensor, *, minimum: int = 2) -> tuple[Tensor, Tensor]:
    """x (N, …) and y (N, …) as (N, D_x) and (N, D_y), after refusing what no estimator could use.

    Args:
        minimum: the least N the estimator is defined for.
    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of samples or devices, too few samples, no features.
    """
    check_floating(x=x, y=y)
    for name, t in (("x", x), ("y", y)):
        if t.dim() == 0:
            raise ValueError(f"{name} must be (N, ...), got a scalar")
        if t.shape[0] and not t[0].numel():
            raise ValueError(f"{name} must have at least one feature per sample, got shape {tuple(t.shape)}")
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x and y must have the same number of samples (row i of both is sample i), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    check_same_device(x=x, y=y)
    if x.shape[0] < minimum:
        raise ValueError(f"x and y must have at least {minimum} samples, got N={x.shape[0]}")
    return x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raises ValueError listing the choices if `given` is none of them."""
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {given!r}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless 0 < value < inf (NaN is refused too)."""
    if value is None or isinstance(value, str) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < inf (NaN is refused too)."""
    if value is None or isinstance(value, str) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value!r}")


def check_finite(sums: Tensor, **samples: Tensor) -> None:
    """Raises ValueError for NaN or Inf in the samples: seen in the sums made of them (when `values_are_checked`)."""
    if values_are_checked(sums) and not bool(sums.isfinite().all()):
        bad = [name for name, t in samples.items() if not bool(t.isfinite().all())]
        got = "NaN or Inf" if bad else "distances that overflow float32"
        names = " and ".join(bad or samples)
        raise ValueError(f"{names} must be finite, got {got}: look at what produced it (learning rate, loss scale)")
