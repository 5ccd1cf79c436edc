"""A layer is a module: whatever PyTorch's tools hang on it, wrap around it or put in its place is what runs.

Every family, encoder and decoder; on a CPU, where fused paths would read the weights past all of that.
"""

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_checks import Case
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from mimir_fast.layers import borrowing, inspection
from mimir_fast.layers.attention import attention
from mimir_fast.layers.inspection import calls, is_plain
from mimir_fast.layers.linear import Mlp
from mimir_fast.models.blocks import Block
from mimir_fast.models.families import all_families
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops import _products
from mimir_fast.ops.patches import patchify_gather

CASES = [Case(family, "nano", 32, 2 if family in ("swin", "convnext") else 8) for family in all_families()]
VIT = next(case for case in CASES if case.family == "vit")
# In XCiT's and CaiT's stages for the cls token and elsewhere: containers that hold layers but are never called.
each_family = pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)


def run_masked(model: MaskedModel, images: Tensor) -> Tensor:
    ids = torch.arange(model.num_patches).expand(len(images), -1)
    keep, masked = ids[:, ::4].contiguous(), torch.cat([ids[:, 1::4], ids[:, 2::4], ids[:, 3::4]], dim=1)
    return model(View(patchify_gather(images, keep, model.patch_size), keep, masked)).prediction


@pytest.fixture(params=["classifier", "masked"])
def made(request: pytest.FixtureRequest, case: Case) -> tuple[Any, Callable[..., Tensor]]:
    """A model in eval mode, and how it is run."""
    if request.param == "masked":
        return case.masked_model().eval(), run_masked
    return case.classifier(), lambda model, images: model(images)


def leaves_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if not list(m.children())}


def count_hooks(model: nn.Module, seen: Counter[str]) -> list[Any]:
    def hook_of(name: str) -> Callable[..., None]:
        return lambda *_: seen.update([name])

    return [leaf.register_forward_hook(hook_of(name)) for name, leaf in leaves_of(model).items()]


@each_family
def test_hooks_on_every_leaf_fire_and_change_no_value(case: Case, made: Any) -> None:
    model, run = made
    images, seen = case.images(), Counter[str]()
    before = run(model, images)
    handles = count_hooks(model, seen)
    hooked = run(model, images)
    assert set(seen) == set(leaves_of(model)), set(leaves_of(model)) - set(seen)
    assert set(seen.values()) == {1}
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hooked, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, images), before, rtol=0, atol=0)


@each_family
def test_global_hooks_and_backward_hooks_fire(case: Case, made: Any) -> None:
    model, run = made
    names = {m: name for name, m in model.named_modules()}
    forward, backward = set[str](), set[str]()
    with torch.nn.modules.module.register_module_forward_hook(lambda m, *_: forward.add(names.get(m, ""))):
        run(model, case.images())
    handles = [
        leaf.register_full_backward_hook(lambda m, *_: backward.add(names[m]))
        for leaf in leaves_of(model).values()
        if isinstance(leaf, nn.Linear)
    ]
    run(model, case.images()).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert forward >= set(leaves_of(model))
    linear = {name for name, leaf in leaves_of(model).items() if isinstance(leaf, nn.Linear)}
    served = {name for name in linear if not name.startswith(("encoder.cls_attn", "encoder.blocks_token_only"))}
    assert backward >= {name for name in served if "cls_attn" not in name}


@each_family
def test_every_replaced_layer_is_what_runs(case: Case, made: Any) -> None:
    """A layer's `forward`, the instance's or the class's, that gives zeros; a module of another class in its place."""
    model, run = made
    images = case.images()
    before = run(model, images)
    for name, leaf in leaves_of(model).items():
        if not isinstance(leaf, (nn.Linear, nn.Conv2d)):
            continue
        if "cls_attn" in name or "blocks_token_only" in name:  # patches do not see the cls token's stage
            continue
        leaf.forward = lambda x, leaf=leaf: 0 * type(leaf).forward(leaf, x) + 0.5  # type: ignore[method-assign]
        assert not torch.equal(run(model, images), before), name
        del leaf.forward
    torch.testing.assert_close(run(model, images), before, rtol=0, atol=0)


def test_a_replaced_forward_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(64, 4).eval(), torch.randn(2, 9, 64)
    before = block(x)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: torch.zeros_like(x))
    without = block(x)
    assert not torch.equal(before, without)
    torch.testing.assert_close(without, x + block.attn(block.norm1(x)))


@each_family
def test_lora_by_peft_changes_the_output_and_trains(case: Case, made: Any) -> None:
    peft = pytest.importorskip("peft")
    model, run = made
    images, before = case.images(), run(model, case.images())
    targets = [name for name, leaf in leaves_of(model).items() if isinstance(leaf, nn.Linear)]
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    after = run(wrapped, images)
    assert not torch.allclose(before, after)
    after.square().sum().backward()
    silent = [n for n, p in wrapped.named_parameters() if "lora_" in n and p.grad is None]
    assert not [n for n in silent if "cls_attn" not in n and "blocks_token_only" not in n]


