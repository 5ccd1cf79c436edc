"""Two gloo processes with 8 samples each against one process with 16: same value, same gradients."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimir_fast.metrics import MinibatchCKA
from mimir_fast.ops import global_hsic as row_blocks
from mimir_fast.ops.dependence.bandwidth import gamma
from mimir_fast.ops.dependence.pair_sums import pair_sums_reference
from mimir_fast.ops.global_batch import gather_batch
from mimir_fast.ops.global_hsic import global_hsic
from mimir_fast.ops.hsic import hsic

RANKS, LOCAL = 2, 8


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(RANKS * LOCAL, 3, 4, 4, generator=g)
    return x, x.flatten(1)[:, :20] + 0.1 * torch.rand(RANKS * LOCAL, 20, generator=g)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12, bias=False))


def run_rank(rank: int, directory: str, job: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{directory}/store", RANKS), rank=rank, world_size=RANKS)
    try:
        torch.save(JOBS[job](rank), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(job: str, directory: Path) -> list[dict[str, torch.Tensor]]:
    mp.start_processes(run_rank, args=(str(directory), job), nprocs=RANKS, start_method="fork")
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def train_step(rank: int, penalty: str, **options: str) -> dict[str, torch.Tensor]:
    x, z = (t[rank * LOCAL : (rank + 1) * LOCAL] for t in data())
    model = DistributedDataParallel(encoder())
    if penalty == "gathered":
        loss = hsic(gather_batch(x), gather_batch(model(z)), sigma=(5.0, 0.5), **options)
    else:
        loss = global_hsic(x, model(z), sigma=(5.0, 0.5), **options)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.module.named_parameters()}}


def both_gradients(rank: int) -> dict[str, torch.Tensor]:
    """Gradients to x and y themselves, in float64 and bfloat16, and a batch too small for the estimator."""
    x, y = (t[rank * LOCAL : (rank + 1) * LOCAL].double().requires_grad_() for t in data())
    value = global_hsic(x, y)
    grad_x, grad_y = torch.autograd.grad(value, (x, y))
    half = global_hsic(x.detach().bfloat16(), y.detach().bfloat16())
    with pytest.raises(ValueError, match="at least 2 samples"):
        global_hsic(x[:1], y[:1], estimator="unbiased")  # 1 a rank, 2 in all, 4 wanted
    return {"value": value.detach(), "grad_x": grad_x / RANKS, "grad_y": grad_y / RANKS, "half": half}


def uneven(rank: int) -> dict[str, torch.Tensor]:
    """The last batch of a loader that keeps it, and others that no backend notices: said by both, which can go on."""
    x, y = (t[: LOCAL - rank] for t in data())
    says = (
        r"x must have the same shape and dtype .* float32 \(8, 3, 4, 4\) on rank 0 and float32 \(7, 3, 4, 4\) on rank 1"
    )
    with pytest.raises(ValueError, match=says):
        gather_batch(x)
    with pytest.raises(ValueError, match=says):
        global_hsic(x, y)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) on rank 0 and float32 \(0, 3, 4, 4\) on rank 1"):
        global_hsic(x[: 1 - rank], y[: 1 - rank])  # too few on one of them
    x, y = (t[:LOCAL] for t in data())
    with pytest.raises(ValueError, match=r"y must have .* \(8, 20\) on rank 0 and float32 \(8, 19\) on rank 1"):
        global_hsic(x, y[:, rank:])
    for mine, says in (
        (x.view(LOCAL, *((6, 8), (8, 6))[rank]), r"\(8, 6, 8\) on rank 0 and float32 \(8, 8, 6\)"),
        ((x, x.double())[rank], r"float32 \(8, 3, 4, 4\) on rank 0 and float64 \(8, 3, 4, 4\)"),
        ((x.flatten()[0], x.flatten()[:1])[rank], r"float32 \(\) on rank 0 and float32 \(1,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            gather_batch(mine)
    return {"value": global_hsic(x, y)}


class Largest(TorchDispatchMode):
    """How many numbers the largest float32 tensor had that was made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **kwargs or {})
        sizes = (t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.dtype == torch.float32)
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def centred_panels(rank: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    x, y = (torch.rand(LOCAL, width, generator=g).bfloat16().requires_grad_() for width in (300, 20))
    with Largest() as largest:
        torch.autograd.grad(global_hsic(x, y), (x, y))
    return {"numbers": torch.tensor(largest.numbers)}


def streamed(rank: int) -> dict[str, torch.Tensor]:
    """A rank's own CKA, and that of all."""
    metric = MinibatchCKA()
    own = metric(*(t[rank * LOCAL : (rank + 1) * LOCAL] for t in data()))
    return {"own": own, "all": metric.compute()}


OPTIONS: dict[str, dict[str, str]] = {
    "biased": {},
    "unbiased": {"estimator": "unbiased"},
    "median": {"bandwidth": "median"},
    "gretton": {"normalizer": "(n-1)^2"},
}
JOBS = {
    f"{p}-{name}": partial(train_step, penalty=p, **OPTIONS[name]) for p in ("gathered", "rows") for name in OPTIONS
}
JOBS |= {"both_gradients": both_gradients, "centred_panels": centred_panels, "streamed": streamed, "uneven": uneven}


def test_a_streamed_metric_counts_the_batches_of_all_ranks(tmp_path: Path) -> None:
    metric, (x, y) = MinibatchCKA(), data()
    for a, b in zip(x.split(LOCAL), y.split(LOCAL), strict=True):
        metric.update(a, b)
    ranks = run_ranks("streamed", tmp_path)
    assert all(torch.equal(rank["all"], metric.compute()) for rank in ranks)
    assert not torch.equal(ranks[0]["own"], ranks[1]["own"])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("penalty", ["gathered", "rows"])
def test_two_ranks_equal_one_process(penalty: str, options: str, tmp_path: Path) -> None:
    x, z = data()
    model = encoder()
    loss = hsic(x, model(z), sigma=(5.0, 0.5), **OPTIONS[options])
    loss.backward()
    for result in run_ranks(f"{penalty}-{options}", tmp_path):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(result[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))


def test_row_blocks_give_both_gradients(tmp_path: Path) -> None:
    x, y = (t.double().requires_grad_() for t in data())
    value = hsic(x, y)
    grads = torch.autograd.grad(value, (x, y))
    ranks = run_ranks("both_gradients", tmp_path)
    assert torch.equal(ranks[0]["value"], ranks[1]["value"])
    torch.testing.assert_close(ranks[0]["value"], value.detach(), rtol=1e-12, atol=0)
    for name, expected in zip(("grad_x", "grad_y"), grads, strict=True):
        torch.testing.assert_close(torch.cat([r[name] for r in ranks]), expected, rtol=1e-9, atol=1e-15)
    expected_half = hsic(x.detach().bfloat16(), y.detach().bfloat16())
    torch.testing.assert_close(ranks[0]["half"], expected_half, rtol=1e-5, atol=0)


def test_ranks_with_unequal_batches_are_told_so(tmp_path: Path) -> None:
    assert all("value" in result for result in run_ranks("uneven", tmp_path))


def test_row_blocks_centre_the_samples_of_one_rank_at_a_time(tmp_path: Path) -> None:
    for result in run_ranks("centred_panels", tmp_path):
        assert result["numbers"] == LOCAL * 300


@pytest.mark.parametrize("options", ["biased", "unbiased"])
def test_row_blocks_on_tensor_cores(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way a GPU takes, interpreted: Gram rows from bf16 halves, weights and the Laplacian product in Triton."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here: see the cuda test")
    import mimir_kernels.gram  # noqa: F401

    monkeypatch.setattr(row_blocks, "runs_triton", lambda *given: True)
    x, z = data()
    model = encoder()
    loss = hsic(x, model(z), sigma=(5.0, 0.5), **OPTIONS[options])
    loss.backward()
    for result in run_ranks(f"rows-{options}", tmp_path):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-3 if options == "unbiased" else 1e-4, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(result[name], p.grad, rtol=1e-2, atol=1e-3 * float(p.grad.abs().max()))


@pytest.mark.cuda
def test_row_blocks_on_a_gpu_equal_hsic() -> None:
    """One process that plays the second of two ranks, with the other's samples at hand."""
    x, y = (t.flatten(1).cuda() for t in data())
    gamma_x, gamma_y = gamma(x, 5.0, "reference"), gamma(y, 5.0, "reference")
    _, r, q = pair_sums_reference(x.double(), y.double(), gamma_x, gamma_y)
    own, blocks = slice(LOCAL, 2 * LOCAL), (slice(0, LOCAL), slice(LOCAL, 2 * LOCAL))
    rows_x, rows_y = row_blocks._rows(x, gamma_x, y, own), row_blocks._rows(y, gamma_y, x, own)
    for columns in blocks:
        rows_x.tile(columns, sums=True), rows_y.tile(columns, sums=True)
    torch.testing.assert_close(rows_x.sums, r[own], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows_y.sums, q[own], rtol=1e-5, atol=1e-6)


def test_alone_it_is_hsic() -> None:
    x, y = data()
    assert torch.equal(global_hsic(x, y, estimator="unbiased"), hsic(x, y, estimator="unbiased"))


def test_alone_returns_its_input() -> None:
    x = torch.rand(3, 2)
    assert gather_batch(x) is x


@pytest.mark.parametrize("shape", [(5, 3), (1, 2, 2)], ids=str)
def test_alone_keeps_the_gradient(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(gather_batch(x).square().sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach())
