"""The host's share of one decode tick: all that a rank does in Python, but for launching the forward.

python -m spmd.bench.host [running] [tokens] [pp] [lookahead]

The rank is the leader and the first stage at once, so no real one does more; with pp > 1 it sends its packets to
itself. A forward may take less than a millisecond: with lookahead the host must not take longer, and without it the
GPU waits for all of this.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from statistics import median, quantiles
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from spmd.api.endpoints import COMPLETIONS
from spmd.api.rows import Job
from spmd.api.source import Listed
from spmd.engine import Engine
from spmd.leader import Judged, Leader, Packets
from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.packet import Packet, PacketQueue, PacketWire
from spmd.parallel.replicas import Alone
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import Sampled, plain_greedy
from spmd.schedule.balance import Rules
from spmd.schedule.blocks import BlockPool
from spmd.schedule.digests import Undigested
from spmd.schedule.limits import Limits
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from spmd.schedule.scheduler import Scheduler
from spmd.signals import Stop
from spmd.stage.inputs import InputBuilder
from spmd.topology import Topology
from spmd.trace.host_clock import HostClock

BLOCK_SIZE = 16
TICKS = 400
CPU = torch.device("cpu")
P = ParamSpec("P")
R = TypeVar("R")


class Laps:
    """Seconds of each part of each tick; the whole is "tick"."""

    def __init__(self) -> None:
        self.ticks: list[dict[str, float]] = []

    def begin(self) -> None:
        self.ticks.append({})

    def timed(self, part: str, do: Callable[P, R]) -> Callable[P, R]:
        """`do`, whose time counts for a part of the tick that goes on."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            started = perf_counter()
            result = do(*args, **kwargs)
            self.ticks[-1][part] = self.ticks[-1].get(part, 0.0) + perf_counter() - started
            return result

        return call


class TimedScheduler(Scheduler):
    def __init__(self, limits: Limits, pool: BlockPool, laps: Laps) -> None:
        super().__init__(limits, pool)
        self._schedule = laps.timed("schedule", super().schedule)
        self._commit = laps.timed("commit", super().commit)

    def schedule(self, tick: int, admit: bool = True) -> Plan:
        return self._schedule(tick, admit)

    def commit(self, plan: Plan, tokens: Sequence[int], finished: Sequence[bool]) -> list[Request]:
        return self._commit(plan, tokens, finished)


class TimedLeader(Leader):
    def __init__(self, laps: Laps) -> None:
        super().__init__(None, Metrics())
        self._judge = laps.timed("judge", super().judge)

    def judge(self, plan: Plan, sampled: Sampled) -> tuple[list[int], list[bool]]:
        return self._judge(plan, sampled)


class TimedReplicas(Alone):
    def __init__(self, rules: Rules, laps: Laps) -> None:
        super().__init__(rules)
        self._next_row = laps.timed("feed", super().next_row)

    def next_row(self, held: int) -> bool | None:
        return self._next_row(held)


class TimedPackets:
    def __init__(self, packets: Packets, laps: Laps) -> None:
        self._post = laps.timed("post", packets.post)
        self._receive = laps.timed("receive", packets.receive)

    def post(self, packet: Packet) -> None:
        self._post(packet)

    def receive(self) -> Packet:
        return self._receive()


class Rehearsal:
    """What a stage does in Python. Every token sampled is 1."""

    def __init__(self, builder: InputBuilder, feedback: TokenFeedback | None, laps: Laps) -> None:
        self.feedback = feedback
        self.build = laps.timed("inputs", builder.build)
        self.greedy = laps.timed("greedy", plain_greedy)
        self.send = laps.timed("feedback", feedback.send) if feedback else None
        self.decodes = 0  # rows of the last plan

    def run(self, plan: Plan, shared_rows: int | None) -> Sampled | None:
        self.decodes = plan.num_decodes
        if self.feedback:
            self.feedback.receive(plan)
        self.build(plan, self.feedback.latest if self.feedback else None)
        if not plan.sampled:
            return None
        assert self.greedy(plan.sampled, plan.sample_positions)
        sampled = Sampled(torch.ones(len(plan.sampled), dtype=torch.int64))
        if self.send:
            self.send(plan, sampled.token_ids)
        return sampled

    def drain(self) -> None:
        pass


def jobs(running: int, tokens: int, max_tokens: int) -> list[Job]:
    """Greedy requests of about `tokens` tokens, which start new blocks at different ticks."""
    made = []
    for index in range(running):
        prompt = Prompt((index * 7919 + place) % 50_000 for place in range(tokens + index % BLOCK_SIZE))
        request = Request(index, 0, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))
        made.append(Job(index, str(index), COMPLETIONS, [request], [prompt]))
    return made


@contextmanager
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def build(
    running: int, tokens: int, pp: int, lookahead: int, group: dist.ProcessGroup, laps: Laps
) -> tuple[Engine, Rehearsal]:
    """An engine that takes its laps, with room for TICKS tokens of each request, and its stage."""
    longest = tokens + TICKS + 64
    width = longest // BLOCK_SIZE + 1
    limits = Limits(running, running * tokens, running // pp, slots=pp, lookahead=lookahead)
    scheduler = TimedScheduler(limits, BlockPool(running * width + 1, BLOCK_SIZE, caching=True), laps)
    inputs = InputBuilder(running, width, running * longest, BLOCK_SIZE, CPU)
    feedback = TokenFeedback(Topology(), None, running, pp, CPU) if lookahead else None
    packets = TimedPackets(PacketWire(group, 0, running) if pp > 1 else PacketQueue(), laps)
    stage, source = Rehearsal(inputs, feedback, laps), Listed(jobs(running, tokens, longest))
    results = Judged(TimedLeader(laps), packets, Stop(), lag=1 if feedback else 0)
    replicas = TimedReplicas(Rules(running), laps)
    return Engine(scheduler, stage, source, replicas, results, Undigested(), HostClock()), stage


def measure(running: int, tokens: int, pp: int, lookahead: int) -> dict[str, list[float]]:
    """Seconds of each part of most of TICKS decode ticks with `running` requests of about `tokens` tokens each."""
    laps, whole = Laps(), []
    with alone() as group:
        engine, stage = build(running, tokens, pp, lookahead, group, laps)
        tick = laps.timed("tick", engine.tick)
        for number in range(TICKS):
            laps.begin()
            tick(number)
            whole.append(stage.decodes == running // pp)
    decodes = list(compress(laps.ticks, whole))[pp + lookahead :]  # before these nothing is committed
    return {part: [parts[part] for parts in decodes] for part in decodes[0]}


def main(running: int = 128, tokens: int = 1500, pp: int = 2, lookahead: int = 0) -> None:
    seconds = measure(running, tokens, pp, lookahead)
    whole = seconds.pop("tick")
    shape = f"{running} running, {tokens} tokens each, pp={pp}, lookahead={lookahead}"
    print(f"{shape}: medians of {len(whole)} decode ticks of {running // pp} rows, ms")
    seconds["rest"] = [tick - sum(parts) for tick, *parts in zip(whole, *seconds.values(), strict=True)]
    for part, each in seconds.items():
        print(f"{part:>10} {1e3 * median(each):7.3f}")
    print(f"{'tick':>10} {1e3 * median(whole):7.3f}   p99 {1e3 * quantiles(whole, n=100)[98]:.3f}")
    planning = zip(seconds["commit"], seconds["schedule"], seconds["inputs"], strict=True)
    print(f"commit + schedule + inputs: median {1e3 * median(map(sum, planning)):.3f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
