"""The kernel for a decode batch's products against float32: every row count and tiling, alone and in a chain."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.backend.cuda.decode_gemm import MOST, MOST_IF_SMALL, SMALL, Products, supported, tiling

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HOPPER = DEVICE.type == "cuda" and supported(DEVICE)
PROCESSORS = 132
CUTS = {  # N, K and halves: weight rows of a block and parts, at 8 rows and at 128
    (6144, 512, 1): ((64, 1), (64, 1)),
    (4096, 2048, 1): ((64, 2), (64, 2)),
    (8960, 1024, 1): ((128, 1), (128, 1)),
    (24576, 512, 2): ((192, 1), (192, 1)),
    (1024, 2048, 1): ((64, 2), (64, 2)),
    (6144, 1024, 2): ((64, 1), (64, 1)),
}
ERROR = 2e-3  # of the norm; rounding to bfloat16 alone makes 1.7e-3

hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).bfloat16()


def exact(x: Tensor, weight: Tensor, halves: int) -> Tensor:
    product = x.float() @ weight.float().T
    if halves == 1:
        return product
    gate, up = product.chunk(2, dim=1)
    return F.silu(gate) * up


def test_tilings() -> None:
    """Most blocks in one wave; what can't be cut up so is left to cuBLAS."""
    for (size, columns, halves), (few, many) in CUTS.items():
        for rows in range(1, MOST_IF_SMALL + 1):
            cut = tiling(rows, size, columns, halves, PROCESSORS)
            if size * columns > SMALL and rows > MOST:
                assert cut is None
                continue
            assert cut and cut.slots >= 2 and cut.rows <= MOST
            assert cut.shared_bytes <= 227 * 1024 - 512
            groups = -(-rows // cut.rows)
            assert rows <= cut.rows * groups < rows + 8 * groups
            assert size // cut.outs * cut.parts * groups <= PROCESSORS
            if rows in (8, MOST):
                assert (cut.outs, cut.parts) == (few if rows == 8 else many)
    assert not tiling(8, 512, 2048, 1, PROCESSORS)  # too few blocks
    assert not tiling(8, 6144, 4096 + 128, 1, PROCESSORS)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("shape", CUTS)
def test_every_row_count(shape: tuple[int, int, int]) -> None:
    """Right, nothing left out, nothing written behind the last row; a row's bits depend on no other row."""
    size, columns, halves = shape
    most = MOST_IF_SMALL if size * columns <= SMALL else MOST
    counts = [*range(1, MOST + 1), *range(MOST + 1, most + 1, 9), most]
    products = Products([shape], counts, DEVICE)
    weight, x = drawn(size, columns) / columns**0.5, drawn(most, columns, seed=1)
    all_rows = products(x, weight, halves)
    assert all_rows is not None and all_rows.shape == (most, size // halves)
    for rows in counts:
        out = torch.full((rows + 1, size // halves), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        products.launch(products.tilings[rows, *shape], x[:rows], weight, out[:rows])
        assert torch.equal(out[:rows], all_rows[:rows]) and out[rows].isnan().all(), rows
    expected = exact(x, weight, halves)
    assert float((all_rows.float() - expected).norm() / expected.norm()) < ERROR


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("rows", [8, 40, 128])
def test_chain_in_a_graph(rows: int) -> None:
    """Kernels that start while others still run compute the same as one after the other."""
    from spmd.backend.cuda.layer_kernels import add_norm

    hidden, inner = 2048, 8192
    products = Products([(2 * inner, hidden, 2), (hidden, inner, 1)], [rows], DEVICE)
    assert len(products.tilings) == 2 and all(products.tilings.values())
    layers = [(drawn(2 * inner, hidden, seed=i) / 64, drawn(hidden, inner, seed=i + 9) / 64) for i in range(4)]
    norm, given, added = drawn(hidden), drawn(rows, hidden), drawn(rows, hidden)

    def forward(after_each: Callable[[], None]) -> Tensor:
        x, residual = given.clone(), added.clone()
        for up, down in layers:
            x, residual = add_norm(x, residual, norm, 1e-6)
            after_each()
            for weight, halves in ((up, 2), (down, 1)):
                found = products(x, weight, halves)
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
    products = Products([(6144, 512, 1), (64, 512, 1)], [8], DEVICE)
    assert products(drawn(8, 512), drawn(64, 512)) is None
    assert products(drawn(9, 512), drawn(6144, 512)) is None
    assert products(drawn(8, 512), drawn(6144, 512), halves=2) is None
    assert products(drawn(8, 512), drawn(6144, 512)) is not None
