"""From a plan to tensors: token ids, positions, KV slots and block tables of one forward.

Block tables live here, one row a seat, and grow by the entries each plan brings, so a tick costs what changed and
not what is running.
"""

import torch
from torch import Tensor

from spmd.model.batch import Batch, Span
from spmd.schedule.plan import Plan


class InputBuilder:
    """Builds the Batch of a plan. Every rank of a replica builds the same one."""

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        """`max_blocks`: blocks of the longest request. One more seat, of null blocks, belongs to the padding."""
        self.block_size = block_size
        self.device = device
        self.padding_seat = max_num_seqs
        self.tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int64)

    def build(self, plan: Plan) -> tuple[Tensor, Batch]:
        """Token ids int64 [T] and the Batch, T = plan.num_rows; padding rows are token 0 at position 0."""
        self._grow(plan)
        padding = plan.padded_decodes - plan.num_decodes
        decodes = plan.requests[: plan.num_decodes]
        tokens = [request.tokens[start] for request, start in zip(decodes, plan.starts, strict=False)] + [0] * padding
        positions = plan.starts[: plan.num_decodes] + [0] * padding
        seats = [request.seat for request in decodes] + [self.padding_seat] * padding
        spans = []
        for index in range(plan.num_decodes, len(plan.requests)):
            request, start, count = plan.requests[index], plan.starts[index], plan.counts[index]
            end = start + count
            table = self.tables[request.seat, : -(-end // self.block_size)]
            spans.append(Span(len(tokens), count, end, table.to(self.device)))
            tokens += request.tokens[start:end]
            positions += range(start, end)
            seats += [request.seat] * count
        return self._batch(plan, tokens, positions, seats, spans)

    def _batch(
        self, plan: Plan, tokens: list[int], positions: list[int], seats: list[int], spans: list[Span]
    ) -> tuple[Tensor, Batch]:
        rows = plan.padded_decodes
        position, seat = torch.tensor([positions, seats])
        slots = self.tables[seat, position // self.block_size] * self.block_size + position % self.block_size
        lens = position[:rows] + 1
        width = max(positions[:rows], default=0) // self.block_size + 1
        batch = Batch(
            positions=position.to(self.device),
            slots=slots.to(self.device),
            num_decodes=rows,
            decode_tables=self.tables[seat[:rows], :width].to(self.device),
            decode_lens=lens.to(self.device),
            prefills=spans,
            sample_rows=torch.tensor(plan.sample_rows, dtype=torch.int64, device=self.device),
        )
        return torch.tensor(tokens, device=self.device), batch

    def _grow(self, plan: Plan) -> None:
        if plan.grown:
            seats, places, blocks = torch.tensor(plan.grown).T
            self.tables[seats, places] = blocks
