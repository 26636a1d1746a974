import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spmd.model.sampler import Sampler, uniform
from spmd.schedule.request import Request, SamplingParams

VOCAB = 50


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def request(prompt: list[int] | None = None, output: list[int] | None = None, **params) -> Request:
    made = Request(0, 0, list(prompt or [1, 2, 3]), SamplingParams(**params))
    made.tokens += output or []
    return made


def sample(scores: torch.Tensor, requests: list[Request]) -> list[int]:
    return Sampler(scores.shape[1], "cpu").sample(scores, requests).token_ids.tolist()


def draws(row: torch.Tensor, count: int, **params) -> Counter[int]:
    """How often each token is drawn from one row of logits, over `count` random streams."""
    requests = [request(stream=stream * 0x1234567, **params) for stream in range(count)]
    return Counter(sample(row.expand(count, -1), requests))


def assert_drawn_from(probs: torch.Tensor, counts: Counter[int]) -> None:
    """A chi-square test at about five sigma, cells of under five expected draws taken together."""
    total = sum(counts.values())
    expected = (probs * total).tolist()
    assert all(expected[token] > 0 for token in counts), "a token outside the support was drawn"
    cells = [(expected[t], counts[t]) for t in range(len(expected)) if expected[t] >= 5]
    rest = total - sum(e for e, _ in cells), total - sum(c for _, c in cells)
    cells += [rest] if rest[0] > 1 else []
    chi2 = sum((c - e) ** 2 / e for e, c in cells)
    freedom = max(len(cells) - 1, 1)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"temperature": 2.5}, [TemperatureLogitsWarper(2.5)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": VOCAB + 7}, []),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 8, "top_p": 0.8}, [TopKLogitsWarper(8), TopPLogitsWarper(0.8)]),
        (
            {"temperature": 1.7, "min_p": 0.05, "top_k": 12, "top_p": 0.9},
            [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.05), TopKLogitsWarper(12), TopPLogitsWarper(0.9)],
        ),
        (
            {"temperature": 1.5, "min_p": 0.1, "top_p": 0.8},
            [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.1), TopPLogitsWarper(0.8)],
        ),
        ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    ],
)
def test_draws_follow_the_distribution_of_transformers(params: dict, warpers: list) -> None:
    for seed in range(3):
        row = logits(1, seed)
        warped = LogitsProcessorList(warpers)(torch.tensor([[1, 2, 3]]), row.clone())
        counts = draws(row, 4_000, **params)
        assert_drawn_from(warped.softmax(-1)[0], counts)
        likely = warped.softmax(-1)[0] > 0.01
        assert all(counts[token] for token in likely.nonzero()[:, 0].tolist())


def test_equal_scores_at_the_cut_all_stay() -> None:
    row = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert set(draws(row, 500, top_k=2)) == {0, 1, 2, 3}
    assert set(draws(row, 500, top_p=0.6)) == {0, 1, 2, 3}


def test_a_position_is_drawn_anew_and_reproducibly() -> None:
    row = logits(1)
    tokens = list(range(4_000))
    requests = [Request(0, 0, tokens[: length + 1], SamplingParams(stream=99)) for length in range(4_000)]
    first = sample(row.expand(4_000, -1), requests)
    assert first == sample(row.expand(4_000, -1), requests)
    assert_drawn_from(row.softmax(-1)[0], Counter(first))


def test_position_counts_prompt_and_output_alike() -> None:
    """A preempted request whose output became part of its prompt draws the same token again."""
    row = logits(1)
    for stream in range(20):
        split = request([1, 2, 3], [4, 5], stream=stream)
        whole = request([1, 2, 3, 4, 5], stream=stream)
        assert sample(row, [split]) == sample(row, [whole])


VARIED = [
    {"temperature": 0.0},
    {"temperature": 0.8, "stream": 1},
    {"top_k": 3, "stream": 2},
    {"top_p": 0.5, "stream": 3},
    {"min_p": 0.2, "stream": 4, "logprobs": 2},
    {"top_k": 20, "top_p": 0.9, "temperature": 0.7, "stream": 5},
    {"repetition_penalty": 1.3, "stream": 6},
    {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"min_tokens": 5, "eos_token_ids": (7,), "stream": 7},
    {"temperature": 0.0, "logit_bias": ((3, 100.0),)},
    {"top_p": 0.99, "stream": 8},
    {"temperature": 1e-9, "stream": 9},
]


def test_a_sample_depends_on_its_own_row_alone() -> None:
    for seed in range(10):
        scores = logits(len(VARIED), seed, vocab=2_000)
        made = [request([seed + 1, 2], [3, 3, seed], **params) for params in VARIED]
        alone = [sample(scores[i : i + 1], [made[i]])[0] for i in range(len(made))]
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed)).tolist()
        assert sample(scores, made) == alone
        assert sample(scores[order], [made[i] for i in order]) == [alone[i] for i in order]
        half = order[:6]
        assert sample(scores[half], [made[i] for i in half]) == [alone[i] for i in half]


def test_greedy_is_argmax_and_the_logits_stay_as_they_were() -> None:
    scores = logits(12)
    before = scores.clone()
    greedy = [request(temperature=0.0, stream=i) for i in range(12)]
    sampled = Sampler(VOCAB, "cpu").sample(scores, greedy)
    assert sampled.token_ids.equal(scores.argmax(-1))
    assert sampled.token_ids.dtype == torch.int64
    assert sampled.logprobs is None
    sample(scores, [request(**params) for params in VARIED])
    assert scores.equal(before)


