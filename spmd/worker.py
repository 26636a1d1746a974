"""From a configuration to a rank that is loaded and ready, and from there to figures: what all mains share."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from spmd import STARTED
from spmd.api.source import Source
from spmd.config import Config, decode_rows
from spmd.defaults import block_size, decode_buckets, lookahead, max_num_batched_tokens, prefill_min, prefill_spread
from spmd.engine import Engine, Watch, unwatched
from spmd.guard.guard import Guard
from spmd.leader import Leader
from spmd.model.architecture import Architecture, check_topology, read_architecture
from spmd.model.checkpoint import check_files
from spmd.parallel.groups import Groups, connect
from spmd.parallel.load import LoadExchange
from spmd.parallel.packet import PacketQueue, PacketWire
from spmd.replicas import Alone, Exchanging, InLockstep, Replicas
from spmd.report.clock import Phases
from spmd.report.metrics import Metrics, merge
from spmd.results import Followed, Judged, Results
from spmd.runtime.agreement import host
from spmd.runtime.main import choose_device, from_rank_0, log, open_run_dir, together, warn
from spmd.schedule.balance import Rules
from spmd.schedule.blocks import BlockPool
from spmd.schedule.digests import DigestChain, Undigested
from spmd.schedule.scheduler import Limits, Scheduler
from spmd.signals import Stop
from spmd.stage.build import (
    build_stage,
    count_blocks,
    load_decoder,
    max_model_len,
    on_device,
    stages,
    use_flashinfer,
)
from spmd.stage.memory import check_memory, smallest_of_stages, this_device
from spmd.stage.stage import Stage
from spmd.topology import Topology


@dataclass(frozen=True)
class Worker:
    """One rank with its weights loaded, its KV cache sized and its graphs captured."""

    config: Config
    topology: Topology
    groups: Groups
    device: torch.device
    arch: Architecture
    stage: Stage
    num_blocks: int  # KV blocks of the replica
    run_dir: Path
    stop: Stop
    phases: Phases  # of start-up

    @property
    def max_model_len(self) -> int:
        return max_model_len(self.config, self.arch)

    @property
    def capacity(self) -> int:
        """Tokens one request may have in the KV cache."""
        return (self.num_blocks - 1) * block_size(self.config, self.device.type)

    def run(
        self,
        source: Source,
        leader: Leader | None,
        watch: Watch = unwatched,
        closing: Callable[[], None] | None = None,
    ) -> Metrics | None:
        """Answer all rows of `source`, or those until all ranks stop; on rank 0 returns the figures of all ranks.

        `closing` is called on every rank at the end, still under guard.

        Raises:
            ValueError: where there is no other rank; else it ends the run, see `Guard`.
        """
        t = self.topology
        with self._guarded() as digests, self.stop.gentle():
            engine = self._engine(source, leader, digests, watch)
            log.info("start-up: %s", self.phases)
            started, busy = perf_counter(), self.stage.clock.total()
            engine.run()
            seconds, busy = perf_counter() - started, self.stage.clock.total() - busy
            self.stop.stopped = engine.replicas.stopped
            metrics = _gather(self._metrics(engine, started, seconds, busy), t)
            if closing:
                together(t, closing)
        return metrics

    @contextmanager
    def _guarded(self) -> Iterator[DigestChain | Undigested]:
        """The guard of several ranks watches what runs inside, and the ticks written to what this yields."""
        t, settings, logs = self.topology, self.config.guard, self.run_dir / "logs"
        if t.world_size == 1:
            yield Undigested()
            return
        with together(t, lambda: Guard(t, settings, logs, self.stop, self.device.type == "cpu")) as guard:
            yield DigestChain(guard.recorder.write) if settings.enabled else Undigested()

    def _engine(self, source: Source, leader: Leader | None, digests: DigestChain | Undigested, watch: Watch) -> Engine:
        scheduler = build_scheduler(self.config, self.num_blocks, self.device)
        replicas = build_replicas(self.config, self.topology, self.groups)
        return Engine(scheduler, self.stage, source, replicas, self._results(leader), digests, watch)

    def _results(self, leader: Leader | None) -> Results:
        if self.groups.packets is None:
            assert leader is not None
            return Judged(leader, PacketQueue(), self.stop, self.stage.result_lag)
        packets = PacketWire(self.groups.packets, self.topology.leader, self.config.scheduler.max_num_seqs)
        return Judged(leader, packets, self.stop, self.stage.result_lag) if leader else Followed(packets)

    def _metrics(self, engine: Engine, started: float, seconds: float, busy: float) -> Metrics:
        """This rank's figures. `started`: on perf_counter's clock; `busy`: seconds of the stage."""
        metrics = engine.results.figures(started, started + seconds)
        metrics.stopped(self.topology.pp_rank, busy, seconds, self.phases.total)
        engine.replicas.count(metrics)
        if self.topology.is_leader:  # what all ranks of a replica count alike
            metrics.frozen_ticks = engine.replicas.frozen_ticks
            counters = engine.scheduler.counters
            metrics.preemptions += counters.preemptions
            metrics.cache_hit_tokens += counters.cached_tokens
            metrics.cache_queried_tokens += counters.queried_tokens
        return metrics


def start(
    config: Config, topology: Topology, stop: Stop | None = None, check: Callable[[], None] | None = None
) -> Worker:
    """Bring up this rank. `check` is the main's own check of files, made by every rank before weights load.

    Raises:
        ValueError: what the user can mend, on every rank alike.
    """
    phases = Phases(STARTED)
    phases.end("imports")
    arch = model_shape(config, topology)
    device = choose_device(config)
    arch = on_device(config, arch, device.type)
    use_flashinfer(config, arch, device)
    groups = connect(topology, device, lookahead(config, device.type) > 0, config.topology.ep, config.guard.timeout)
    run_dir = open_run_dir(config, topology)
    if check:
        together(topology, check)
    check_model(config, arch, topology, device)
    phases.end("processes")
    decoder = together(topology, lambda: load_decoder(config, arch, topology, groups, device))
    log.info("layers %d-%d of %d loaded, %s", decoder.range[0], decoder.range[-1], arch.num_layers, arch.dtype)
    phases.end("weights")
    num_blocks = count_blocks(config, arch, topology, device)
    log.info("%d KV blocks of %d tokens", num_blocks, block_size(config, device.type))
    stage = build_stage(config, decoder, num_blocks, topology, groups, device)
    gc.collect()
    gc.freeze()  # what start-up left is kept anyway: no collection in the loop needs to look at it, for 0.1 s each
    phases.end("cache and kernels")
    return Worker(config, topology, groups, device, arch, stage, num_blocks, run_dir, stop or Stop(), phases)


def check_model(config: Config, arch: Architecture, topology: Topology, device: torch.device) -> None:
    """Check that the checkpoint has what all stages need, and that this fits the memory of the smallest devices.

    Raises:
        ValueError: on every rank alike.
    """
    m = config.model
    assert m.path is not None
    own = this_device(device, f"rank {topology.rank} on {host()}", int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    devices, problem, warned = smallest_of_stages(own, config, topology), "", [""]
    if topology.rank == 0:  # for all: it takes a while, and ranks share their machine's cores
        try:
            check_files(arch, m.path, m.load_format, m.revision, stages(config, arch))
            warned = check_memory(config, arch, devices)
        except ValueError as error:
            problem = str(error)
    problem, warned = from_rank_0(topology, (problem, warned))
    if problem:
        raise ValueError(problem)
    for warning in warned:
        warn(warning, topology.rank)


def _gather(metrics: Metrics, topology: Topology) -> Metrics | None:
    if topology.world_size == 1:
        return merge([metrics])
    parts: list[Metrics] | None = [metrics] * topology.world_size if topology.rank == 0 else None
    dist.gather_object(metrics, parts)
    return merge(parts) if parts else None


def model_shape(config: Config, topology: Topology) -> Architecture:
    """Read the model's shape and check that it fits the topology.

    Raises:
        ValueError: one line, see `read_architecture`, `check_topology` and `split_layers`.
    """
    if config.model.path is None:
        raise ValueError("model.path is not set: give a folder with config.json, or a Hub id")
    m = config.model
    arch = read_architecture(config.model.path, m.dtype, m.revision, m.overrides)
    check_topology(arch, topology, config.topology.ep)
    stages(config, arch)
    if m.max_model_len and m.max_model_len > arch.max_position_embeddings:
        raise ValueError(
            f"model.max_model_len={m.max_model_len} is more than the {arch.max_position_embeddings} positions "
            f"the model was made for (max_position_embeddings)"
        )
    return arch


def build_scheduler(config: Config, num_blocks: int, device: torch.device) -> Scheduler:
    """The replicated scheduler of a replica."""
    s = config.scheduler
    limits = Limits(
        max_num_seqs=s.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens(config, device.type),
        decode_rows=decode_rows(config),
        slots=config.topology.pp + s.async_depth,
        lookahead=lookahead(config, device.type),
        balanced=s.decode_cap,
        exclusive=s.prefill == "exclusive",
        prefill_batch=s.prefill_batch,
        prefill_spread=prefill_spread(config),
        prefill_min=prefill_min(config, device.type),
        by_priority=s.policy == "priority",
        decode_buckets=tuple(decode_buckets(config, device.type)),
    )
    return Scheduler(limits, BlockPool(num_blocks, block_size(config, device.type), s.prefix_caching))


def build_replicas(config: Config, topology: Topology, groups: Groups) -> Replicas:
    """A replica's part in the balance of all."""
    b, s = config.balance, config.scheduler
    rules = Rules(
        max_num_seqs=s.max_num_seqs,
        by_priority=s.policy == "priority",
        dp=topology.dp,
        dp_rank=topology.dp_rank,
        share=b.share,
        gate=b.gate,
        interval=b.interval,
        patience=b.patience,
        lag=0 if config.topology.ep else b.lag,  # replicas that share experts are never apart
    )
    if groups.load is None:
        return Alone(rules)
    exchange = LoadExchange(groups.load, topology.dp, rules.lag)
    return InLockstep(rules, exchange) if groups.experts else Exchanging(rules, exchange)
