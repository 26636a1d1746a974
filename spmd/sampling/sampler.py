"""Choosing the next token of each row of a plan, done once, on the leader rank of a replica.

Order of processing, that of vLLM V1 (docstring of `vllm/v1/sample/sampler.py`, `logprobs_mode=raw_logprobs`):
log-probabilities from the raw logits; min_tokens; logit_bias; penalties (repetition, frequency, presence); greedy rows
take the argmax; the others temperature, min_p, top_k, top_p and one draw.

Randomness is one number a token, a function of (request.stream, position) alone. It is compared with sums of *integer*
weights in vocabulary order: these are exact in any order of summation, so neither the rest of the batch nor the
device's way of adding up can move a sample.

A row whose best score is NaN or infinite gets NO_TOKEN. Until the last line of `sample` it has some token of the
vocabulary, so that nothing on the way indexes with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmd.parallel.tensor import likeliest, token_or_none
from spmd.parallel.transfer import HostCopy, to_device
from spmd.sampling.penalties import TokenCounts, apply_penalties
from spmd.schedule.request import Request, SamplingParams

WEIGHT_OF_BEST = 2**34  # weight of a row's most likely token: sums over 2**19 tokens stay exact in a float64
COLDEST = 1e-6  # temperatures above zero and below this would overflow
MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class PackedLogprobs:
    """What the rows `asked` of a plan of `rows` asked for: on the way to the host, and apart only there."""

    rows: int
    asked: list[int]
    wanted: list[int]  # top logprobs of each row asked
    packed: HostCopy  # float64 [asked, 2 + 2 * max(wanted)]: logprob, rank, ids of the top, their logprobs

    def unpack(self) -> list[list[float] | None]:
        """One entry for each row of the plan, as `spmd.schedule.request.token_logprobs` takes it."""
        most = max(self.wanted)
        answers: list[list[float] | None] = [None] * self.rows
        for i, k, (logprob, rank, *top) in zip(self.asked, self.wanted, self.packed.wait().tolist(), strict=True):
            answers[i] = [logprob, rank, *top[:k], *top[most : most + k]]
        return answers


class Sampled:
    """One token for each sampled row of a plan.

    `token_ids` is int64 [S] on the device, with NO_TOKEN where there is none, for what goes on there. Copies to the
    host set out when this is made.
    """

    def __init__(self, token_ids: Tensor, logprobs: PackedLogprobs | None = None) -> None:
        self.token_ids = token_ids
        self._tokens = HostCopy(token_ids)
        self._logprobs = logprobs

    def fetch(self) -> tuple[list[int], list[list[float] | None] | None]:
        """Token ids, and one entry of logprobs a row if any row asked. Waits for this plan, not for later ones."""
        return self._tokens.wait().tolist(), self._logprobs.unpack() if self._logprobs else None


class Sampler:
    """Samples for one replica, in plain PyTorch. On GPUs `spmd.backend.cuda.sampler` takes its place, with its tokens.

    Its only state is the token counts of running requests with penalties.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.counts = TokenCounts(vocab_size, self.device)

    @torch.no_grad()
    def sample(self, logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Sampled:
        """Choose the token at `positions[i]` (prompt and output tokens before it) of `requests[i]` from `logits[i]`.

        `logits` is [S, vocab] of any floating dtype and is left as it was. The host doesn't wait for the device. The
        tokens just before a position need not be committed: they are counted for penalties when they are sampled here.
        """
        if plain_greedy(requests, positions):
            return Sampled(likeliest(logits))
        biased = [i for i, r in enumerate(requests) if r.params.logit_bias or held_open(r, positions[i])]
        penalised = [i for i, r in enumerate(requests) if r.params.penalised]
        drawn = [i for i, r in enumerate(requests) if not r.params.greedy]
        scores = logits.to(torch.float32, copy=bool(biased or penalised))
        if biased:
            self._add_bias(scores, biased, requests, positions)
        if penalised:
            chosen, rows = [requests[i] for i in penalised], self._rows(penalised)
            counted = self.counts.rows(chosen)
            scores[rows] = apply_penalties(scores[rows], self.counts.table[counted], chosen)
        best, token_ids = scores.max(-1)
        if drawn:
            at = self._rows(drawn)
            token_ids[at] = self._draw(scores[at], [requests[i] for i in drawn], [positions[i] for i in drawn])
        if penalised:
            self.counts.add(counted, token_ids[rows])
        logprobs = self._logprobs(logits, token_ids, requests)
        return Sampled(token_or_none(best, token_ids), logprobs)

    def _add_bias(self, scores: Tensor, rows: list[int], requests: Sequence[Request], positions: Sequence[int]) -> None:
        """Add logit_bias, and minus infinity to what would end a row before its min_tokens.

        As in vLLM, ignore_eos does not lift the latter. A stop token may lie outside the vocabulary.
        """
        entries: list[tuple[int, int, float]] = []
        for row in rows:
            params = requests[row].params
            entries += [(row, token, bias) for token, bias in params.logit_bias]
            if held_open(requests[row], positions[row]):
                ends = params.eos_token_ids + params.stop_token_ids
                entries += [(row, token, float("-inf")) for token in ends if 0 <= token < self.vocab_size]
        if entries:
            at, token, bias = to_device(entries, torch.float64, self.device).unbind(1)
            scores.index_put_((at.long(), token.long()), bias.float(), accumulate=True)

    def _draw(self, scores: Tensor, requests: list[Request], positions: list[int]) -> Tensor:
        """One token id a row, int64 [R], from scores [R, vocab], of rows with a temperature above zero."""
        params = [request.params for request in requests]
        columns = [
            [max(p.temperature, COLDEST) for p in params],
            [p.min_p for p in params],
            [uniform(request.stream, position) for request, position in zip(requests, positions, strict=True)],
        ]
        temperature, min_p, u = to_device(columns, torch.float64, self.device)
        scores = (scores - scores.amax(-1, keepdim=True)) / temperature.float()[:, None]
        cut = min_p.log().float()  # the best score is 0: p >= min_p * best p is score >= log(min_p)
        bounded = [i for i, p in enumerate(params) if self._top_k(p) < self.vocab_size]
        nucleus = [i for i, p in enumerate(params) if self._top_k(p) == self.vocab_size and p.top_p < 1.0]
        for group in (bounded, nucleus):  # apart, because the first needs no sort of the whole vocabulary
            if group:
                rows = self._rows(group)
                cut[rows] = self._raise_cut(scores[rows], cut[rows], [params[i] for i in group])
        sums = _weights(scores, scores >= cut[:, None]).cumsum(-1)
        target = (u * sums[:, -1]).long()
        token_ids = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
        token_ids = token_ids.clamp_max(self.vocab_size - 1)  # a row of NaNs must not index past the vocabulary
        return torch.where(cut == float("inf"), scores.argmax(-1), token_ids)

    def _raise_cut(self, scores: Tensor, cut: Tensor, params: list[SamplingParams]) -> Tensor:
        """Lowest score [R] that stays after top_k and then top_p, given the one that min_p leaves.

        Tokens whose scores equal the lowest one all stay: no order of equal scores decides a sample. Infinity where
        top_k or top_p leaves a single token: it is the one that greedy rows take, the first of the best.
        """
        top_k, top_p = to_device(
            [[self._top_k(p) for p in params], [p.top_p for p in params]], torch.float64, self.device
        )[:, :, None]
        best = scores.topk(max(self._top_k(p) for p in params)).values
        place = torch.arange(best.shape[1], device=self.device)
        weights = _weights(best, (best >= cut[:, None]) & (place < top_k))
        sums = weights.cumsum(-1)
        kept = (weights > 0) & (sums - weights < top_p * sums[:, -1:])
        alone = kept.sum(-1, keepdim=True) == 1
        return best.masked_fill(~kept | alone, float("inf")).amin(-1)

    def _logprobs(self, logits: Tensor, token_ids: Tensor, requests: Sequence[Request]) -> PackedLogprobs | None:
        """Those of the raw logits, for the rows that ask; None if none does."""
        asked = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        if not asked:
            return None
        wanted = [min(requests[i].params.logprobs or 0, self.vocab_size) for i in asked]
        rows = self._rows(asked)
        logprobs = logits[rows].float().log_softmax(-1)
        sampled = logprobs.gather(1, token_ids[rows, None])
        rank = (logprobs >= sampled).sum(-1, keepdim=True)
        top = logprobs.topk(max(wanted))
        packed = torch.cat([part.double() for part in (sampled, rank, top.indices, top.values)], dim=1)
        return PackedLogprobs(len(requests), asked, wanted, HostCopy(packed))

    def _rows(self, rows: list[int]) -> Tensor:
        return to_device(rows, torch.int64, self.device)

    def _top_k(self, params: SamplingParams) -> int:
        return params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size


def uniform(stream: int, position: int) -> float:
    """Number `position` of the SplitMix64 generator seeded with `stream` (Steele et al. 2014), in [0, 1)."""
    z = (stream + (position + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
    return ((z ^ z >> 31) >> 11) * 2.0**-53


def plain_greedy(requests: Sequence[Request], positions: Sequence[int]) -> bool:
    """Whether every row takes the argmax of its raw logits and asks for nothing else. Equal on all ranks."""
    return all(position >= request.plain_from for request, position in zip(requests, positions, strict=True))


def held_open(request: Request, position: int) -> bool:
    """Whether min_tokens forbids the token at `position` to end the request."""
    return position < request.prompt_len + request.params.min_tokens


def _weights(scores: Tensor, keep: Tensor) -> Tensor:
    """int64 weights proportional to exp(scores), 0 where not `keep`; scores are at most 0."""
    return (scores.exp() * WEIGHT_OF_BEST).long().masked_fill_(~keep, 0)
