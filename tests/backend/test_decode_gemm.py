"""The kernel for a decode batch's products against float32: every row count and tiling, alone and in a chain."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.backend.cuda.decode_gemm import (
    MAX_ROWS,
    MAX_ROWS_IF_SMALL,
    SMALL_WEIGHT,
    DecodeGemm,
    choose_tiling,
    supported,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HOPPER = DEVICE.type == "cuda" and supported(DEVICE)
PROCESSORS = 132
TILES = {  # N, K and whether gated: tile_n and split_k, at 8 rows and at 128
    (6144, 512, False): ((64, 1), (64, 1)),
    (4096, 2048, False): ((64, 2), (64, 2)),
    (8960, 1024, False): ((128, 1), (128, 1)),
    (24576, 512, True): ((192, 1), (192, 1)),
    (1024, 2048, False): ((64, 2), (64, 2)),
    (6144, 1024, True): ((64, 1), (64, 1)),
}
ERROR = 2e-3  # of the norm; rounding to bfloat16 alone makes 1.7e-3

hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).bfloat16()


def exact(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    product = x.float() @ weight.float().T
    if not gated:
        return product
    gate, up = product.chunk(2, dim=1)
    return F.silu(gate) * up


def test_tilings() -> None:
    """Most blocks in one wave; what can't be cut up so is left to cuBLAS."""
    for (size, columns, gated), (few, many) in TILES.items():
        for rows in range(1, MAX_ROWS_IF_SMALL + 1):
            tiling = choose_tiling(rows, size, columns, gated, PROCESSORS)
            if size * columns > SMALL_WEIGHT and rows > MAX_ROWS:
                assert tiling is None
                continue
            assert tiling and tiling.stages >= 2 and tiling.tile_m <= MAX_ROWS
            assert tiling.shared_bytes <= 227 * 1024 - 512
            tiles = -(-rows // tiling.tile_m)
            assert rows <= tiling.tile_m * tiles < rows + 8 * tiles
            assert size // tiling.tile_n * tiling.split_k * tiles <= PROCESSORS
            if rows in (8, MAX_ROWS):
                assert (tiling.tile_n, tiling.split_k) == (few if rows == 8 else many)
    assert not choose_tiling(8, 512, 2048, False, PROCESSORS)  # too few blocks
    assert not choose_tiling(8, 6144, 4096 + 128, False, PROCESSORS)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("shape", TILES)
def test_every_row_count(shape: tuple[int, int, bool]) -> None:
    """Right, nothing left out, nothing written behind the last row; a row's bits depend on no other row."""
    size, columns, gated = shape
    width = size // 2 if gated else size
    most = MAX_ROWS_IF_SMALL if size * columns <= SMALL_WEIGHT else MAX_ROWS
    counts = [*range(1, MAX_ROWS + 1), *range(MAX_ROWS + 1, most + 1, 9), most]
    gemm = DecodeGemm([shape], counts, DEVICE)
    weight, x = drawn(size, columns) / columns**0.5, drawn(most, columns, seed=1)
    all_rows = gemm(x, weight, gated)
    assert all_rows is not None and all_rows.shape == (most, width)
    for rows in counts:
        out = torch.full((rows + 1, width), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        gemm.launch(gemm.tilings[rows, *shape], x[:rows], weight, out[:rows])
        assert torch.equal(out[:rows], all_rows[:rows]) and out[rows].isnan().all(), rows
    expected = exact(x, weight, gated)
    assert float((all_rows.float() - expected).norm() / expected.norm()) < ERROR


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("rows", [8, 40, 128])
def test_chain_in_a_graph(rows: int) -> None:
    """Kernels that start while others still run compute the same as one after the other."""
    from spmd.backend.cuda.layer_kernels import add_norm

    hidden, inner = 2048, 8192
    gemm = DecodeGemm([(2 * inner, hidden, True), (hidden, inner, False)], [rows], DEVICE)
    assert len(gemm.tilings) == 2 and all(gemm.tilings.values())
    layers = [(drawn(2 * inner, hidden, seed=i) / 64, drawn(hidden, inner, seed=i + 9) / 64) for i in range(4)]
    norm, given, added = drawn(hidden), drawn(rows, hidden), drawn(rows, hidden)

    def forward(after_each: Callable[[], None]) -> Tensor:
        x, residual = given.clone(), added.clone()
        for up, down in layers:
            x, residual = add_norm(x, residual, norm, 1e-6)
            after_each()
            for weight, gated in ((up, True), (down, False)):
                found = gemm(x, weight, gated)
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
    gemm = DecodeGemm([(6144, 512, False), (64, 512, False)], [8], DEVICE)
    assert gemm(drawn(8, 512), drawn(64, 512)) is None
    assert gemm(drawn(9, 512), drawn(6144, 512)) is None
    assert gemm(drawn(8, 512), drawn(6144, 512), gated=True) is None
    assert gemm(drawn(8, 512), drawn(6144, 512)) is not None
