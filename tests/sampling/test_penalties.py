"""Penalties against the plain formula, also while the host knows less of a request than has been sampled."""

from typing import Any

import pytest
import torch

from spmd.sampling.sampler import Sampler
from spmd.schedule.request import Request
from tests.support.sampling import VOCAB, here, logits, request, sample


def penalised(row: list[float], made: Request) -> list[float]:
    """OpenAI's formula for presence and frequency, CTRL's for repetition, one token at a time."""
    params, scores = made.params, list(row)
    for token in range(len(scores)):
        if token in made.tokens():
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        times = list(made.output).count(token)
        scores[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return scores


def test_penalties_follow_the_output_as_it_grows() -> None:
    """Greedy decoding of many requests over many ticks, in changing company, against the plain formula."""
    sampler = Sampler(VOCAB, "cpu")
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.1},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.3, "presence_penalty": 0.9},
    ]
    made = [request([i % 7, 5, 5], temperature=0.0, **kinds[i % 4]) for i in range(40)]
    for tick in range(30):
        present = [r for i, r in enumerate(made) if not r.finished and (i + tick) % 3]
        scores = logits(len(present), tick) / 3
        tokens, _ = sampler.sample(scores, present, here(present)).fetch()
        for row, each, token in zip(scores.tolist(), present, tokens, strict=True):
            best = penalised(row, each)
            assert best[token] == pytest.approx(max(best), abs=1e-5)
            each.output.append(token)
            if len(each.output) == 12:
                each.finished = True
    assert len(sampler.counts.table) <= 64


def test_rows_of_finished_requests_are_used_again() -> None:
    sampler = Sampler(VOCAB, "cpu")
    for tick in range(50):
        made = request([tick % VOCAB], [1, 1], temperature=0.0, presence_penalty=2.0)
        scores = torch.zeros(1, VOCAB)
        scores[0, [1, 2]] = torch.tensor([1.5, 1.0])
        assert sampler.sample(scores, [made], [3]).fetch()[0] == [2]
        made.finished = True
    assert len(sampler.counts.table) == 8


def lagging_tokens(lag: int, ticks: int = 12) -> list[list[int]]:
    """Tokens of six requests, by request, each committed `lag` plans after it was sampled."""
    sampler, pending = Sampler(VOCAB, "cpu"), []
    kinds: list[dict[str, Any]] = [
        {"frequency_penalty": 0.7, "temperature": 0.0},
        {"repetition_penalty": 1.4, "presence_penalty": 1.1},
        {"temperature": 0.0},
    ]
    made = [request([i, 5, 5], stream=i, **kinds[i % 3]) for i in range(6)]
    for tick in range(ticks):
        sampled = sampler.sample(logits(6, tick) / 3, made, [3 + tick] * 6)
        pending.append(sampled)
        if len(pending) > lag:
            for each, token in zip(made, pending.pop(0).fetch()[0], strict=True):
                each.output.append(token)
    for sampled in pending:
        for each, token in zip(made, sampled.fetch()[0], strict=True):
            each.output.append(token)
    return [list(each.output) for each in made]


@pytest.mark.parametrize("lag", [1, 3, 12])
def test_tokens_count_before_they_are_committed(lag: int) -> None:
    assert lagging_tokens(lag) == lagging_tokens(0)


def test_a_request_computed_again_after_preemption_counts_nothing_twice() -> None:
    """It comes back with its committed output as further prompt tokens to compute; its counts were there all along."""
    sampler = Sampler(VOCAB, "cpu")
    made = request(temperature=0.0, frequency_penalty=0.5)
    for tick in range(8):
        made.output += sampler.sample(logits(1, tick) / 3, [made], here([made])).fetch()[0]
    sampler.sample(logits(20) / 3, [request([i], presence_penalty=1.0) for i in range(20)], [1] * 20)
    for tick in range(8, 16):
        fresh = request(list(made.tokens(0, 3)), list(made.output), temperature=0.0, frequency_penalty=0.5)
        expected = Sampler(VOCAB, "cpu").sample(logits(1, tick) / 3, [fresh], here([fresh])).fetch()
        made.output += sampler.sample(logits(1, tick) / 3, [made], here([made])).fetch()[0]
        assert made.output[-1:] == expected[0]


def test_the_last_rows_of_an_ended_request_harm_no_other() -> None:
    """Until the plan that ends it is committed it is in later plans; its row of counts is its own as long."""
    params: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 0.9, "repetition_penalty": 1.2}
    sampler, alone = Sampler(VOCAB, "cpu"), Sampler(VOCAB, "cpu")
    ghosts = [request([i], **params) for i in range(8)]  # the table's first rows
    for tick in range(3):
        sampler.sample(logits(8, tick), ghosts, [1 + tick] * 8)
    heirs, copies = ([request([i], **params) for i in range(8)] for _ in range(2))
    for tick in range(6):
        scores = logits(8, 10 + tick) / 3
        mixed = sampler.sample(torch.cat([scores, scores]), [*heirs, *ghosts], [1 + tick] * 8 + [4 + tick] * 8)
        assert mixed.fetch()[0][:8] == alone.sample(scores, copies, [1 + tick] * 8).fetch()[0]
    assert len(sampler.counts.table) == 16
    for ghost in ghosts:
        ghost.finished = True  # committed: it is in no plan from now on
    last, others = ([request([i], **params) for i in range(8)] for _ in range(2))
    for tick in range(3):
        scores = logits(16, 20 + tick) / 3
        mixed = sampler.sample(scores, [*heirs, *last], [7 + tick] * 8 + [1 + tick] * 8)
        assert mixed.fetch()[0] == alone.sample(scores, [*copies, *others], [7 + tick] * 8 + [1 + tick] * 8).fetch()[0]
    assert len(sampler.counts.table) == 16


def test_a_request_computed_once_more_is_counted_anew() -> None:
    """What was counted when it got no token, and for ghosts behind that, is in no answer."""
    scores, counts = logits(1), Sampler(VOCAB, "cpu")
    again, fresh = (request(temperature=0.0, frequency_penalty=2.0, output=[5]) for _ in range(2))
    for position in (4, 5, 6):
        counts.sample(scores, [again], [position])
    again.alone = True
    for position in (4, 5):
        tokens = counts.sample(scores, [again], [position]).token_ids.tolist()
        assert tokens == sample(scores, [fresh])
        fresh.output += tokens
