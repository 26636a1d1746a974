"""One stage's forward of any batch: by CUDA graph where one was captured for it, else kernel by kernel.

A graph replays one forward's kernels with one launch, at fixed addresses and shapes, which is why batches are padded
to few row counts. Those of decodes are whole graphs, those with prompts go in pieces
(`spmd.backend.cuda.mixed_graph`), as far as they have too little work to hide their launches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spmd.model.backend import Backend
from spmd.model.batch import Batch
from spmd.model.decoder import Decoder
from spmd.stage.inputs import InputBuilder

Mixed = Callable[[Tensor, Batch], Tensor]


class Forward:
    """`decoder` with the backend that takes any batch."""

    def __init__(self, decoder: Decoder, backend: Backend) -> None:
        self.decoder = decoder
        self.backend = backend
        self.graphs: dict[int, DecodeGraph] = {}
        self.mixed: dict[int, Mixed] = {}  # by rows of a batch with prompts

    def capture(self, rows: int, inputs: InputBuilder) -> None:
        """Capture decode batches of `rows` rows, padding included. Largest first: smaller ones share its memory."""
        pool = next((graph.graph.pool() for graph in self.graphs.values()), None)
        self.graphs[rows] = DecodeGraph(self.decoder, self.backend, inputs, rows, pool)

    def capture_mixed(self, buckets: Sequence[int], samples: int, inputs: InputBuilder) -> None:
        """Capture batches with prompts of so many rows each, largest first, of which at most `samples` are sampled."""
        from spmd.backend.cuda.backend import CudaBackend
        from spmd.backend.cuda.mixed_graph import MixedGraphs

        assert isinstance(self.backend, CudaBackend)
        graphs = MixedGraphs(self.decoder, self.backend, buckets[0], samples)
        for rows in buckets:
            graphs.capture(*inputs.padding(0, rows))
        self.mixed = dict.fromkeys(buckets, graphs)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """See `Decoder.forward`. Logits last until the next call."""
        alike = batch.shared_rows in (None, batch.num_decodes)  # a graph shares as many rows as it has
        graph = self.graphs.get(batch.num_decodes) if alike and not batch.prefills else None
        if graph:
            return graph(x)
        self.backend.prepare(batch)
        if batch.prefills and (mixed := self.mixed.get(len(batch.positions))):
            return mixed(x, batch)
        output: Tensor = self.decoder(x, batch, self.backend)
        return output


class DecodeGraph:
    """The captured forward of `rows` decode rows, for which the backend has nothing to prepare."""

    def __init__(self, decoder: Decoder, backend: Backend, inputs: InputBuilder, rows: int, pool: Any) -> None:
        ids, batch = inputs.padding(rows)
        arch = decoder.arch
        self.last = decoder.last
        self.x = ids if decoder.first else torch.zeros(rows, arch.hidden_size, dtype=arch.dtype, device=ids.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled, tuned or allocated at first use must not be captured
            for _ in range(2):
                decoder(self.x, batch, backend)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output: Tensor = decoder(self.x, batch, backend)

    def __call__(self, x: Tensor) -> Tensor:
        if x.data_ptr() != self.x.data_ptr():
            self.x.copy_(x)
        self.graph.replay()
        return self.output if self.last else self.output.clone()  # what is being sent must outlive the next replay
