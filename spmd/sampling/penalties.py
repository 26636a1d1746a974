"""Repetition, frequency and presence penalties, and the token counts they need.

Counts live on the device, one vocabulary-wide row for each request with a penalty. Sampled tokens are added there, as
soon as they are chosen: the host may learn of them later, when the request has been sampled again already.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spmd.parallel.transfer import to_device
from spmd.schedule.request import Request

IN_PROMPT, ONE_OUTPUT = 1, 2  # a count is bit 0: in the prompt, and above it the occurrences in the output


class TokenCounts:
    """int32 table [rows, vocab], enlarged on demand; rows of finished requests are taken over by new ones.

    Nobody samples for a request after its row has gone to another: `finished` is set by the scheduler when it commits
    the plan that ends the request, and every plan that holds the request was made, and run here, before that commit.
    Between the leader's decision that it ends and the commit, tokens that will be thrown away are still counted, but
    in the request's own row. So it is with one that is computed once more, alone: it is entered anew.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.free: list[int] = []
        self.taken: dict[tuple[Request, bool], int] = {}  # of a request, and of one that is computed alone

    def places(self, requests: Sequence[Request]) -> list[int]:
        """Row of the table of each of these requests, none of them `finished`.

        A request is entered with its prompt and committed output when it is first seen; from then on each of its tokens
        must be counted. The table may be another one afterwards.
        """
        return [self.taken[key] if (key := (r, r.alone)) in self.taken else self._enter(r) for r in requests]

    def rows(self, requests: Sequence[Request]) -> Tensor:
        """The same, int64 [R] on the device."""
        return to_device(self.places(requests), torch.int64, self.table.device)

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count one more output token in each of `rows`; both int64 [R] on the device."""
        self.table.index_put_((rows, token_ids), self.table.new_full((), ONE_OUTPUT), accumulate=True)

    def _enter(self, request: Request) -> int:
        if not self.free:
            self._make_room()
        row = self.taken[request, request.alone] = self.free.pop()
        tokens = to_device(request.tokens(), torch.int64, self.table.device)
        self.table[row].zero_().index_fill_(0, tokens[: request.prompt_len], IN_PROMPT)
        output = tokens[request.prompt_len :]
        self.add(torch.full_like(output, row), output)
        return row

    def _make_room(self) -> None:
        over = [(request, alone) for request, alone in self.taken if request.finished or request.alone != alone]
        self.free = [self.taken.pop(key) for key in over]
        if not self.free:
            rows = len(self.table)
            self.free = list(range(rows, max(8, 2 * rows)))
            self.table = torch.cat([self.table, self.table.new_zeros(len(self.free), self.table.shape[1])])


def apply_penalties(scores: Tensor, counts: Tensor, requests: Sequence[Request]) -> Tensor:
    """Penalised copy of `scores` [rows, vocab], given the rows [rows, vocab] of `TokenCounts`.

    As in vLLM: repetition over prompt and output (a positive score is divided, a negative one multiplied), frequency
    and presence subtracted for the output alone.
    """
    columns = [(r.params.repetition_penalty, r.params.frequency_penalty, r.params.presence_penalty) for r in requests]
    repetition, frequency, presence = to_device(columns, torch.float32, scores.device)[:, :, None].unbind(1)
    occurrences = counts // ONE_OUTPUT
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(counts > 0, repeated, scores)
    return scores - frequency * occurrences - presence * (occurrences > 0)
