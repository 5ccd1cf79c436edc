"""One signed-gradient step inside an L∞ ball: the FGSM/PGD update.

    x_adv ← x + clip(clamp(x_adv + alpha·sign(grad), low, high) − x, −eps, eps)

Element-wise, so it is the same in image space (B, C, H, W) and in patch space (B, K, P). Seven passes over memory in
eager PyTorch, one here.
Source: Madry et al., arXiv 1706.06083, Eq. 2 and §2.1.
"""

import math

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op
from mimir_fast.ops._precision import accumulation_dtype
from mimir_fast.ops.ball import ball_of, within


def linf_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float | Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """The definition; every kernel is tested against it."""
    return within(x_adv + alpha * grad.sign().to(x_adv.dtype), x, eps, low, high)


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    alpha: float,
    eps: float | Tensor,
    clamp: tuple[float, float] = (0.0, 1.0),
    out: Tensor | None = None,
) -> Tensor:
    r"""The next iterate of an L∞ attack.

    $$x_{adv} \leftarrow \Pi_{[low,\,high] \,\cap\, \{\lVert \cdot - x \rVert_\infty \le \epsilon\}}
    \left(x_{adv} + \alpha\, \mathrm{sign}(\nabla)\right)$$

    Differentiable in x_adv and x as the formula is (the sign has no slope); alpha and eps are constants.

    Args:
        x_adv: the current iterate, any shape, float.
        grad: gradient of the loss to be maximised, same shape. Its sign is 0 where it is 0 or NaN.
        x: the clean input, same shape, in `clamp`.
        alpha: step size in units of x (8/255, not 8, where images are in [0, 1]).
        eps: radius of the ball in the same units, from 0 to the width of `clamp`, or a tensor of radii that broadcasts
            against x: (C, 1, 1) gives one per channel of an image, (P,) one per number of a patch.
        clamp: range of the data.
        out: where to write, without a gradient; `out=x_adv` works in place.
    Returns:
        a tensor of x_adv's shape and dtype with values in `clamp` and ‖·−x‖∞ ≤ eps: exactly in float16 and bfloat16,
        up to the rounding of x ± eps, half a unit in the last place, in float32 (3e-8 for images in [0, 1]) and
        float64 (6e-17).
    Raises:
        ValueError: shapes or devices differ, alpha < 0, eps negative or wider than `clamp`, an empty `clamp`; x outside
            of `clamp` (on CUDA only under MIMIR_FAST_DEBUG=1, as looking makes the host wait: there the ball comes
            before the range, and x moves by eps at most).
        TypeError: no tensors, an integer dtype, more than one dtype.
    """
    _checks.check_same_shape(x_adv=x_adv, grad=grad, x=x, **({} if out is None else {"out": out}))
    _checks.check_same_device(x_adv=x_adv, grad=grad, x=x, **({} if out is None else {"out": out}))
    _checks.check_floating(x_adv=x_adv, grad=grad, x=x)
    _checks.check_range(clamp)
    _checks.check_eps(eps, x.shape, clamp)
    if not 0 <= alpha < math.inf:
        raise ValueError(
            f"alpha must be >= 0 and finite (the step ascends the loss), got {alpha}: negate grad to descend"
        )
    if x_adv.dtype != x.dtype:
        raise TypeError(f"x_adv and x must have one dtype, got {x_adv.dtype} and {x.dtype}")
    # Radii of 16 bits could be rounded upwards.
    radii = eps.detach().to(x.device, accumulation_dtype(x)) if isinstance(eps, Tensor) else None
    radius = 1.0 if isinstance(eps, Tensor) else float(eps)
    numbers = (float(alpha), radius, float(clamp[0]), float(clamp[1]))
    if out is not None:
        if out.dtype != x.dtype:
            raise TypeError(f"out must be {x.dtype} like x, got {out.dtype}")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_adv, x, out)):
            raise ValueError("out= records no gradient: call linf_step under torch.no_grad(), or leave out= away")
        _linf_step_out(x_adv, grad, x, radii, *numbers, out)
        return out
    return _linf_step(x_adv, grad, x, radii, *numbers)


