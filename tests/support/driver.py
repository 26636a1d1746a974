"""One rank of a run under test: the engine as the main job builds it, watched after every tick."""

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from spmd.api.reader import Reader
from spmd.api.rows import RowParser
from spmd.config import BalanceConfig, Config, GuardConfig, ModelConfig, SchedulerConfig, TopologyConfig
from spmd.config_checks import check
from spmd.engine import Engine, Watch
from spmd.leader import Leader
from spmd.parallel.replicas import Exchanging
from spmd.processes.answer_writer import AnswerWriter
from spmd.report.metrics import Metrics
from spmd.schedule.digests import DigestChain
from spmd.signals import Stop
from spmd.stage.stage import Stage
from spmd.topology import Topology
from spmd.worker import settle, start
from tests.support.oracle import Answer
from tests.support.ranks import Ranks
from tests.support.tiny_tokenizer import make_tokenizer

tokenizer = cache(make_tokenizer)


@dataclass(frozen=True)
class Tick:
    """What one rank planned at one tick."""

    digests: tuple[int, ...]
    num_decodes: int
    padded_decodes: int
    chunks: list[tuple[int, int, int]]  # of prompts: row, start, count
    sampled: list[int]  # rows of the input


@dataclass
class Report:
    """What one rank saw."""

    num_blocks: int
    samples: bool  # whether this rank has a sampler
    answers: dict[str, Answer] = field(default_factory=dict)  # on the leader of a replica
    errors: dict[str, str] = field(default_factory=dict)  # messages of rows without an answer, likewise
    failed: int = 0  # rows that the metrics count as such
    ticks: list[Tick] = field(default_factory=list)
    preemptions: int = 0
    cached_tokens: int = 0
    exchanges: int | None = None  # of loads; None: this rank has none
    frozen_ticks: int = 0
    stopped: int = 0  # for whom all ranks stopped early


def configure(
    model: str,
    input: str,
    run_dir: str,
    topology: tuple[int, ...],
    layers: list[int] | None = None,
    balance: BalanceConfig | None = None,
    ep: bool = False,
    **scheduler: Any,
) -> Config:
    """A checked configuration; `topology` is (dp, pp, tp). Small seats, blocks and chunks unless told otherwise."""
    dp, pp, tp = topology
    small = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 4, "lookahead": 0}
    config = Config(
        model=ModelConfig(path=model),
        topology=TopologyConfig(dp, pp, tp, layers, ep),
        scheduler=SchedulerConfig(**small | scheduler),
        balance=balance or BalanceConfig(),
        guard=GuardConfig(enabled=False),  # an error comes out, with its traceback
        input=input,
        device="cpu",
        run_dir=run_dir,
    )
    check(config, dp * pp * tp)
    return config


def drive(rank: int, config: Config, delays_ms: Sequence[float] = (), stop: Stop | None = None) -> Report:
    """Answer `config.input` on this rank, after each tick asserting that the scheduler is intact.

    `delays_ms`: the longest pause of each rank after a tick; how long one is, each rank draws for itself. `stop`: as
    in a main.
    """
    t = config.topology
    topology = Topology(t.dp, t.pp, t.tp, rank)
    worker = start(settle(config), topology, stop or Stop())
    if not config.guard.enabled:  # its last words are in the log
        logging.getLogger("spmd").handlers.clear()
    settings, vocab_size = worker.settings, worker.settings.arch.vocab_size
    longest, capacity = settings.model.max_model_len, settings.capacity
    parser = RowParser(tokenizer(), {}, config.sampling, longest, capacity, vocab_size)
    assert settings.scheduler.num_blocks is not None
    assert config.input is not None
    reader = Reader(config.input, parser)
    report = Report(settings.scheduler.num_blocks, topology.is_leader)
    writer = AnswerWriter(tokenizer(), "tested", _keep(report))
    leader = Leader(tokenizer(), Metrics(), writer) if topology.is_leader else None
    worker.run(reader, leader, _watch(report, random.Random(rank), delays_ms[rank] if delays_ms else 0.0))
    report.failed = leader.metrics.rows_failed if leader else 0
    report.stopped = worker.stop.stopped
    return report


def _keep(report: Report) -> Callable[[int, str, int | None, bool], None]:
    def write(index: int, line: str, key: int | None, failed: bool) -> None:
        answer = json.loads(line)
        assert answer["custom_id"] not in report.answers | report.errors, "answered twice"
        if failed:
            report.errors[answer["custom_id"]] = answer["error"]["message"]
            return
        choices = answer["response"]["body"]["choices"]
        kept = [(choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) for choice in choices]
        report.answers[answer["custom_id"]] = kept

    return write


def _watch(report: Report, rng: random.Random, delay_ms: float) -> Watch:
    digests = DigestChain()

    def watch(engine: Engine) -> None:
        scheduler, plan = engine.scheduler, engine.ring[-1]
        scheduler.check(engine.ring)
        assert isinstance(engine.stage, Stage) and (engine.stage.sampler is not None) == report.samples
        first = plan.num_decodes
        rows = [request.index for request in plan.requests]
        chunks = list(zip(rows, plan.starts, plan.counts, strict=True))[first:]
        sampled = [request.index for request in plan.sampled]
        report.ticks.append(Tick(digests.plan(plan), first, plan.padded_decodes, chunks, sampled))
        report.preemptions = scheduler.counters.preemptions
        report.cached_tokens = scheduler.counters.cached_tokens
        report.exchanges = engine.replicas.exchange.count if isinstance(engine.replicas, Exchanging) else None
        report.frozen_ticks = engine.replicas.frozen_ticks
        if delay_ms:
            time.sleep(rng.random() * delay_ms / 1000)

    return watch


def run(ranks: Ranks, config: Config, drive: Callable[..., Report] = drive, *args: Any) -> list[Report]:
    """Reports of all ranks, after asserting what holds for every run.

    Ranks of a replica plan alike; replicas exchange their loads once a tick and end at the same one.
    """
    t = config.topology
    reports = ranks.run(t.dp * t.pp * t.tp, drive, config, *args)
    ticks = len(reports[0].ticks)
    for report in reports:
        assert report.exchanges == (ticks if t.dp > 1 else None)
        assert len(report.ticks) == ticks
    for replica in Topology(t.dp, t.pp, t.tp).replicas():
        first, *others = (reports[rank] for rank in replica)
        for other in others:
            assert other.ticks == first.ticks
            assert other.num_blocks == first.num_blocks
        assert [rank for rank in replica if reports[rank].samples] == [replica[-t.tp]]
    return reports


def errors(reports: list[Report]) -> dict[str, str]:
    """Why rows have no answer, of all replicas."""
    return {custom_id: message for report in reports for custom_id, message in report.errors.items()}


def answers(reports: list[Report]) -> dict[str, Answer]:
    """The answers of all replicas."""
    found = [(custom_id, answer) for report in reports for custom_id, answer in report.answers.items()]
    assert len({custom_id for custom_id, _ in found}) == len(found), "answered by two replicas"
    return dict(found)
