"""Compiled layers: as many graphs as situations, none twice, and no limit reached."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from mimir_fast.data.batch import Batch
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.training.compile import compile_layers


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reached limit is an error, and counting starts at nothing."""
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "sdpa")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def batch_of(size: int) -> Batch:
    samples = torch.arange(size)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.zeros_like(samples), samples, torch.zeros_like(samples))


# ViT: attack and training for encoder, decoder's first and last layer, in two batch sizes, are 12; its preview attacks
# once more and decodes everywhere without gradients, 5. Swin has as many again for its stages and shifted windows.
@pytest.mark.parametrize(
    ("family", "patch_size", "at_most"), [("vit", 4, 20), pytest.param("swin", 2, 60, marks=pytest.mark.slow)]
)
def test_each_situation_has_one_graph(family: str, patch_size: int, at_most: int) -> None:
    model = build_masked_model(ModelConfig(family=family, encoder="nano", patch_size=patch_size), 32)
    eager = build_masked_model(ModelConfig(family=family, encoder="nano", patch_size=patch_size), 32)
    eager.load_state_dict(model.state_dict())
    compile_layers(model.layers(), backend="aot_eager")
    method = Mimir(MimirConfig())

    def train(size: int) -> torch.Tensor:
        model.zero_grad()
        loss = method(model, batch_of(size), seed=0, step=0)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in model.layers()[0].parameters())
        return loss.detach()

    situations: list[Callable[[], object]] = [
        lambda: train(4), lambda: method.preview(model, batch_of(4), seed=0, step=0), lambda: train(3),
    ]  # fmt: skip
    for situation in situations:
        situation()
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= at_most
    for situation in situations:
        situation()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    wanted = method(eager, batch_of(4), seed=0, step=0)["loss"]
    torch.testing.assert_close(train(4), wanted.detach(), rtol=1e-3, atol=1e-3)
