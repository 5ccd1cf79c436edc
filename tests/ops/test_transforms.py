"""Every op under every way PyTorch differentiates, transforms and records a call: never a silent zero.

Each op is compared with its definition, which PyTorch differentiates by itself. Inputs that have derivatives are given
as one vector z, so that all mixed second derivatives are seen.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from small_models import masked_vit
from torch import Tensor
from torch.autograd import forward_ad, functional

from mimir_fast import _native, ops
from mimir_fast.layers.native_attention import (
    native_attention,
    native_attention_reference,
    native_self_attention,
    takes,
)
from mimir_fast.models.masked_model import View
from mimir_fast.ops.crop_resize import crop_resize
from mimir_fast.ops.dependence.pair_sums import pair_sums, pair_sums_reference
from mimir_fast.ops.dependence.rbf import rbf_minus_one, rbf_minus_one_reference
from mimir_fast.ops.hsic import hsic, hsic_reference
from mimir_fast.ops.linf_step import linf_step, linf_step_reference
from mimir_fast.ops.masked_loss import masked_loss, masked_loss_reference
from mimir_fast.ops.nhsic import nhsic, nhsic_reference
from mimir_fast.ops.noisy_patches import noisy_patches, noisy_patches_reference
from mimir_fast.ops.patches import (
    masked_targets,
    masked_targets_reference,
    patchify_gather,
    patchify_gather_reference,
    unpatchify_visible,
    unpatchify_visible_reference,
)
from mimir_fast.ops.positions import add_positions, add_positions_reference
from mimir_fast.ops.random_masks import random_masks
from mimir_fast.ops.random_uniform import random_start_linf, random_start_linf_reference, random_uniform
from mimir_fast.ops.tokens import (
    gather_patches,
    gather_patches_reference,
    place_patches,
    place_patches_reference,
    scatter_patches,
    scatter_patches_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # tracing warns of each constant, vmap of what it does in a loop
IDS = torch.tensor([[3, 0, 2], [1, 3, 0]])
SAMPLES = torch.tensor([7, 2**33])
WIDTH = torch.tensor(0.3, dtype=torch.float64)


class Case(NamedTuple):
    """A public function of differentiable tensors, its definition, and the shapes of the tensors.

    Attributes:
        no_backward: the op is documented to pass no gradient back; forward mode is right all the same.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    definition: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float64
    no_backward: bool = False


def start(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, SAMPLES, seed=3, step=1, eps=0.1)