@each_family
def test_parametrised_and_pruned_layers(case: Case) -> None:
    """spectral_norm, weight_norm, a parametrisation of one's own and pruning: their values, and their gradients."""
    attach: dict[str, Callable[[nn.Module], object]] = {
        "spectral norm": parametrizations.spectral_norm,
        "weight norm": parametrizations.weight_norm,
        "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    }
    for name, function in attach.items():
        model, images = case.classifier(), case.images()
        block: Any = model.layers()[0]
        before = model(images)
        function(block.mlp.fc1)
        after = model(images)
        if name != "weight norm":
            assert not torch.equal(before, after), name
        after.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in block.mlp.fc1.parameters()), name
        # Not stale: what changes the layer's own parameters changes the output at once.
        with torch.no_grad():
            for p in block.mlp.fc1.parameters():
                p.mul_(torch.linspace(0.5, 2, p.shape[-1]))
        assert not torch.equal(model(images), after), name


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("case", [VIT])
def test_quantize_dynamic(case: Case, made: Any) -> None:
    model, run = made
    images = case.images()
    with torch.no_grad():
        exact = run(model, images)
        quantised = run(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), images)
    assert not torch.equal(exact, quantised)
    assert (quantised - exact).norm() < 0.2 * exact.norm()


@each_family
def test_copies_pickles_and_functional_calls(case: Case, made: Any) -> None:
    model, run = made
    images, before = case.images(), run(model, case.images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, images), before)
    model = case.classifier()
    state = model.state_dict()
    assert set(state) >= {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(functional_call(model, state, (images,)), model(images))
    moved = {name: t + 0.01 if t.is_floating_point() else t for name, t in state.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(moved)
    torch.testing.assert_close(functional_call(model, moved, (images,)), other(images))


@each_family
def test_an_ensemble_under_vmap(case: Case) -> None:
    members, images = [case.classifier(), case.classifier()], case.images()
    with torch.no_grad():
        for p in members[1].parameters():
            p.add_(0.01)
    parameters, buffers = stack_module_state(members)  # type: ignore[arg-type]

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], (parameters, buffers), (images,))

    together = vmap(one)(parameters, buffers)
    for member, logits in zip(members, together, strict=True):
        torch.testing.assert_close(logits, member(images), rtol=1e-3, atol=1e-4)


# Seconds each: the three that differ most; all with `-m slow`.
@pytest.mark.parametrize(
    "case",
    [c if c.family in ("vit", "xcit", "convnext") else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=lambda case: case.family,
)
def test_transforms_of_torch_func_give_the_gradient(case: Case) -> None:
    model, images = case.classifier(), case.images().double()
    model.double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf)

    def loss(images: Tensor) -> Tensor:
        return model(images).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(images), gradient)
    _, slope = torch.func.jvp(loss, (images,), (direction,))
    torch.testing.assert_close(slope, (gradient * direction).sum())


@pytest.mark.parametrize(
    "case", [c if c is VIT else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=lambda case: case.family
)
def test_linearize_records_the_same_derivative(case: Case) -> None:
    model, images = case.classifier().double(), case.images().double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def loss(images: Tensor) -> Tensor:
        return model(images).square().sum()

    _, slope = torch.func.jvp(loss, (images,), (direction,))
    _, linear = torch.func.linearize(loss, images)
    torch.testing.assert_close(linear(direction), slope)


@each_family
def test_shapes_on_meta_tensors_and_stacked_gradients(case: Case, made: Any) -> None:
    """What torchinfo asks for, and `is_grads_batched`, by which vectorised jacobians take all rows at once."""
    model, run = made
    images = case.images().requires_grad_()
    outputs = run(model, images)
    first = outputs.reshape(-1)[:3]
    stacked = torch.autograd.grad(first, images, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(value, images, retain_graph=True)[0] for value in first]
    torch.testing.assert_close(stacked, torch.stack(one_by_one))
    if run is not run_masked:  # a mask is checked by its values, which meta tensors have not
        assert run(model.to("meta"), images.to("meta")).shape == outputs.shape


@each_family
def test_flops_are_the_plain_models(case: Case, made: Any) -> None:
    """As many as its linear layers and convolutions have by their shapes, at least; and never those of fused calls."""
    model, run = made
    rows: Counter[str] = Counter()

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        rows["linear"] += 2 * out.numel() * module.in_features  # type: ignore[operator]

    layers = [leaf for leaf in leaves_of(model).values() if type(leaf) is nn.Linear]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with FlopCounterMode(display=False) as hooked:
        run(model, case.images())
    for handle in handles:
        handle.remove()
    before = calls.copy()
    with FlopCounterMode(display=False) as counter:
        run(model, case.images())
    assert calls == before
    assert counter.get_total_flops() >= 0.9 * rows["linear"] > 0
    assert counter.get_total_flops() <= hooked.get_total_flops()


@each_family
def test_layers_without_bias(case: Case) -> None:
    """A plain layer in another's place, without the bias that a fused path would read."""
    model, images = case.classifier(), case.images()
    for name, leaf in leaves_of(model).items():
        if type(leaf) is nn.Linear and leaf.bias is not None and name != "head":
            other = nn.Linear(leaf.in_features, leaf.out_features, bias=False)
            model.set_submodule(name, other)
    assert model(images).isfinite().all()


def test_dropping_tokens_hears_the_attention() -> None:
    model, seen = VIT.classifier(token_keep_rate=0.5).train(), list[nn.Module]()
    before = model(VIT.images())
    for layer in model.layers():
        layer.attn.register_forward_hook(lambda module, *_: seen.append(module))  # type: ignore[union-attr]
    torch.testing.assert_close(model(VIT.images()), before)
    assert len(seen) == len(model.layers())
    layer.attn = nn.Identity()
    with pytest.raises(TypeError, match="Identity does not show"):
        model(VIT.images())


# Seconds each. ConvNeXt's files are written by torch.export in exporting/test_programs.py.
@pytest.mark.parametrize(
    "case",
    [c if c.family in ("vit", "swin", "xcit") else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=lambda case: case.family,
)
def test_export_with_any_batch(case: Case) -> None:
    model, batch = case.classifier(), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (case.images(),), dynamic_shapes=({0: batch},))
    images = case.images(5)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-3, atol=1e-4)


