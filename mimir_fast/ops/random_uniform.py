"""Counter-based uniform numbers, fast, and the random start of an L∞ attack made of them.

The numbers are those of `mimir_fast.philox.uniform`, bit for bit, from C++ on the CPU (some hundred times faster than
its int64 arithmetic in PyTorch) and from Triton on CUDA.

Shapes: B samples, N numbers for each.
"""

import torch
from torch import Tensor

from mimir_fast import _native, philox
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op
from mimir_fast.ops.ball import within
from mimir_fast.philox import Stream, signed_seed, steps_of


def random_uniform(seed: int, stream: int, step: int | Tensor, samples_B: Tensor, num: int) -> Tensor:
    """(B, num) float32 in [0, 1): `philox.uniform`, as an op.

    Args:
        step: one number, or a (B,) tensor when the samples of a batch are at different epochs.
        samples_B: (B,) int64 global sample indices.
    Raises:
        ValueError: num < 0, or samples_B is not one-dimensional.    TypeError: samples_B is not int64.
    """
    _check_samples(samples_B)
    if num < 0:
        raise ValueError(f"num must be >= 0, got {num}")
    return _random_uniform(samples_B, steps_of(step, samples_B), num, signed_seed(seed), int(stream))


def random_start_linf_reference(
    x: Tensor,
    samples_B: Tensor,
    seed: int,
    step: int | Tensor,
    eps: float | Tensor,
    stream: int = Stream.ATTACK_START,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """The definition; every kernel is tested against it."""
    numbers = philox.uniform(seed, stream, step, samples_B, x[0].numel() if len(x) else 0)
    noise = (2 * numbers - 1).view(x.shape) * eps
    return within(x + noise.to(x.dtype), x, eps, low, high)


def random_start_linf(
    x: Tensor,
    samples_B: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    eps: float | Tensor,
    stream: int = Stream.ATTACK_START,
    clamp: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """A point drawn uniformly from the ball of radius eps around x, cut to the data range (Madry et al. 2018, §4).

    Differentiable in x: the noise is constant, the clamp stops what it cuts.

    Args:
        x: (B, …) float, the clean images or patches, in `clamp`.
        samples_B: (B,) int64 global sample indices.
        step: one number or a (B,) tensor; another step is another start.
        eps: radius, from 0 to the width of `clamp`, or a tensor of radii that broadcasts against x.
        clamp: range of the data.
    Returns:
        a contiguous tensor of x's shape and dtype, in the ball as exactly as that of `linf_step`.
    Raises:
        ValueError: eps or clamp out of range, len(samples_B) ≠ B, different devices; x outside of `clamp` (on CUDA as
            for `linf_step`).
        TypeError: no tensors, wrong dtypes.
    """
    _check_samples(samples_B)
    _checks.check_floating(x=x)
    _checks.check_same_device(x=x, samples_B=samples_B)
    _checks.check_range(clamp)
    _checks.check_eps(eps, x.shape, clamp)
    if len(x) != len(samples_B):
        raise ValueError(f"samples_B must have one index for each of the {len(x)} rows of x, got {len(samples_B)}")
    low, high = float(clamp[0]), float(clamp[1])
    steps = steps_of(step, samples_B)
    if isinstance(eps, Tensor):
        _checks.check_in_range("x", x, low, high)
        noise = 2 * random_uniform(seed, stream, steps, samples_B, x[0].numel() if len(x) else 0) - 1
        radii = eps.detach()
        return within(x + (noise.view(x.shape) * radii).to(x.dtype), x, radii, low, high)
    return _random_start_linf(x, samples_B, steps, signed_seed(seed), int(stream), float(eps), low, high)


def _check_samples(samples_B: Tensor) -> None:
    _checks.check_index_dtype("samples_B", samples_B)
    if samples_B.ndim != 1:
        raise ValueError(f"samples_B must be (B,), got {tuple(samples_B.shape)}")


def _uniform(samples_B: Tensor, steps_B: Tensor, num: int, seed: int, stream: int) -> Tensor:
    return philox.uniform(seed, stream, steps_B, samples_B, num)


@register_op("random_uniform", _uniform)
def _random_uniform(samples_B: Tensor, steps_B: Tensor, num: int, seed: int, stream: int) -> Tensor:
    if runs_triton(samples_B):
        from mimir_kernels import random_uniform as kernels

        return kernels.random_uniform(samples_B.contiguous(), steps_B.contiguous(), num, seed, stream)
    if not runs_native("random_uniform", samples_B, dtype=None):
        return _uniform(samples_B, steps_B, num, seed, stream)
    out = torch.empty(len(samples_B), num)
    samples, steps = samples_B.contiguous(), steps_B.contiguous()
    _native.run("random_uniform", samples, steps, out, len(out), num, seed % 2**64, stream)
    return out


@_random_uniform.register_fake
def _(samples_B: Tensor, steps_B: Tensor, num: int, seed: int, stream: int) -> Tensor:
    return samples_B.new_empty((len(samples_B), num), dtype=torch.float32)


def _definition(
    x: Tensor, samples_B: Tensor, steps_B: Tensor, seed: int, stream: int, eps: float, low: float, high: float
) -> Tensor:
    return random_start_linf_reference(x, samples_B, seed, steps_B, eps, stream, low, high)


@register_op("random_start_linf", _definition)
def _random_start_linf(
    x: Tensor, samples_B: Tensor, steps_B: Tensor, seed: int, stream: int, eps: float, low: float, high: float
) -> Tensor:
    _checks.check_in_range("x", x, low, high)
    x = x.contiguous()
    samples, steps = samples_B.contiguous(), steps_B.contiguous()
    if runs_triton(x):
        from mimir_kernels import random_uniform as kernels

        return kernels.random_start_linf(x, samples, steps, seed, stream, eps, low, high)
    if runs_native("random_start_linf", x):
        out = torch.empty_like(x)
        num = x.numel() // max(len(x), 1)
        _native.run("random_start_linf", x, samples, steps, out, len(x), num, seed % 2**64, stream, eps, low, high)
        return out
    return _definition(x, samples, steps, seed, stream, eps, low, high)


@_random_start_linf.register_fake
def _(
    x: Tensor, samples_B: Tensor, steps_B: Tensor, seed: int, stream: int, eps: float, low: float, high: float
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *_, ctx.low, ctx.high = inputs
    ctx.save_for_backward(output)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    (out,) = ctx.saved_tensors
    return grad_out * ((out > ctx.low) & (out < ctx.high)), None, None, None, None, None, None, None


_random_start_linf.register_autograd(_backward, setup_context=_setup_context)
