"""What one tick runs: which requests, how many tokens of each, where their keys and values go.

Equal on all ranks of a replica, so no rank has to be told: the receiver of hidden states knows their shape from its
own copy. Decode rows come first, then prompt chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spmd.schedule.request import Request


@dataclass(slots=True)
class Plan:
    tick: int
    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # position of each request's first token in this plan
    counts: list[int] = field(default_factory=list)  # tokens of each request in this plan
    num_decodes: int = 0  # the first requests, one token each
    padded_decodes: int = 0  # rows the decodes take in the forward, padding included
    num_prompt_tokens: int = 0
    padding: int = 0  # rows behind the prompts
    sampled: list[Request] = field(default_factory=list)  # requests that get a token from this plan
    sample_rows: list[int] = field(default_factory=list)  # row of the forward that each of them is sampled from
    sample_positions: list[int] = field(default_factory=list)  # where each token will stand: tokens before it
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # of block tables: (seat, position, block)
    cleared: list[int] = field(default_factory=list)  # blocks to be filled with zeros before the forward
    digests: tuple[int, ...] = ()  # digests of all plans so far, set by the engine; see `spmd.schedule.digests`

    @property
    def num_rows(self) -> int:
        """Rows of the forward: tokens and padding; the first dimension of the hidden states."""
        return self.padded_decodes + self.num_prompt_tokens + self.padding

    def add_decodes(self, requests: list[Request]) -> None:
        """Begin with the next token of each of these."""
        self.num_decodes = len(requests)
        self.requests = requests
        self.starts = [request.scheduled for request in requests]
        self.counts = [1] * len(requests)

    def add_chunk(self, request: Request, count: int) -> None:
        """Append the next `count` tokens of a prompt."""
        self.requests.append(request)
        self.starts.append(request.scheduled)
        self.counts.append(count)
        self.num_prompt_tokens += count

    def finalise(self, row_counts: Sequence[int], mixed_counts: Sequence[int] = ()) -> None:
        """Decide the padding and who is sampled, once all are in.

        Args:
            row_counts: in ascending order, to how many rows a plan of decodes alone is padded.
            mixed_counts: likewise, one with prompts; larger ones aren't.
        """
        self.padded_decodes = self.num_decodes
        if self.num_prompt_tokens:
            self.padding = next((rows for rows in mixed_counts if rows >= self.num_rows), self.num_rows) - self.num_rows
        elif self.num_decodes:
            self.padded_decodes = next(rows for rows in row_counts if rows >= self.num_decodes)
        self.sampled = self.requests[: self.num_decodes]
        self.sample_rows = list(range(self.num_decodes))
        self.sample_positions = [start + 1 for start in self.starts[: self.num_decodes]]
        row = self.padded_decodes
        for index in range(self.num_decodes, len(self.requests)):
            request = self.requests[index]
            row += self.counts[index]
            if self.starts[index] + self.counts[index] == request.num_tokens:
                self.sampled.append(request)
                self.sample_rows.append(row - 1)
                self.sample_positions.append(request.num_tokens)