def written_to_out(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return linf_step(x_adv, grad, x, alpha=0.1, eps=0.3, out=torch.empty_like(x_adv))


# By the names under which the ops are registered.
CASES = {
    "pair_sums": Case(
        lambda x, y: pair_sums(x, y, WIDTH, 2 * WIDTH),
        lambda x, y: pair_sums_reference(x, y, WIDTH, 2 * WIDTH),
        ((5, 3), (5, 2)),
    ),
    "median_squared_distance": Case(
        lambda x: hsic(x, x, bandwidth="median"), lambda x: hsic_reference(x, x, bandwidth="median"), ((6, 3),)
    ),
    "rbf_minus_one": Case(lambda x: rbf_minus_one(x, WIDTH), lambda x: rbf_minus_one_reference(x, WIDTH), ((5, 3),)),
    "nhsic_from_kernels": Case(
        lambda x, y: nhsic(x, y, sigma=1.0, eps=0.1),
        lambda x, y: nhsic_reference(x, y, sigma=1.0, eps=0.1),
        ((5, 3), (5, 2)),
    ),
    "gather_patches": Case(
        lambda x: gather_patches(x, IDS), lambda x: gather_patches_reference(x, IDS), ((2, 4, 3),)
    ),
    "place_patches": Case(
        lambda x: place_patches(x, IDS, 4), lambda x: place_patches_reference(x, IDS, 4), ((2, 3, 2),)
    ),
    "scatter_patches": Case(
        lambda x, token, table: scatter_patches(x, IDS, token, table),
        lambda x, token, table: scatter_patches_reference(x, IDS, token, table),
        ((2, 3, 2), (2,), (4, 2)),
    ),
    "masked_rows": Case(  # reached by the backward pass to the mask token
        lambda token: scatter_patches(torch.ones(2, 3, 2, dtype=token.dtype), IDS, token, token.expand(4, 2)),
        lambda token: scatter_patches_reference(torch.ones(2, 3, 2, dtype=token.dtype), IDS, token, token.expand(4, 2)),
        ((2,),),
    ),
    "add_positions": Case(
        lambda x, table, prefix: add_positions(x, IDS, table, prefix),
        lambda x, table, prefix: add_positions_reference(x, IDS, table, prefix),
        ((2, 2, 2), (4, 2), (1, 2)),
    ),
    "patchify_gather": Case(
        lambda x: (patchify_gather(x, IDS, 2), masked_targets(x, IDS, 2)),
        lambda x: (patchify_gather_reference(x, IDS, 2), masked_targets_reference(x, IDS, 2, True)),
        ((2, 1, 4, 4),),
    ),
    "unpatchify_visible": Case(
        lambda x: unpatchify_visible(x, IDS, 2, 4, 4),
        lambda x: unpatchify_visible_reference(x, IDS, 2, 4, 4),
        ((2, 3, 4),),
    ),
    "masked_loss": Case(
        lambda prediction, images: masked_loss(prediction, images, IDS, 2),
        lambda prediction, images: masked_loss_reference(prediction, images, IDS, 2),
        ((2, 3, 4), (2, 1, 4, 4)),
    ),
    "noisy_patches": Case(
        lambda x: noisy_patches(x, IDS, 2, SAMPLES, seed=3, step=1, eps=0.1),
        lambda x: noisy_patches_reference(x, IDS, 2, SAMPLES, 3, 1, 0.1),
        ((2, 1, 4, 4),),
        no_backward=True,
    ),
    "random_start_linf": Case(start(random_start_linf), start(random_start_linf_reference), ((2, 5),)),
    "linf_step": Case(
        lambda x_adv, grad, x: linf_step(x_adv, grad, x, alpha=0.1, eps=0.3),
        lambda x_adv, grad, x: linf_step_reference(x_adv, grad, x, 0.1, 0.3),
        ((3, 2), (3, 2), (3, 2)),
    ),
    "linf_step_out": Case(
        written_to_out, lambda x_adv, grad, x: linf_step_reference(x_adv, grad, x, 0.1, 0.3), ((3, 2),) * 3,
        no_backward=True,
    ),
    "native_attention": Case(
        native_attention, native_attention_reference, ((1, 3, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8)), torch.float32
    ),
    "native_self_attention": Case(
        native_self_attention, lambda qkv: native_attention_reference(*qkv.unbind(2)), ((1, 3, 3, 1, 8),), torch.float32
    ),
}  # fmt: skip
# Ops of integers: no derivative exists, and they are compared under transforms below.
WITHOUT_DERIVATIVE = {"random_masks", "random_uniform", "crop_resize"}
Scalar = Callable[[Tensor], Tensor]


def directional(function: Scalar, z: Tensor, v: Tensor) -> Scalar:
    return lambda t: function(z + t * v)


def third(derivative: Callable[..., Callable[..., Tensor]]) -> Callable[[Scalar, Tensor, Tensor], Tensor]:
    return lambda f, z, v: derivative(derivative(derivative(directional(f, z, v))))(z.new_zeros(()))


def third_by_autograd(f: Scalar, z: Tensor, v: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    value = f(z)
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, z, create_graph=True)
        value = (grad * v).sum()
    return value.detach()


def by_dual_numbers(f: Scalar, z: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent


def backward_in_a_dual_level(f: Scalar, z: Tensor, v: Tensor) -> Tensor:
    """Forward over reverse, the forward pass outside."""
    z = z.clone().requires_grad_()
    value = f(z)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 2.0))
        return forward_ad.unpack_dual(torch.autograd.grad(value, z, seed)[0]).tangent


