import math
from collections import Counter
from itertools import product
from typing import Any

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

from spmd.sampling.sampler import Sampler, plain_greedy, uniform
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import NO_TOKEN, Request, SamplingParams, token_logprobs
from tests.support.sampling import VARIED, VOCAB, here, logits, request, sample


def draws(row: torch.Tensor, count: int, **params: Any) -> Counter[int]:
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
def test_draws_follow_the_distribution_of_transformers(params: dict[str, Any], warpers: list[Any]) -> None:
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


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 0.2},
        {"top_k": 1, "top_p": 0.9, "temperature": 5.0},
        {"top_k": 4, "top_p": 0.01},
        {"top_k": 1, "min_p": 1.0},
    ],
)
def test_where_one_token_stays_it_is_the_one_that_greedy_rows_take(params: dict[str, Any]) -> None:
    row = torch.tensor([0.0, 4.0, 4.0, -1.0, 4.0])
    assert sample(row[None], [request(temperature=0.0)]) == [1]
    assert draws(row, 200, **params) == {1: 200}
    # Beside rows that draw, and where equal scores come from what is added to them.
    mixed = [request(stream=9, **params), request(stream=1), request(top_k=2, stream=2, logit_bias=((1, 5.0),))]
    assert sample(row.expand(3, -1), mixed)[0] == 1
    biased = request(logit_bias=((0, 4.0), (3, -100.0)), **params)
    assert sample(row[None], [biased]) == [0]


def test_equal_scores_are_drawn_among_where_more_than_one_token_stays() -> None:
    row = torch.tensor([0.0, 4.0, 4.0, -1.0])
    for params in ({"top_k": 2}, {"top_p": 0.9}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.6}):
        assert set(draws(row, 200, **params)) == {1, 2}


def test_a_position_is_drawn_anew_and_reproducibly() -> None:
    row = logits(1)
    tokens = list(range(4_000))
    requests = [Request(0, 0, Prompt(tokens[: length + 1]), SamplingParams(), stream=99) for length in range(4_000)]
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


def test_the_position_alone_says_how_far_a_request_is() -> None:
    """Tokens that are sampled but not committed yet make no difference to the draw."""
    row = logits(1) / 3
    for stream in range(20):
        committed, lagging = request([1, 2, 3], [4, 5], stream=stream), request([1, 2, 3], stream=stream)
        assert sample(row, [lagging], [5]) == sample(row, [committed])
    assert len({sample(row, [lagging], [position])[0] for position in range(3, 40)}) > 5


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
    sampled = Sampler(VOCAB, "cpu").sample(scores, greedy, here(greedy))
    assert sampled.token_ids.equal(scores.argmax(-1))
    assert sampled.token_ids.dtype == torch.int64
    assert sampled.fetch() == (scores.argmax(-1).tolist(), None)
    sample(scores, [request(**params) for params in VARIED])
    assert scores.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_sampled_as_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    narrow = logits(len(VARIED), vocab=2_000).to(dtype)
    before = narrow.clone()
    for made in ([request(**params) for params in VARIED], [request(temperature=0.0) for _ in VARIED]):
        wide = Sampler(2_000, "cpu").sample(narrow.float(), made, here(made)).fetch()
        assert Sampler(2_000, "cpu").sample(narrow, made, here(made)).fetch() == wide
    assert narrow.equal(before)


def test_plain_greedy_is_argmax_of_the_raw_logits_and_nothing_else() -> None:
    plain = [request(temperature=0.0), request([1], temperature=0.0, min_tokens=2, eos_token_ids=(7,), top_p=0.5)]
    assert plain_greedy(plain, [3, 3])
    assert plain_greedy([], [])
    assert not plain_greedy(plain, [3, 2])  # held open
    more: dict[str, Any]
    for more in (
        {"logprobs": 0},
        {"logit_bias": ((3, 1.0),)},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"temperature": 0.5},
    ):
        assert not plain_greedy([*plain, request(**{"temperature": 0.0} | more)], [3, 3, 3])


