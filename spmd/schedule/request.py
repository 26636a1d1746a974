"""One request: what was asked (prompt, sampling parameters) and how far it has come (output, blocks, seat)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spmd.schedule.prompt import Prompt

NO_TOKEN = -1  # stands where a token would, of a row whose logits are no finite numbers


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, named as in vLLM. Validated where rows are parsed (`spmd.api.rows`)."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the sampled token's and the top k
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()  # the model's own, ends unless ignore_eos

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def plain(self) -> bool:
        """Whether the argmax of the raw logits is all that is asked for, once there are min_tokens."""
        return self.greedy and self.logprobs is None and not self.logit_bias and not self.penalised


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities of a sampled token and its rivals, under the raw logits."""

    logprob: float
    rank: int  # 1: the most likely token
    top: list[tuple[int, float]]  # (token id, logprob) of the k most likely, best first


def token_logprobs(numbers: Sequence[float], count: int) -> list[TokenLogprobs]:
    """Those of `count` tokens out of one row of numbers: for each token logprob, rank, k ids and their k logprobs."""
    width = len(numbers) // count
    found = []
    for start in range(0, len(numbers), width):
        logprob, rank, *top = numbers[start : start + width]
        k = len(top) // 2
        found.append(TokenLogprobs(logprob, int(rank), list(zip(map(int, top[:k]), top[k:], strict=True))))
    return found


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate. Its tokens are those of the prompt, followed by the committed output.

    With lookahead `scheduled` may run ahead of them: rows are planned whose tokens are known to the device alone.
    Why it ended is in the leader's own record of it (`spmd.leader.Choice`); no other rank needs to know.
    """

    # What was asked. Nobody writes these once the request is made.
    index: int  # row of the input, counted from 0
    choice: int  # 0 .. n-1 of the row
    prompt: Prompt  # shared with the other choices of it
    params: SamplingParams  # shared with whoever asks for the same
    priority: int = 0  # smaller runs earlier
    stream: int = 0  # key of the random stream: a 64-bit digest of (seed, custom_id, choice)
    waits_for_token: bool = False  # no token may be sampled before the host knows the one before it, as for a grammar
    prompt_len: int = field(init=False)
    full_length: int = field(init=False)  # `scheduled` once its last token by max_tokens is planned, which has no row
    plain_from: float = field(init=False)  # tokens from this position on are `params.plain`; inf: none
    # How far it has come. Written by the scheduler alone, on every rank of a replica alike; read by all.
    turn: int = -1  # requests that came before it
    output: list[int] = field(default_factory=list)  # committed token ids
    scheduled: int = 0  # tokens whose keys and values are computed or planned
    in_flight: int = 0  # plans that hold this request and aren't committed
    seat: int = -1  # row of the block table while running, else -1
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # content hashes of full blocks behind those of the prompt alone
    num_registered: int = 0  # its first blocks that others may share
    aside: bool = False  # its long prompt has let others go first
    retired: bool = False  # gets no more rows
    finished: bool = False  # its last token is committed; rows still in flight give it none
    spoilt: bool = False  # got NO_TOKEN; rows still in flight give it none
    alone: bool = False  # computed once more since, in blocks that were cleared and that nobody else has filled

    def __post_init__(self) -> None:
        self.prompt_len = len(self.prompt)
        self.full_length = self.prompt_len + self.params.max_tokens - 1
        self.plain_from = self.prompt_len + self.params.min_tokens if self.params.plain else math.inf

    @property
    def num_tokens(self) -> int:
        """Of prompt and committed output."""
        return self.prompt_len + len(self.output)

    def tokens(self, start: int = 0, stop: int | None = None) -> Sequence[int]:
        """Token ids of prompt and committed output, from position `start` up to `stop`, or to the last one."""
        prompt, behind = self.prompt.tokens, self.prompt_len
        if stop is None:
            stop = self.num_tokens
        if stop <= behind:
            return prompt[start:stop]
        return [*prompt[start:], *self.output[max(0, start - behind) : stop - behind]]

    @property
    def num_known(self) -> int:
        """The first tokens that are committed and have their keys and values computed or planned."""
        return min(self.scheduled, self.num_tokens)
