"""A forward with prompts as CUDA graphs, cut where attention is: the host plans that for each batch.

Kernel by kernel a layer takes the host ten launches, half a millisecond on many a machine. A batch of few rows takes
the device less. All of a layer but attention depends on nothing but the number of rows; so it is captured, from one
layer's attention to the next one's, for a few numbers of rows that batches are padded to. Attention runs between these
pieces as it does without graphs.

Queries go from a piece to attention, and its output to the next piece, through one place each. Padding rows behind the
prompts are token 0 at position 0 of a request of null blocks; attention gives them zeros, so that the null block, where
their keys and values go, keeps finite numbers. All runs on one stream: whatever is read was written before.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spmd.backend.cuda.backend import CudaBackend
from spmd.model.architecture import Architecture
from spmd.model.batch import Batch
from spmd.model.decoder import Decoder


class Cut:
    """Attention's place while a forward is captured: one piece ends there, the next one begins."""

    def __init__(self, arch: Architecture, heads: int, rows: int, device: torch.device) -> None:
        """`heads`: this rank's query heads; `rows`: of the largest batch."""
        self.heads = heads
        self.queries = torch.zeros(rows, heads, arch.head_dim, dtype=arch.dtype, device=device)
        self.attended = torch.zeros_like(self.queries)
        self.pool = torch.cuda.graph_pool_handle()
        self.capturing = False
        self.pieces: list[tuple[torch.cuda.CUDAGraph, int, int | None]] = []  # each with the layer and window behind it
        self.graph: Any = None

    def prepare(self, batch: Batch) -> None: ...

    def begin(self, batch: Batch) -> None: ...

    def __call__(self, layer: int, queries: Tensor, window: int | None, output: Tensor | None = None) -> Tensor:
        self.queries[: len(queries)].copy_(queries)
        if self.capturing:
            self.graph.capture_end()
            self.pieces.append((self.graph, layer, window))
            self.open()
        return self.attended[: len(queries)].flatten(1)

    def open(self) -> None:
        """Begin the next piece."""
        self.graph = torch.cuda.CUDAGraph()
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")


class MixedGraphs:
    """The forwards of one stage with prompts, of as many rows as were captured."""

    def __init__(self, decoder: Decoder, backend: CudaBackend, rows: int, samples: int) -> None:
        """`rows`: of the largest; `samples`: most tokens that a batch samples."""
        arch, device = decoder.arch, backend.cache.device
        self.decoder = decoder
        self.attention = backend.attention
        self.cut = Cut(arch, self.attention.heads, rows, device)
        self.backend = CudaBackend(arch, backend.cache, self.cut, None)
        self.hidden = None if decoder.first else torch.zeros(rows, arch.hidden_size, dtype=arch.dtype, device=device)
        self.sample_rows = torch.zeros(samples, dtype=torch.int64, device=device) if decoder.last else None
        self.output: Tensor | None = None  # of all graphs, as only one runs at a time
        self.graphs: dict[int, tuple[list[Any], torch.cuda.CUDAGraph]] = {}

    @torch.inference_mode()
    def capture(self, ids: Tensor, batch: Batch) -> None:
        """Capture batches of as many rows, given padding at the addresses of all of them. Largest first."""
        rows, cut = len(batch.positions), self.cut
        batch = replace(batch, sample_rows=self.sample_rows)
        x = ids if self.hidden is None else self.hidden[:rows]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            output = self.decoder(x, batch, self.backend)  # compiles and allocates what must not be captured
            if self.output is None:
                self.output = torch.empty_like(output)
            torch.cuda.synchronize()
            cut.pieces, cut.capturing = [], True
            cut.open()
            output = self.decoder(x, batch, self.backend)
            self.output[: len(output)].copy_(output)
            cut.graph.capture_end()
            cut.capturing = False
        torch.cuda.current_stream().wait_stream(side)
        self.graphs[rows] = cut.pieces, cut.graph

    @torch.inference_mode()
    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """See `Decoder.forward`; after `prepare`. Logits last until the next call."""
        rows = len(batch.positions)
        pieces, end = self.graphs[rows]
        if self.hidden is not None:
            self.hidden[:rows].copy_(x)
        sampled = 0
        if self.sample_rows is not None and batch.sample_rows is not None:
            sampled = len(batch.sample_rows)
            self.sample_rows[:sampled].copy_(batch.sample_rows)
            self.sample_rows[sampled:].zero_()  # what an earlier batch left there may lie behind this one's rows
        queries, attended = self.cut.queries[:rows], self.cut.attended[:rows]
        attended[batch.num_decodes + sum(span.count for span in batch.prefills) :].zero_()
        self.attention.begin(batch)
        for piece, layer, window in pieces:
            piece.replay()
            self.attention(layer, queries, window, attended)
        end.replay()
        assert self.output is not None
        return self.output[:sampled] if self.decoder.last else self.output[:rows].clone()