def test_a_temperature_next_to_zero_is_argmax() -> None:
    scores = logits(4)
    cold = [request(temperature=t, stream=i) for i, t in enumerate((1e-3, 1e-8, 1e-40, 5e-324))]
    assert sample(scores, cold) == scores.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_every_end_until_reached(temperature: float) -> None:
    row = torch.full((1, VOCAB), -20.0)
    row[0, [4, 5, 6, 7]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    ends: dict[str, Any] = {"eos_token_ids": (4, 5), "stop_token_ids": (6, VOCAB + 3)}
    ends |= {"min_tokens": 2, "temperature": temperature}
    assert sample(row, [request(output=[9], **ends)]) == [7]
    assert sample(row, [request(output=[9], ignore_eos=True, **ends)]) == [7]
    assert sample(row, [request(output=[9, 9], **ends)])[0] in (4, 5, 6)
    assert sample(row, [request(**ends)], [4]) == [7]  # one sampled, not committed yet
    assert sample(row, [request(**ends)], [5])[0] in (4, 5, 6)


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


def test_logprobs_are_those_of_the_raw_logits() -> None:
    scores = logits(4)
    asked = [
        request(temperature=0.3, logprobs=3, stream=1, logit_bias=((int(scores[0].argmin()), 100.0),)),
        request(stream=2),
        request(temperature=0.0, logprobs=0, repetition_penalty=1.5),
        request(top_k=2, logprobs=VOCAB + 1, stream=3),
    ]
    tokens, answers = Sampler(VOCAB, "cpu").sample(scores, asked, here(asked)).fetch()
    assert answers is not None
    raw = scores.log_softmax(-1)
    assert answers[1] is None
    for i, k in ((0, 3), (2, 0), (3, VOCAB)):
        numbers, token = answers[i], tokens[i]
        assert numbers is not None
        [answer] = token_logprobs(numbers, 1)
        assert answer.logprob == pytest.approx(float(raw[i, token]))
        assert answer.rank == 1 + int((raw[i] > raw[i, token]).sum())
        best = raw[i].sort(descending=True)
        assert [token for token, _ in answer.top] == best.indices[:k].tolist()
        assert [value for _, value in answer.top] == pytest.approx(best.values[:k].tolist())
    assert answers[0] is not None
    assert answers[0][1] == VOCAB  # the bias chose it, the raw logits say how unlikely it was


@pytest.mark.parametrize("broken", ["all nan", "one nan", "one inf", "all -inf"])
def test_a_row_without_numbers_gets_no_token_and_harms_no_other(broken: str) -> None:
    """Whatever the row asks for, and whatever the row beside it does; greedy rows alone, too."""
    plain: dict[str, Any] = {"temperature": 0.0}
    for params, beside in [*product(VARIED, VARIED), (plain, plain)]:
        scores = logits(2)
        asked: dict[str, Any] = {"logprobs": 2} | params if params.get("temperature") else params
        good = sample(scores, [request(**asked), request(**beside)])[1]
        many, _, what = broken.partition(" ")
        scores[0, slice(None) if many == "all" else 11] = float(what)
        assert sample(scores, [request(**asked), request(**beside)]) == [NO_TOKEN, good]


def test_counts_of_penalties_stay_right_behind_a_row_without_numbers() -> None:
    scores, sampler = logits(2), Sampler(VOCAB, "cpu")
    bad, good, alone = (request(temperature=0.0, frequency_penalty=2.0) for _ in range(3))
    scores[0] = float("nan")
    for position in (3, 4, 5):
        tokens = sampler.sample(scores, [bad, good], [position] * 2).token_ids.tolist()
        alone.output += sample(scores[1:], [alone])
        assert tokens == [NO_TOKEN, alone.output[-1]]


def test_infinities_that_are_not_the_best_are_no_fault() -> None:
    scores = logits(1)
    scores[0, 5:] = float("-inf")
    best = int(scores.argmax())
    assert sample(scores, [request(temperature=0.0)]) == [best]
    assert 0 <= sample(scores, [request(stream=3)])[0] < 5


def test_no_rows_no_tokens() -> None:
    assert sample(torch.zeros(0, VOCAB), []) == []


def test_uniform_is_splitmix64() -> None:
    """The first outputs of the reference C code for seed 1234567."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(1234567, position) for position in range(4)] == [(out >> 11) / 2**53 for out in outputs]
    assert 0.0 <= min(uniform(2**64 - 1, p) for p in range(1_000)) < max(uniform(0, p) for p in range(1_000)) < 1.0


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_interval_draw_no_forbidden_token(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.sampling.sampler.uniform", lambda stream, position: u)
    for seed in range(20):
        ends = request(logit_bias=((0, float("-inf")), (VOCAB - 1, float("-inf"))))
        assert sample(logits(1, seed) / 30, [ends]) == [1 if u == 0.0 else VOCAB - 2]


def test_requests_that_differ_by_their_stream_alone_draw_differently() -> None:
    params = SamplingParams()
    made = [Request(0, i, Prompt([1]), params, stream=i) for i in range(64)]
    assert len(set(sample(torch.zeros(64, 10_000), made))) > 60


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_device_nothing_waits_and_the_tokens_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """Three plans of the same requests are sampled before the first one is fetched."""
    rows = [logits(len(VARIED), seed, vocab=2_000).to(dtype) for seed in range(3)]
    expected, made = [], [request(**params) for params in VARIED]
    on_cpu = Sampler(2_000, "cpu")
    for lag, scores in enumerate(rows):
        expected.append(on_cpu.sample(scores, made, [3 + lag] * len(made)).fetch())
    on_device, made = Sampler(2_000, "cuda"), [request(**params) for params in VARIED]
    there = [scores.cuda() for scores in rows]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = [on_device.sample(scores, made, [3 + lag] * len(made)) for lag, scores in enumerate(there)]
        greedy = [on_device.sample(scores, made[:1], [3]) for scores in there]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each, (tokens, logprobs) in zip(sampled, expected, strict=True):
        assert each.token_ids.is_cuda
        assert each.fetch()[0] == each.token_ids.tolist() == tokens
        found = each.fetch()[1]
        assert found is not None and logprobs is not None
        for got, wanted in zip(found, logprobs, strict=True):
            assert (got is None) == (wanted is None)
            if got and wanted:
                [got_one], [wanted_one] = token_logprobs(got, 1), token_logprobs(wanted, 1)
                assert got_one.logprob == pytest.approx(wanted_one.logprob, abs=1e-4)
                values = [value for _, value in wanted_one.top]
                assert [value for _, value in got_one.top] == pytest.approx(values, abs=1e-4)
    assert [each.fetch()[0][0] for each in greedy] == [int(scores[0].argmax()) for scores in rows]


@pytest.mark.gpu
@cuda
def test_fetch_waits_for_its_own_plan_and_not_for_later_work() -> None:
    scores = logits(4).cuda()
    made = [request(temperature=0.0, logprobs=1) for _ in range(4)]
    sampler = Sampler(VOCAB, "cuda")
    sampler.sample(scores, made, here(made)).fetch()  # takes pinned memory, for which CUDA may wait once
    sampled = sampler.sample(scores, made, here(made))
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
    tokens, logprobs = sampled.fetch()
    assert not torch.cuda.current_stream().query(), "fetch waited for the sleep"
    assert tokens == scores.argmax(-1).tolist() and logprobs is not None and None not in logprobs