def eps_pattern(radii: Tensor, like: Tensor) -> tuple[Tensor, int]:
    """(values, inner): element i of the dense tensor `like`, in memory order, has radius values[i // inner % len]."""
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    sizes = [like.shape[d] for d in order]
    radii = radii.reshape((1,) * (like.ndim - radii.ndim) + radii.shape).permute(order)
    varying = [d for d in range(like.ndim) if radii.shape[d] > 1]
    first, last = (varying[0], varying[-1]) if varying else (0, -1)
    neighbours = list(radii.shape[first : last + 1]) == sizes[first : last + 1]
    if not neighbours:  # as for (B, 1, 1, W): no simple pattern
        return radii.expand(sizes).flatten(), 1
    return radii.flatten().contiguous(), torch.Size(sizes[last + 1 :]).numel()


def _laid_out_like(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with the strides of `target` (itself where they agree), so that kernels can walk raw memory."""
    if tensor.stride() == target.stride():
        return tensor
    return torch.empty_like(target, dtype=tensor.dtype).copy_(tensor)


def _definition(
    x_adv: Tensor, grad: Tensor, x: Tensor, radii: Tensor | None, alpha: float, eps: float, low: float, high: float
) -> Tensor:
    return linf_step_reference(x_adv, grad, x, alpha, eps if radii is None else radii, low, high)


def _definition_out(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    radii: Tensor | None,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    out: Tensor,
) -> None:
    out.copy_(_definition(x_adv, grad, x, radii, alpha, eps, low, high))


@register_op("linf_step_out", _definition_out, mutates_args=("out",))
def _linf_step_out(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    radii: Tensor | None,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    out: Tensor,
) -> None:
    """One step written to `out`: the C++ or the Triton kernel; the definition for dtypes they do not know."""
    _checks.check_in_range("x", x, low, high)
    if out.numel() == 0:
        return
    native = runs_native("linf_step", out, grad) and out.ndim > 0
    if not native and not runs_triton(out):
        _definition_out(x_adv, grad, x, radii, alpha, eps, low, high, out)
        return
    dense_out = out if _native.dense(out) else torch.empty_like(out)
    x_adv, grad, x = (_laid_out_like(dense_out, tensor) for tensor in (x_adv, grad, x))
    values, inner = (None, 1) if radii is None else eps_pattern(radii, dense_out)
    if native:
        values = torch.tensor([eps]) if values is None else values
        if inner == 1 and 1 < len(values) < 512:
            values = values.repeat(1024 // len(values))  # channels last: longer runs, same pattern
        _native.run("linf_step", x_adv, grad, x, values, dense_out, out.numel(), len(values), inner, alpha, low, high)
    else:
        from mimir_kernels import linf_step as kernels

        kernels.linf_step(x_adv, grad, x, values, inner, alpha, eps, low, high, dense_out)
    if dense_out is not out:
        out.copy_(dense_out)


@register_op("linf_step", _definition)
def _linf_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, radii: Tensor | None, alpha: float, eps: float, low: float, high: float
) -> Tensor:
    out = torch.empty_like(x_adv)
    _linf_step_out(x_adv, grad, x, radii, alpha, eps, low, high, out)
    return out


@_linf_step.register_fake
def _(
    x_adv: Tensor, grad: Tensor, x: Tensor, radii: Tensor | None, alpha: float, eps: float, low: float, high: float
) -> Tensor:
    return torch.empty_like(x_adv)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_adv, grad, x, radii, *ctx.numbers = inputs
    ctx.save_for_backward(x_adv, grad, x, radii)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    """The subgradient autograd gives the definition: half to each side where two bounds meet, none on the range's ends.

    (On the ends older torch lets the gradient of `clamp` pass; both are subgradients, this one is ours.)
    """
    x_adv, grad, x, radii = ctx.saved_tensors
    alpha, eps, low, high = ctx.numbers
    radius = eps if radii is None else radii
    moved, (lower, upper) = x_adv + alpha * grad.sign().to(x.dtype), ball_of(x, radius)
    raised = torch.maximum(moved, lower)
    share_of_moved = _share(raised, upper) * _share(lower, moved)
    in_range = torch.minimum(raised, upper)
    grad_out = grad_out * ((in_range > low) & (in_range < high))
    grad_x_adv = grad_out * share_of_moved
    return grad_x_adv, None, grad_out - grad_x_adv, None, None, None, None, None


def _share(smaller: Tensor, larger: Tensor) -> Tensor:
    """1 where smaller < larger, 1/2 at a tie, 0 elsewhere."""
    return (smaller < larger).to(smaller.dtype) + 0.5 * (smaller == larger)


_linf_step.register_autograd(_backward, setup_context=_setup_context)
