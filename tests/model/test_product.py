"""The kernel for a decode batch's products against float32: every row count and tiling, alone and in a chain."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spmd.model.product import Products, supported
from spmd.model.tiling import MOST, tiling

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HOPPER = DEVICE.type == "cuda" and supported(DEVICE)
PROCESSORS = 132
CUTS = {(6144, 512): (64, 1), (4096, 1536): (64, 2), (8960, 768): (128, 1), (24576, 512): (192, 1)}  # outs, parts
ERROR = 2e-3  # of the norm; rounding to bfloat16 alone makes 1.7e-3

hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).bfloat16()


def test_tilings() -> None:
    """Most blocks in one wave; what can't be cut up so is left to cuBLAS."""
    for rows in range(1, MOST + 1):
        for shape, expected in CUTS.items():
            cut = tiling(rows, *shape, PROCESSORS)
            assert cut and (cut.outs, cut.parts) == expected and cut.slots >= 2 and rows <= cut.rows < rows + 8
            assert cut.shared_bytes <= 227 * 1024 - 512
    assert not tiling(MOST + 1, 6144, 4096, PROCESSORS)
    assert not tiling(8, 1024, 4096, PROCESSORS)  # too few blocks
    assert not tiling(8, 6144, 4096 + 128, PROCESSORS)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("shape", CUTS)
def test_every_row_count(shape: tuple[int, int]) -> None:
    """Right, nothing left out, nothing written behind the last row; a row's bits depend on no other row."""
    counts = range(1, MOST + 1)
    products = Products([shape], counts, DEVICE)
    weight, x = drawn(*shape), drawn(MOST, shape[1], seed=1)
    exact = x.float() @ weight.float().T
    most = products(x, weight)
    assert most is not None
    for rows in counts:
        out = torch.full((rows + 1, shape[0]), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        products.launch(products.tilings[rows, *shape], x[:rows], weight, out[:rows])
        assert torch.equal(out[:rows], most[:rows]) and out[rows].isnan().all(), rows
    assert float((most.float() - exact).norm() / exact.norm()) < ERROR


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("rows", [8, 40, 128])
def test_chain_in_a_graph(rows: int) -> None:
    """Kernels that start while others still run compute the same as one after the other."""
    from spmd.model.kernels import add_norm, gated

    hidden, inner = 2048, 8192
    products = Products([(2 * inner, hidden), (hidden, inner)], [rows], DEVICE)
    assert len(products.tilings) == 2
    layers = [(drawn(2 * inner, hidden, seed=i) / 64, drawn(hidden, inner, seed=i + 9) / 64) for i in range(4)]
    norm, given, added = drawn(hidden), drawn(rows, hidden), drawn(rows, hidden)

    def forward(after_each: Callable[[], None]) -> Tensor:
        x, residual = given.clone(), added.clone()
        for up, down in layers:
            for kernel in (lambda x: add_norm(x, residual, norm, 1e-6)[0], lambda x, up=up: products(x, up), gated):
                x = kernel(x)
                after_each()
            found = products(x, down)
            assert found is not None
            x = found
            after_each()
        return x + residual

    forward(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(lambda: None)
    for seed in range(20):
        given.copy_(drawn(rows, hidden, seed=seed))
        graph.replay()
        assert torch.equal(output, forward(torch.cuda.synchronize))
        assert output.isfinite().all()


@pytest.mark.gpu
@hopper
def test_what_was_not_compiled() -> None:
    products = Products([(6144, 512), (64, 512)], [8], DEVICE)
    assert products(drawn(8, 512), drawn(64, 512)) is None
    assert products(drawn(9, 512), drawn(6144, 512)) is None
    assert products(drawn(8, 512), drawn(6144, 512)) is not None
