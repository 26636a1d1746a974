"""What one rank counts while it works: latencies of its requests, tokens, rows, and where its time went.

Every rank has a `Metrics`; on all but the leader of a replica only the stage's times are filled. At the end rank 0
gathers and merges them. All is plain data of a size that does not grow with the number of rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from spmd.report.histogram import Histogram
from spmd.schedule.request import Request
from spmd.trace.account import Account

LATENCIES = ("ttft", "tpot", "itl", "e2el")
COUNTERS = (
    "rows_ok",
    "rows_failed",
    "prompt_tokens",
    "output_tokens",
    "preemptions",
    "cache_hit_tokens",
    "cache_queried_tokens",
    "replicas",
    "idle_seconds",
    "frozen_ticks",
)
EQUAL_OR_SLOWEST = (
    *("startup_seconds", "wall_seconds", "exchanges", "exchange_seconds", "mixed_ticks", "input_wait_seconds"),
)


@dataclass(slots=True)
class Clock:
    """Seconds on the leader's clock for one request that is not finished; `tokens` counts its output."""

    arrival: float  # the request may be scheduled from then on
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Metrics:
    """Latencies are `vllm bench serve`'s. Counters are public: whoever sees an event adds to its counter."""

    ttft: Histogram = field(default_factory=Histogram)  # arrival to first token
    tpot: Histogram = field(default_factory=Histogram)  # a request's mean time per token after the first
    itl: Histogram = field(default_factory=Histogram)  # between neighbouring tokens
    e2el: Histogram = field(default_factory=Histogram)  # arrival to end

    rows_ok: int = 0  # answered input rows; a row with n > 1 is one
    rows_failed: int = 0
    prompt_tokens: int = 0  # of finished requests; a prompt with n > 1 is counted once
    output_tokens: int = 0
    preemptions: int = 0
    cache_hit_tokens: int = 0  # prompt tokens found in the prefix cache
    cache_queried_tokens: int = 0  # prompt tokens looked up in it

    replicas: int = 0  # 1 on a leader
    idle_seconds: float = 0.0  # from a replica's last answer to the end of all
    frozen_ticks: int = 0  # in which a gate kept somebody waiting from a seat; each replica's count
    mixed_ticks: int = 0  # in which one replica ran prompts while another only decoded; known to all ranks
    exchanges: int = 0  # of loads between replicas; as many on every rank
    exchange_seconds: float = 0.0  # this rank spent in them; once merged, the slowest rank

    host: Histogram = field(default_factory=Histogram)  # a tick's time in Python, see `Engine.host_times`; every rank's
    input_wait_seconds: float = 0.0  # in which rows weren't there yet; once merged, of the slowest rank

    startup_seconds: float = 0.0  # launch to the first tick; once merged, of the slowest rank
    wall_seconds: float = 0.0  # the work phase; once merged, of the slowest rank
    stages: dict[int, Account] = field(default_factory=dict)  # of the ranks of each stage together

    def sampled(self, clocks: Iterable[Clock], now: float) -> None:
        """One more output token of each of these requests was sampled."""
        waited: dict[float, int] = {}  # since their last token; most got it from the same plan
        for clock in clocks:
            if clock.tokens:
                waited[clock.last] = waited.get(clock.last, 0) + 1
            else:
                clock.first = now
                self.ttft.add(now - clock.arrival)
            clock.tokens += 1
            clock.last = now
        for last, count in waited.items():
            self.itl.add(now - last, count)

    def finished(self, request: Request, clock: Clock, now: float) -> None:
        """The request ended with an answer."""
        self.e2el.add(now - clock.arrival)
        if clock.tokens > 1:
            self.tpot.add((clock.last - clock.first) / (clock.tokens - 1))
        self.output_tokens += clock.tokens
        if request.choice == 0:
            self.prompt_tokens += request.prompt_len

    def stopped(self, stage: int, account: Account, wall_seconds: float, startup_seconds: float) -> None:
        """The work phase is over on this rank, whose pp rank is `stage`; called once, before `merge`."""
        self.stages[stage] = account
        self.wall_seconds, self.startup_seconds = wall_seconds, startup_seconds


def merge(parts: Iterable[Metrics]) -> Metrics:
    """The metrics of all ranks as one: sums, and the slowest rank's durations. `parts` are left as they were."""
    whole = Metrics()
    for part in parts:
        for name in (*LATENCIES, "host"):
            getattr(whole, name).merge(getattr(part, name))
        for name in COUNTERS:
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        for name in EQUAL_OR_SLOWEST:
            setattr(whole, name, max(getattr(whole, name), getattr(part, name)))
        for stage, account in part.stages.items():
            whole.stages.setdefault(stage, Account()).add(account)
    return whole
