"""From a plan to tensors: token ids, positions, seats and block tables of one forward.

Block tables live here, one row a seat, and grow by the entries each plan brings, so a tick costs what changed and
not what is running. On GPUs every plan's numbers land at the same addresses, so that CUDA graphs can read them.
"""

import torch
from torch import Tensor

from spmd.model.batch import Batch, Span
from spmd.parallel.transfer import on_host, to_device
from spmd.schedule.plan import Plan


class InputBuilder:
    """Builds the Batch of a plan. Every rank of a replica builds the same one."""

    def __init__(
        self, max_num_seqs: int, max_blocks: int, max_rows: int, block_size: int, device: torch.device
    ) -> None:
        """`max_blocks`: blocks of the longest request; `max_rows`: of the largest plan, padding included.

        One more seat, of null blocks, belongs to the padding.
        """
        self.block_size = block_size
        self.device = device
        self.padding_seat = max_num_seqs
        self.tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.columns = torch.zeros(3 * max_rows, dtype=torch.int64, device=device)

    def build(self, plan: Plan, latest: Tensor | None = None, decode_rows: int | None = None) -> tuple[Tensor, Batch]:
        """Token ids int64 [T] and the Batch, T = plan.num_rows; padding rows are token 0 at position 0.

        Args:
            latest: int64 [seats], the last token of each seat, on the device; if given, decode rows take theirs from
                there, since the host may not know it yet.
            decode_rows: that the decodes of a plan without prompts take, if not `plan.padded_decodes`.
        """
        self._enter_new_blocks(plan)
        decodes = plan.requests[: plan.num_decodes]
        rows = plan.padded_decodes if decode_rows is None else decode_rows
        padding = [0] * (rows - plan.num_decodes)
        positions = plan.starts[: plan.num_decodes] + padding
        if latest is None:
            tokens = [r.output[at - r.prompt_len] for r, at in zip(decodes, positions, strict=False)] + padding
        else:
            tokens = [0] * rows
        seats = [request.seat for request in decodes] + [self.padding_seat] * len(padding)
        widths = [position // self.block_size + 1 for position in positions]
        spans = []
        for index in range(plan.num_decodes, len(plan.requests)):
            request, start, count = plan.requests[index], plan.starts[index], plan.counts[index]
            spans.append(Span(len(tokens), count, start + count, request.seat))
            tokens += request.tokens(start, start + count)
            positions += range(start, start + count)
            seats += [request.seat] * count
        behind = [0] * plan.padding
        tokens, positions, seats = tokens + behind, positions + behind, seats + [self.padding_seat] * plan.padding
        ids, position, seat = self._upload(tokens + positions + seats).view(3, -1)
        if latest is not None and rows:
            torch.index_select(latest, 0, seat[:rows], out=ids[:rows])
        sample_rows = to_device(plan.sample_rows, torch.int64, self.device) if spans or not decodes else None
        return ids, Batch(position, seat, self.tables, widths, spans, sample_rows)

    def padding(self, rows: int, prompt: int = 0) -> tuple[Tensor, Batch]:
        """Token ids and Batch of `rows` padding rows, then a prompt of as many tokens, all in null blocks.

        Without a prompt at the addresses of any plan with as many decodes and no prompts, and as wide as the longest
        request: a graph captured with it fits every such plan. Other replicas are taken to run as many rows.
        """
        total = rows + prompt
        tokens_and_positions = [0] * (total + rows) + [*range(prompt)]
        ids, position, seat = self._upload(tokens_and_positions + [self.padding_seat] * total).view(3, -1)
        spans = [Span(rows, prompt, prompt, self.padding_seat)] if prompt else []
        return ids, Batch(position, seat, self.tables, [self.tables.shape[1]] * rows, spans, None, total)

    def _upload(self, values: list[int]) -> Tensor:
        if self.device.type == "cpu":
            return on_host(values, torch.int64)
        return self.columns[: len(values)].copy_(on_host(values, torch.int64, pinned=True), non_blocking=True)

    def _enter_new_blocks(self, plan: Plan) -> None:
        if plan.new_blocks:
            seats, places, blocks = to_device(plan.new_blocks, torch.int64, self.device).unbind(1)
            self.tables[seats, places] = blocks.int()
