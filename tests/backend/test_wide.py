"""Attention of many decode rows, planned once, against plain PyTorch in float32: lengths change, in a graph too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.backend.cuda.limits import CAPABILITY
from spmd.backend.kv_cache import KVCache
from spmd.model.batch import Batch
from spmd.model.cache_spec import CacheSpec

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ROWS, HEADS, KV_HEADS, HEAD_DIM = 160, 16, 8, 128
SIZE, MOST = 64, 20  # tokens of a block, blocks of a row
TOLERANCE = 4e-3  # of the norm; rounding to bfloat16 makes 2e-3 to 3e-3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cpu" or torch.cuda.get_device_capability(DEVICE) < CAPABILITY, reason="needs a Hopper GPU"
    ),
]


def expected(q: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> Tensor:
    found = []
    for row in range(ROWS):
        length = int(batch.positions[row]) + 1
        blocks = batch.tables[batch.seats[row], : -(-length // SIZE)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float() for cache in (keys, values))
        found.append(F.scaled_dot_product_attention(q[row].float()[:, None], k, v, enable_gqa=True)[:, 0])
    return torch.stack(found)


def test_any_lengths() -> None:
    pytest.importorskip("flashinfer")
    from spmd.backend.cuda.flashinfer import WideDecode

    cache = KVCache([CacheSpec(KV_HEADS, HEAD_DIM, torch.bfloat16)], ROWS * MOST + 1, SIZE, DEVICE)
    cache.keys.normal_()
    cache.values.normal_()
    tables = torch.zeros(ROWS + 1, MOST, dtype=torch.int32, device=DEVICE)
    tables[:ROWS] = 1 + torch.randperm(ROWS * MOST, device=DEVICE).view(ROWS, MOST)
    positions, seats = (torch.zeros(ROWS, dtype=torch.int64, device=DEVICE) for _ in range(2))
    batch = Batch(positions, seats, tables, [MOST] * ROWS, [], None)
    q, output = (torch.randn(ROWS, HEADS, HEAD_DIM, device=DEVICE).bfloat16() for _ in range(2))
    wide = WideDecode(ROWS, HEADS, cache, MOST, torch.empty(2**27, dtype=torch.uint8, device=DEVICE))

    def attend() -> None:
        wide.fill(batch)
        wide(q, cache.keys[0], cache.values[0], output)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for longest in (1, 2, SIZE, 300, MOST * SIZE):
        positions.random_(longest)
        positions[0], positions[-1] = longest - 1, 0  # the last as padding does
        seats.copy_(torch.randperm(ROWS, device=DEVICE))
        output.fill_(float("nan"))
        graph.replay()
        exact = expected(q, cache.keys[0], cache.values[0], batch)
        assert float((output.float() - exact).norm() / exact.norm()) < TOLERANCE, longest