def batched_backward(f: Scalar, z: Tensor, v: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    value = f(z)
    return torch.autograd.grad(value, z, torch.arange(1.0, 4.0).to(value), is_grads_batched=True)[0]


FORWARD = {
    "jvp": lambda f, z, v: torch.func.jvp(f, (z,), (v,))[1],
    "dual numbers": by_dual_numbers,
    "linearize": lambda f, z, v: torch.func.linearize(f, z)[1](v),
    "jacfwd": lambda f, z, v: torch.func.jacfwd(f)(z),
}
REVERSE = {
    "hvp": lambda f, z, v: functional.hvp(f, z, v)[1],
    "vhp": lambda f, z, v: functional.vhp(f, z, v)[1],
    "hessian": lambda f, z, v: functional.hessian(f, z),
    "third order": third_by_autograd,
    "func.grad": lambda f, z, v: torch.func.grad(f)(z),
    "func.hessian": lambda f, z, v: torch.func.hessian(f)(z),
    "func.jacrev twice": lambda f, z, v: torch.func.jacrev(torch.func.jacrev(f))(z),
    "forward over forward": lambda f, z, v: torch.func.jacfwd(torch.func.jacfwd(f))(z),
    "func, third order": third(torch.func.grad),
    "backward in a dual level": backward_in_a_dual_level,
    "batched backward": batched_backward,
}


def functions_of(name: str) -> tuple[Scalar, Scalar, Tensor, Tensor]:
    """The op and its definition as scalar functions of one vector z, z and a direction."""
    case = CASES[name]
    if name.startswith("native") and not takes(torch.device("cpu"), torch.float32, 8):
        pytest.skip("the C++ extension is not built")
    rng = torch.Generator().manual_seed(1)
    sizes = [torch.Size(shape).numel() for shape in case.shapes]
    z, v = (torch.rand(sum(sizes), generator=rng, dtype=torch.float64).to(case.dtype) for _ in range(2))

    def scalar(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Scalar:
        def of_z(z: Tensor) -> Tensor:
            outputs = function(*[part.view(shape) for part, shape in zip(z.split(sizes), case.shapes, strict=True)])
            # A sine, so that no derivative of a linear op vanishes.
            return sum(
                (out.sin().sum() for out in ([outputs] if isinstance(outputs, Tensor) else outputs)), z.new_zeros(())
            )

        return of_z

    return scalar(case.function), scalar(case.definition), 0.2 + 0.6 * z, v - 0.5


def test_every_op_is_here() -> None:
    for module in pkgutil.walk_packages(ops.__path__, "mimir_fast.ops."):
        import_module(module.name)
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mimir_fast::")]
    # A backward op is only called where nothing is transformed or differentiated again (`differentiated_again`).
    assert {name for name in names if not name.endswith("_backward")} == CASES.keys() | WITHOUT_DERIVATIVE


@pytest.mark.parametrize("mode", FORWARD)
@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name: str, mode: str) -> None:
    ours, definition, z, v = functions_of(name)
    expected = FORWARD[mode](definition, z, v)
    assert expected.abs().max() > 0
    torch.testing.assert_close(FORWARD[mode](ours, z, v), expected)


@pytest.mark.parametrize("mode", REVERSE)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.no_backward])
def test_higher_derivatives(name: str, mode: str) -> None:
    if (name, mode) == ("masked_loss", "backward in a dual level"):
        pytest.skip("PyTorch refuses this of its own mse_loss: ZeroTensors are immutable")
    ours, definition, z, v = functions_of(name)
    expected = REVERSE[mode](definition, z, v)
    assert expected.abs().max() > 0
    single = z.dtype == torch.float32
    tolerance = {"rtol": 1e-4 if single else 1e-7, "atol": 1e-5 if single else 1e-9}
    torch.testing.assert_close(REVERSE[mode](ours, z, v), expected, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_vmap(name: str) -> None:
    ours, _, z, v = functions_of(name)
    torch.testing.assert_close(
        torch.vmap(ours)(torch.stack([z, z + 0.1 * v])), torch.stack([ours(z), ours(z + 0.1 * v)])
    )


@pytest.mark.parametrize("name", CASES)
def test_jit_trace(name: str) -> None:
    """The graph is PyTorch's own operations: it runs where mimir_fast is not installed."""
    ours, _, z, v = functions_of(name)
    traced = torch.jit.trace(ours, z)
    assert "mimir_fast::" not in str(traced.graph)
    torch.testing.assert_close(traced(z + 0.1 * v), ours(z + 0.1 * v))


@pytest.mark.parametrize("name", ["pair_sums", "scatter_patches", "masked_loss", "linf_step"])
def test_export(name: str) -> None:
    ours, _, z, v = functions_of(name)
    module = torch.nn.Module()
    module.forward = ours  # type: ignore[method-assign]
    program = torch.export.export(module, (z,))
    assert "mimir_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(z + 0.1 * v), ours(z + 0.1 * v))


@pytest.mark.parametrize("name", ["pair_sums", "gather_patches"])
def test_compiled_forward_mode(name: str) -> None:
    ours, _, z, v = functions_of(name)
    compiled = torch.compile(lambda z, v: torch.func.jvp(ours, (z,), (v,))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, v), torch.func.jvp(ours, (z,), (v,))[1])