def test_a_temperature_next_to_zero_is_argmax() -> None:
    scores = logits(4)
    cold = [request(temperature=t, stream=i) for i, t in enumerate((1e-3, 1e-8, 1e-40, 5e-324))]
    assert sample(scores, cold) == scores.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_every_end_until_reached(temperature: float) -> None:
    row = torch.full((1, VOCAB), -20.0)
    row[0, [4, 5, 6, 7]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    ends = {"eos_token_ids": (4, 5), "stop_token_ids": (6, VOCAB + 3), "min_tokens": 2, "temperature": temperature}
    assert sample(row, [request(output=[9], **ends)]) == [7]
    assert sample(row, [request(output=[9], ignore_eos=True, **ends)]) == [7]
    assert sample(row, [request(output=[9, 9], **ends)])[0] in (4, 5, 6)


def test_min_tokens_outweighs_logit_bias() -> None:
    row = torch.zeros(1, VOCAB)
    asked = request(temperature=0.0, min_tokens=1, eos_token_ids=(4,), logit_bias=((4, 100.0), (8, 1.0)))
    assert sample(row, [asked]) == [8]


def test_logit_bias_is_added_before_the_draw() -> None:
    row = logits(1)
    bias = ((3, 11.0), (11, -100.0), (20, 7.5))
    biased = row.clone()
    for token, value in bias:
        biased[0, token] += value
    assert_drawn_from(biased.softmax(-1)[0], draws(row, 4_000, logit_bias=bias))


def penalised(row: list[float], made: Request) -> list[float]:
    """OpenAI's formula for presence and frequency, CTRL's for repetition, one token at a time."""
    params, scores = made.params, list(row)
    for token in range(len(scores)):
        if token in made.tokens:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        times = list(made.output).count(token)
        scores[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return scores


def test_penalties_follow_the_output_as_it_grows() -> None:
    """Greedy decoding of many requests over many ticks, in changing company, against the plain formula."""
    sampler = Sampler(VOCAB, "cpu")
    kinds = [
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.1},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.3, "presence_penalty": 0.9},
    ]
    made = [request([i % 7, 5, 5], temperature=0.0, **kinds[i % 4]) for i in range(40)]
    for tick in range(30):
        present = [r for i, r in enumerate(made) if r.finish_reason is None and (i + tick) % 3]
        scores = logits(len(present), tick) / 3
        tokens = sampler.sample(scores, present).token_ids.tolist()
        for row, each, token in zip(scores.tolist(), present, tokens, strict=True):
            best = penalised(row, each)
            assert best[token] == pytest.approx(max(best), abs=1e-5)
            each.tokens.append(token)
            if each.num_output == 12:
                each.finish_reason = "length"
    assert len(sampler.counts.table) <= 64


def test_rows_of_finished_requests_are_used_again() -> None:
    sampler = Sampler(VOCAB, "cpu")
    for tick in range(50):
        made = request([tick % VOCAB], [1, 1], temperature=0.0, presence_penalty=2.0)
        scores = torch.zeros(1, VOCAB)
        scores[0, [1, 2]] = torch.tensor([1.5, 1.0])
        assert sampler.sample(scores, [made]).token_ids.tolist() == [2]
        made.finish_reason = "stop"
    assert len(sampler.counts.table) == 8


def test_logprobs_are_those_of_the_raw_logits() -> None:
    scores = logits(4)
    asked = [
        request(temperature=0.3, logprobs=3, stream=1, logit_bias=((int(scores[0].argmin()), 100.0),)),
        request(stream=2),
        request(temperature=0.0, logprobs=0, repetition_penalty=1.5),
        request(top_k=2, logprobs=VOCAB + 1, stream=3),
    ]
    sampled = Sampler(VOCAB, "cpu").sample(scores, asked)
    assert sampled.logprobs is not None
    raw = scores.log_softmax(-1)
    assert sampled.logprobs[1] is None
    for i, k in ((0, 3), (2, 0), (3, VOCAB)):
        answer, token = sampled.logprobs[i], int(sampled.token_ids[i])
        assert answer is not None
        assert answer.logprob == pytest.approx(float(raw[i, token]))
        assert answer.rank == 1 + int((raw[i] > raw[i, token]).sum())
        best = raw[i].sort(descending=True)
        assert [token for token, _ in answer.top] == best.indices[:k].tolist()
        assert [value for _, value in answer.top] == pytest.approx(best.values[:k].tolist())
    assert sampled.logprobs[0].rank == VOCAB  # the bias chose it, the raw logits say how unlikely it was


def test_a_row_of_nans_stays_in_the_vocabulary_and_harms_no_other() -> None:
    scores = logits(2)
    made = [request(stream=1, top_p=0.9), request(stream=2, top_p=0.9)]
    good = sample(scores, made)[1]
    scores[0] = float("nan")
    tokens = sample(scores, made)
    assert 0 <= tokens[0] < VOCAB
    assert tokens[1] == good


def test_no_rows_no_tokens() -> None:
    assert sample(torch.zeros(0, VOCAB), []) == []


def test_uniform_is_splitmix64() -> None:
    """The first outputs of the reference C code for seed 1234567."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(1234567, position) for position in range(4)] == [(out >> 11) / 2**53 for out in outputs]
    assert 0.0 <= min(uniform(2**64 - 1, p) for p in range(1_000)) < max(uniform(0, p) for p in range(1_000)) < 1.0


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_interval_draw_no_forbidden_token(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.model.sampler.uniform", lambda stream, position: u)
    for seed in range(20):
        ends = request(logit_bias=((0, float("-inf")), (VOCAB - 1, float("-inf"))))
        assert sample(logits(1, seed) / 30, [ends]) == [1 if u == 0.0 else VOCAB - 2]


def test_requests_that_differ_by_their_stream_alone_draw_differently() -> None:
    params = SamplingParams()
    made = [Request(0, i, [1], replace(params, stream=i)) for i in range(64)]
    assert len(set(sample(torch.zeros(64, 10_000), made))) > 60
