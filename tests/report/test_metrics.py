import pickle
import random

import pytest

from spmd.report.metrics import Clock, Metrics, merge
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from spmd.trace.account import PARTS, Account


def request(index: int, choice: int = 0, prompt_len: int = 10) -> Request:
    return Request(index, choice, Prompt([1] * prompt_len), SamplingParams())


def serve(metrics: list[Metrics]) -> None:
    """A hundred requests of random timing; request i is counted by metrics[i % len(metrics)]."""
    clock = random.Random(0)
    for index in range(100):
        mine, asked, now = metrics[index % len(metrics)], request(index, prompt_len=1 + index), clock.random()
        watch = Clock(now)
        for _ in range(clock.randint(1, 20)):
            now += clock.random()
            mine.sampled([watch], now)
        mine.finished(asked, watch, now)
        mine.rows_ok += 1


def test_latencies_of_one_request() -> None:
    metrics, clock = Metrics(), Clock(10.0)
    for now in (10.5, 10.6, 10.9):
        metrics.sampled([clock], now)
    metrics.finished(request(0), clock, 11.0)
    assert metrics.ttft.mean == pytest.approx(0.5)
    assert metrics.itl.mean == pytest.approx(0.2)
    assert metrics.itl.percentile(100) == pytest.approx(0.3, rel=0.01)
    assert metrics.tpot.mean == pytest.approx(0.2)
    assert metrics.e2el.mean == pytest.approx(1.0)
    assert (metrics.prompt_tokens, metrics.output_tokens) == (10, 3)


def test_one_token_has_no_time_per_token() -> None:
    metrics, clock = Metrics(), Clock(0.0)
    metrics.sampled([clock], 1.0)
    metrics.finished(request(0), clock, 1.0)
    assert (metrics.ttft.count, metrics.itl.count, metrics.tpot.count) == (1, 0, 0)


def test_a_prompt_counts_once_for_all_its_choices() -> None:
    metrics = Metrics()
    for choice in range(3):
        clock = Clock(0.0)
        metrics.sampled([clock], 1.0)
        metrics.finished(request(7, choice), clock, 1.0)
    assert (metrics.prompt_tokens, metrics.output_tokens) == (10, 3)


def test_rows_of_one_plan_count_each_by_its_own_clock() -> None:
    """Some had their last token from the same plan, one from another, one has none yet."""
    clocks = [Clock(0.0), Clock(0.25), Clock(0.5), Clock(1.0)]
    together, apart = Metrics(), Metrics()
    for metrics in (together, apart):
        mine = [Clock(clock.arrival) for clock in clocks]
        for now, rows in ((2.0, mine[:2]), (2.5, mine[2:3]), (3.0, mine)):
            for group in [rows] if metrics is together else [[clock] for clock in rows]:
                metrics.sampled(group, now)
    assert together == apart
    assert (together.ttft.count, together.itl.count) == (4, 3)
    assert together.itl.mean == pytest.approx(2.5 / 3)
    assert together.ttft.mean == pytest.approx((2.0 + 1.75 + 2.0 + 2.0) / 4)


def test_merge_equals_single() -> None:
    single, parts = Metrics(), [Metrics() for _ in range(3)]
    serve([single])
    serve(parts)
    assert merge(parts) == merge([single]) == single


def account(**seconds: float) -> Account:
    return Account(dict.fromkeys(PARTS, 0.0) | seconds)


def test_merge_adds_the_accounts_of_a_stage_and_keeps_the_slowest_wall() -> None:
    parts = [Metrics() for _ in range(4)]
    for rank, part in enumerate(parts):
        part.stopped(rank % 2, account(forward=rank, host=10), wall_seconds=10 + rank, startup_seconds=5 - rank)
        part.preemptions = rank
    whole = merge(parts)
    assert whole.stages == {0: account(forward=2, host=20), 1: account(forward=4, host=20)}
    assert (whole.stages[1].busy, whole.stages[1].wall) == (4, 24)
    assert (whole.wall_seconds, whole.startup_seconds, whole.preemptions) == (13, 5, 6)
    assert parts[0].stages == {0: account(host=10)}


def test_merge_keeps_what_all_ranks_know_and_sums_what_each_replica_saw() -> None:
    leaders = [
        Metrics(replicas=1, idle_seconds=idle, frozen_ticks=3, mixed_ticks=7, exchanges=50, exchange_seconds=idle / 10)
        for idle in (1.0, 2.0)
    ]
    whole = merge([*leaders, Metrics(mixed_ticks=7, exchanges=50, exchange_seconds=0.5)])
    assert (whole.replicas, whole.idle_seconds, whole.frozen_ticks) == (2, 3.0, 6)
    assert (whole.mixed_ticks, whole.exchanges, whole.exchange_seconds) == (7, 50, 0.5)


def test_survives_the_trip_to_rank_zero() -> None:
    metrics = Metrics()
    serve([metrics])
    assert pickle.loads(pickle.dumps(metrics)) == metrics