def test_ops_without_derivative() -> None:
    samples = torch.stack([SAMPLES, SAMPLES + 1])
    draws = {
        "masks": lambda s: random_masks(s, 9, 4, seed=3, step=1)[0],
        "uniform": lambda s: random_uniform(3, 0, 1, s, 5),
    }
    for draw in draws.values():
        assert torch.equal(torch.vmap(draw)(samples), torch.stack([draw(s) for s in samples]))
        assert torch.equal(torch.jit.trace(draw, samples[0])(samples[1]), draw(samples[1]))
    pixels = torch.randint(256, (2, 4), dtype=torch.uint8)
    plan = torch.tensor([[0, 2, 2, 0, 0, 2, 2, 4, 4, 0, 0, 0]])

    def grow(pixels: Tensor) -> Tensor:
        return crop_resize(pixels, plan, side=4, channels=1)

    assert torch.equal(torch.vmap(grow)(pixels), torch.stack([grow(p) for p in pixels]))


def test_a_model_is_traced_and_differentiated_forwards() -> None:
    """With what stands around the ops: the layers' kernels keep out of the way as well."""
    model = masked_vit().eval().requires_grad_(False)
    keep = torch.tensor([[3, 7, 8], [0, 2, 15]])

    def predict(images: Tensor) -> Tensor:
        return model(View(patchify_gather(images, keep, 4), keep)).prediction

    rng = torch.Generator().manual_seed(2)
    images, v = (torch.rand(2, 3, 16, 16, generator=rng) for _ in range(2))
    with torch.no_grad():
        traced = torch.jit.trace(predict, images)
        torch.testing.assert_close(traced(images + v), predict(images + v), rtol=1e-4, atol=1e-5)
    tangent = torch.func.jvp(predict, (images,), (v,))[1]
    inputs = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(predict(inputs).sum(), inputs)
    torch.testing.assert_close(tangent.sum(), (grad * v).sum(), rtol=1e-3, atol=1e-4)


def test_kernels_run_where_nothing_is_transformed() -> None:
    """Also in a compiled backward pass: its graph has the backward op, not the definition."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(str(graph.graph))
        return graph.forward

    assert not _native.transformed()
    x, y = torch.rand(6, 3, requires_grad=True), torch.rand(6, 2)
    torch.compile(hsic, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x, y).backward()
    assert "mimir_fast.pair_sums.default" in graphs[0] and "mimir_fast.pair_sums_backward.default" in graphs[1]