def test_tracing_gives_the_eager_values() -> None:
    model, images = VIT.classifier(), VIT.images()
    traced = torch.jit.trace(model, (images,), check_trace=False)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [VIT])
def test_distributed_checkpoints_know_the_names(case: Case, made: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, run = made
    state = get_model_state_dict(model)
    assert set(state) == {name for name, _ in model.named_parameters()}
    wanted = {name: 1.5 * t for name, t in state.items()}
    set_model_state_dict(model, wanted)
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())
    assert run(model, case.images()).isfinite().all()


# And fused paths stay taken where they may: a silent fall back would pass all of the above.


def taken(function: Callable[[], object]) -> Counter[str]:
    before = calls.copy()
    function()
    return calls - before


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimir_fast import _native

    if not _native.has("fp32_gelu") or not _native.has("fp32_attention"):
        pytest.skip("the C++ extension was not built")
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "native")
    monkeypatch.setattr(_products, "helps", lambda: False)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("alone", [False, True], ids=["", "products by oneDNN"])
def test_a_plain_model_is_fused_in_training_and_in_attacks(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where oneDNN multiplies faster, the embeddings of patches and of latents are taken as well.
    monkeypatch.setattr(_products, "helps", lambda: alone)
    case = VIT
    model = case.masked_model()
    encoder, decoder = len(model.encoder.layers()), len(model.decoder.layers())
    # The decoder's last block is asked for some tokens only, and there is the prediction behind a norm.
    whole = Counter({"fp32 block": encoder + decoder - 1, "fp32 mlp": 1, "fp32 linear": 6 if alone else 4})
    assert taken(lambda: run_masked(model, case.images())) == whole
    with borrowing.borrowed(model) as module:
        assert taken(lambda: run_masked(module, case.images())) == whole
    classifier = case.classifier()
    of_images = Counter({"fp32 block": encoder, "fp32 linear": int(alone)})
    assert taken(lambda: classifier(case.images())) == +of_images
    handle = classifier.layers()[0].attn.qkv.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    assert taken(lambda: classifier(case.images()))["fp32 block"] == encoder - 1
    handle.remove()
    assert taken(lambda: classifier(case.images())) == +of_images


@pytest.mark.usefixtures("native")
def test_recomputing_layers_are_fused_both_times() -> None:
    from mimir_fast.training.distributed import parallelize
    from mimir_fast.world import World

    case = VIT
    model: Any = case.classifier().train()
    layers = len(model.layers())
    parallelize(
        model, "single", World(0, 1, torch.device("cpu")), bf16=False, compiled=False, checkpoint_activations=True
    )
    assert taken(lambda: model(case.images()).sum().backward()) == Counter({"fp32 block": 2 * layers})


def test_what_is_plain() -> None:
    layer = nn.Linear(2, 2)
    assert is_plain(nn.Linear, layer) and is_plain(nn.Linear)
    assert not is_plain(nn.Linear, nn.LazyLinear(2)) and not is_plain(nn.Linear, layer, nn.Identity())
    layer.compile()
    assert not is_plain(nn.Linear, layer)
    assert not is_plain(nn.Conv3d, nn.Conv3d(1, 1, 1))  # of no class that a fused path computes
    assert not inspection.observed()


def test_attention_under_forward_mode_is_exact() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8, dtype=torch.double) for _ in range(3))
    _, slope = torch.func.jvp(lambda q: attention(q, k, v).sum(), (q,), (torch.ones_like(q),))
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attention(leaf, k, v).sum(), leaf)
    torch.testing.assert_close(slope, gradient.sum())
