"""Repetition, frequency and presence penalties, and the token counts they need.

Counts live on the device, one vocabulary-wide row for each request with a penalty, and are advanced by the tokens
committed since they were last asked for: a tick costs the new tokens, not the whole context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmd.model.transfer import to_device
from spmd.schedule.request import Request, SamplingParams

IN_PROMPT, ONE_OUTPUT = 1, 2  # a count is bit 0: in the prompt, and above it the occurrences in the output


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


@dataclass(slots=True)
class _Entry:
    row: int  # of the table
    counted: int  # tokens of the request that are in the table


class TokenCounts:
    """int32 table [rows, vocab], grown on demand; rows of finished requests are taken over by new ones."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.free: list[int] = []
        self.entries: dict[Request, _Entry] = {}

    def of(self, requests: Sequence[Request]) -> Tensor:
        """Counts [len(requests), vocab] of prompt and committed output, as a copy."""
        rows: list[int] = []
        new_rows: list[int] = []
        new_tokens: list[int] = []
        for request in requests:
            entry = self.entries.get(request) or self._enter(request)
            new = request.tokens[entry.counted :]
            entry.counted += len(new)
            rows.append(entry.row)
            new_rows += [entry.row] * len(new)
            new_tokens += new
        if new_tokens:
            at, token = to_device([new_rows, new_tokens], torch.int64, self.table.device)
            self.table.index_put_((at, token), self.table.new_full((), ONE_OUTPUT), accumulate=True)
        return self.table[to_device(rows, torch.int64, self.table.device)]

    def _enter(self, request: Request) -> _Entry:
        if not self.free:
            self._make_room()
        entry = self.entries[request] = _Entry(self.free.pop(), request.prompt_len)
        prompt = to_device(request.tokens[: request.prompt_len], torch.int64, self.table.device)
        self.table[entry.row].zero_().index_fill_(0, prompt, IN_PROMPT)
        return entry

    def _make_room(self) -> None:
        finished = [request for request in self.entries if request.finish_reason is not None]
        self.free = [self.entries.pop(request).row for request in finished]
        if not self.free:
            rows = len(self.table)
            self.free = list(range(rows, max(8, 2 * rows)))
            self.table = torch.cat([self.table, self.table.new_zeros(len(self.free), self.table.shape[1])])


def apply_penalties(scores: Tensor, counts: Tensor, requests: Sequence[Request]) -> Tensor:
    """Penalised copy of `scores` [rows, vocab], given the `TokenCounts` of the same rows.

    As in vLLM: repetition over prompt and output (a positive score is divided, a negative one multiplied), frequency
    and presence subtracted for the output alone.
    """
    columns = [(r.params.repetition_penalty, r.params.frequency_penalty, r.params.presence_penalty) for r in requests]
    repetition, frequency, presence = to_device(columns, torch.float32, scores.device)[:, :, None].unbind(1)
    occurrences = counts // ONE_OUTPUT
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(counts > 0, repeated, scores)
    return scores - frequency * occurrences - presence * (occurrences > 0)
