"""The sampling kernel against plain PyTorch on the same GPU: equal tokens and counts, whatever rows ask for."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spmd.backend.cuda.sampler import (
    ASKED,
    Biases,
    CudaSampler,
    Packing,
    pack_biases,
    pack_params,
    pack_rows,
    supported,
)
from spmd.sampling.sampler import Sampled, Sampler
from spmd.schedule.request import NO_TOKEN, Request, SamplingParams, token_logprobs
from tests.support.sampling import VARIED, here, logits, request

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
hopper = pytest.mark.skipif(not supported(torch.bfloat16, DEVICE), reason="needs a Hopper GPU")
ENDS: dict[str, Any] = {"min_tokens": 5, "eos_token_ids": (7, 20), "stop_token_ids": (3, 2_000_000)}
SETS = 200


def pack(made: list[Request], positions: list[int]) -> tuple[Any, Biases]:
    packed = Packing(50).find(made)
    rows = pack_rows(packed, made, positions)
    return rows, pack_biases(rows, packed, made, positions)


def test_parameters_are_packed_as_the_kernel_takes_them() -> None:
    params = SamplingParams(temperature=1e-9, top_k=50, top_p=0.5, min_p=0.25, frequency_penalty=0.5)
    asked = np.frombuffer(pack_params(params, 50).asked, ASKED)[0]
    assert asked["temperature"] == np.float32(1e-6)
    assert asked["top_k"] == 50 == np.frombuffer(pack_params(SamplingParams(), 50).asked, ASKED)[0]["top_k"]
    assert (asked["top_p"], asked["min_score"]) == (0.5, np.float32(math.log(0.25)))
    assert (asked["repetition"], asked["frequency"], asked["presence"]) == (1, 0.5, 0)
    greedy = np.frombuffer(pack_params(SamplingParams(temperature=0.0), 50).asked, ASKED)[0]
    assert (greedy["temperature"], greedy["min_score"]) == (0, -math.inf)


def test_biases_lie_row_after_row_with_what_min_tokens_forbids_as_long_as_it_does() -> None:
    made = [
        request(logit_bias=((2, 1.5), (9, -3.0))),
        request(),
        request(logit_bias=((9, 4.0),), **ENDS),
    ]
    rows, (tokens, values) = pack(made, [3, 3, 7])
    assert list(zip(rows["bias"].tolist(), rows["bias_end"].tolist(), strict=True)) == [(0, 2), (0, 0), (2, 6)]
    assert tokens.tolist() == [2, 9, 3, 7, 9, 20]
    assert values.tolist() == [1.5, -3.0, -math.inf, -math.inf, 4.0, -math.inf]
    rows, (tokens, _) = pack(made, [3, 3, 8])
    assert rows["bias_end"].tolist() == [2, 0, 3] and tokens.tolist() == [2, 9, 9]
    assert rows["counts"].tolist() == rows["logprobs"].tolist() == [-1] * 3


def test_seeds_of_64_bits_and_positions_are_each_rows_own() -> None:
    made = [request(stream=stream) for stream in (2**64 - 1, 0, 2**63)]
    rows, _ = pack(made, [3, 4, 5])
    assert rows["stream"].tolist() == [2**64 - 1, 0, 2**63]
    assert rows["position"].tolist() == [3, 4, 5]


def test_parameters_of_ever_new_requests_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.backend.cuda.sampler.MAX_KNOWN", 8)
    packing = Packing(50)
    for top_k in range(1, 40):
        packed = packing.find([request(top_k=top_k), request(top_k=1)])
        assert [np.frombuffer(p.asked, ASKED)[0]["top_k"] for p in packed] == [top_k, 1]
        assert len(packing.known) <= 8


def drawn_params(draw: random.Random) -> dict[str, Any]:
    """One random set; each key is neutral half of the time or more often."""
    choices: dict[str, list[Any]] = {
        "top_k": [1, 2, 3, 20, 50, 500, 1000, 3000, 60_000],
        "top_p": [0.95, 0.8, 0.5, 0.99, 0.9999, 1e-9, 0.1],
        "min_p": [0.05, 0.5, 1.0, 1e-6, 1e-12],
        "repetition_penalty": [1.05, 0.8, 2.0],
        "frequency_penalty": [0.5, -0.5],
        "presence_penalty": [0.3, -1.0],
        "logprobs": [0, 0, 5],
    }
    params = {key: draw.choice(values) for key, values in choices.items() if draw.random() < 0.35}
    params["temperature"] = draw.choice([0.0, 1.0, 1.0, 0.6, 0.7, 1e-3, 5.0, 0.3, 1e-8, 30.0])
    if draw.random() < 0.2:
        biased = {draw.randrange(90): draw.choice([5.0, -100.0, 100.0, 0.5]) for _ in range(draw.randrange(1, 40))}
        params["logit_bias"] = tuple(sorted(biased.items()))
    return params | (ENDS if draw.random() < 0.2 else {})


def hard_rows(rows: int, vocab: int, seed: int) -> Tensor:
    """float32 [rows, vocab] on the device: usual rows and such as are made to go wrong, in turn."""
    x = 3 * torch.randn(rows, vocab, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
    for row, i in zip(x, range(rows), strict=True):
        kind = (i * 7 + seed) % 16
        if kind == 0:
            row.fill_(1.5)
        elif kind == 1:
            row.round_()
        elif kind == 2:
            row[row < 1] = -math.inf
        elif kind == 3:
            row[vocab // 2] = math.nan
        elif kind == 4:
            row.fill_(-50)[-1] = 20
        elif kind == 5:
            row.mul_(1e30)
        elif kind == 6:
            row.mul_(1e-6)
        elif kind == 7:
            row.mul_(1e-3).add_(20)
        elif kind == 8:
            row.mul_(5)
        elif kind == 9:
            row.zero_()[::2] = -0.0
        elif kind == 10:
            row[vocab // 3] = math.inf
    return x


def assert_same(found: Sampled, expected: Sampled, scores: Tensor, what: list[dict[str, Any]]) -> None:
    """Tokens are equal; log-probabilities but for rounding, ranks but for those of scores that rounding makes equal."""
    (tokens, logprobs), (wanted, of_wanted) = found.fetch(), expected.fetch()
    wrong = [(i, what[i], tokens[i], wanted[i]) for i in range(len(tokens)) if tokens[i] != wanted[i]]
    assert not wrong, f"{len(wrong)} of {len(tokens)}: {wrong[:3]}"
    assert (logprobs is None) == (of_wanted is None)
    for i, (got, want) in enumerate(zip(logprobs or [], of_wanted or [], strict=True)):
        assert (got is None) == (want is None)
        if got is None or want is None or tokens[i] == NO_TOKEN:
            continue
        [one], [other] = token_logprobs(got, 1), token_logprobs(want, 1)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4, rel=1e-5)
        assert [v for _, v in one.top] == pytest.approx([v for _, v in other.top], abs=1e-4, rel=1e-5)
        raw = scores[i].float().log_softmax(-1)
        slack = 2e-6 * max(1.0, abs(other.logprob))
        assert int((raw > other.logprob + slack).sum()) < one.rank <= int((raw >= other.logprob - slack).sum())


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "rows"),
    [(151_936, 1), (151_936, 40), (151_936, 256), (49_152, 9), (49_152, 140), (1_000, 17), (1_000, 66), (97, 200)],
)
def test_tokens_counts_and_logprobs_are_those_of_plain_pytorch(vocab: int, rows: int, dtype: torch.dtype) -> None:
    """Three ticks of requests that are committed at once; of each row parameters out of 200 random sets."""
    sets = [drawn_params(random.Random(seed)) for seed in range(SETS)]
    plain, kernel = Sampler(vocab, DEVICE), CudaSampler(vocab, dtype, DEVICE)
    chosen = [sets[(i * 13 + rows) % SETS] for i in range(rows)]
    made, copies = (
        [request([i % 90 + 1, 5, 5], stream=i << 55, **params) for i, params in enumerate(chosen)] for _ in range(2)
    )
    for tick in range(3):
        scores = hard_rows(rows, vocab + 3, tick).to(dtype)[:, :vocab]  # rows of an odd length, as slices of vocabulary
        if tick == 2:
            scores = scores.contiguous()
        before = scores.clone()
        expected = plain.sample(scores, made, here(made))
        assert_same(kernel.sample(scores, copies, here(copies)), expected, scores, chosen)
        assert scores.nan_to_num().equal(before.nan_to_num())
        tokens = expected.fetch()[0]
        for one, other, token in zip(made, copies, tokens, strict=True):
            if token == NO_TOKEN:  # computed once more, alone: entered anew
                one.alone = other.alone = True
            else:
                one.output.append(token)
                other.output.append(token)
        for one, other in zip(made, copies, strict=True):
            if one.params.penalised and not one.alone:
                assert counts(plain, one).equal(counts(kernel, other))


def counts(sampler: Sampler | CudaSampler, made: Request) -> Tensor:
    return sampler.counts.table[sampler.counts.taken[made, made.alone]]


@pytest.mark.gpu
@hopper
def test_every_number_of_blocks_a_row_draws_the_same() -> None:
    """And gives the same bits of log-probabilities: what other rows there are changes nothing."""
    vocab = 151_936
    scores = hard_rows(len(VARIED), vocab, 5).bfloat16()
    made = [request(**{"logprobs": 0} | params) for params in VARIED]
    sampler = CudaSampler(vocab, torch.bfloat16, DEVICE)
    alone = [
        sampler.sample(scores[i : i + 1], [request(**{"logprobs": 0} | VARIED[i])], [3]).fetch()
        for i in range(len(made))
    ]
    for copies in (1, 4, 11):
        many = scores.repeat(copies, 1)
        again = [request(**{"logprobs": 0} | params) for params in VARIED * copies]
        tokens, logprobs = sampler.sample(many, again, [3] * len(again)).fetch()
        assert logprobs is not None
        for i, token in enumerate(tokens):
            one, its_logprobs = alone[i % len(made)]
            assert token == one[0] and its_logprobs is not None
            assert token == NO_TOKEN or (logprobs[i] or [])[:2] == (its_logprobs[0] or [])[:2]


@pytest.mark.gpu
@hopper
def test_the_host_waits_for_nothing() -> None:
    made = [request(**params) for params in VARIED]
    sampler, scores = CudaSampler(2_000, torch.bfloat16, DEVICE), logits(len(VARIED), vocab=2_000).bfloat16().cuda()
    sampler.sample(scores, made, [3] * len(made)).fetch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = [sampler.sample(scores, made, [4 + lag] * len(made)) for lag in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(each.token_ids.is_cuda and len(each.fetch()[0]) == len(made) for each in sampled)
