"""From a configuration to a rank that is loaded and ready, and from there to figures: what all mains share."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from spmd import STARTED
from spmd.api.source import Source
from spmd.config import Config
from spmd.engine import Engine, Replicas, Results, Watch, all_of, unwatched
from spmd.guard.ending import after_start_up
from spmd.guard.guard import Guard
from spmd.leader import Followed, Judged, Leader
from spmd.model.checkpoint import check_files
from spmd.parallel.groups import Groups, connect
from spmd.parallel.load import LoadExchange
from spmd.parallel.packet import PacketQueue, PacketWire
from spmd.parallel.replicas import Alone, Exchanging, InLockstep
from spmd.report.metrics import Metrics, merge
from spmd.report.startup import Phases
from spmd.report.summary import FIGURES, write_figures
from spmd.runtime.agreement import from_each, from_rank_0, host, together
from spmd.runtime.device import check_own_gpus, choose_device
from spmd.runtime.main import log
from spmd.runtime.run_dir import open_run_dir, record, warn
from spmd.schedule.balance import Rules
from spmd.schedule.blocks import BlockPool
from spmd.schedule.digests import DigestChain, Undigested
from spmd.schedule.limits import Limits
from spmd.schedule.scheduler import Scheduler
from spmd.settings import Settings, read_model, resolve, worked_out
from spmd.signals import Stop
from spmd.stage.build import build_stage, load_decoder
from spmd.stage.memory import check_memory, count_blocks, smallest_of_stages, this_device
from spmd.stage.stage import Stage
from spmd.topology import Topology
from spmd.trace.alignment import measure
from spmd.trace.recorder import recording
from spmd.trace.tick_file import place


@dataclass(frozen=True)
class Worker:
    """One rank with its weights loaded, its KV cache sized and its graphs captured."""

    settings: Settings
    topology: Topology
    groups: Groups
    device: torch.device
    stage: Stage
    run_dir: Path
    stop: Stop
    phases: Phases  # of start-up

    def run(
        self,
        source: Source,
        leader: Leader | None,
        watch: Watch = unwatched,
    ) -> Metrics | None:
        """Answer all rows of `source`, or those until all ranks stop; on rank 0 returns the figures of all ranks.

        Raises:
            Mistake: what the user can mend, where there is no other rank; else it ends the run, see `Guard`.
            RuntimeError: any other ValueError.
        """
        t = self.topology
        with after_start_up(), self._guarded() as digests, self.stop.gentle(), self._traced() as recorder:
            scheduler, replicas = build_scheduler(self.settings), build_replicas(self.settings, t, self.groups)
            results, clock = self._results(leader), self.stage.clock
            watches = all_of(watch, recorder)
            engine = Engine(scheduler, self.stage, source, replicas, results, digests, clock, watches)
            log.info("start-up: %s", self.phases)
            started = perf_counter()
            clock.start()
            engine.run()
            clock.stop()
            together(t, lambda: leader.close() if leader else None)
            seconds = perf_counter() - started  # until all answers are where they belong
            self.stop.stopped = engine.replicas.stopped
            metrics = _gather(self._metrics(engine, started, seconds), t)
            if metrics and self.settings.trace:
                write_figures(metrics, self.run_dir / "trace" / FIGURES)
            return metrics

    @contextmanager
    def _guarded(self) -> Iterator[DigestChain | Undigested]:
        """The guard of several ranks watches what runs inside, and the ticks written to what this yields."""
        t, settings, logs = self.topology, self.settings.guard, self.run_dir / "logs"
        if t.world_size == 1:
            yield Undigested()
            return
        with together(t, lambda: Guard(t, settings, logs, self.stop, self.device.type == "cpu")) as guard:
            yield DigestChain(guard.recorder.write) if settings.enabled else Undigested()

    @contextmanager
    def _traced(self) -> Iterator[Watch]:
        """What to call after every tick to have it recorded, if that is asked for."""
        t, s = self.topology, self.settings
        if not s.trace:
            yield unwatched
            return
        folder = self.run_dir / "trace"
        (folder / FIGURES).unlink(missing_ok=True)  # of an earlier run of this process, such as a bench's warm-up
        hosts = from_each(t, host())
        offset = measure(t.rank, hosts)
        about = {
            **place(t),
            "host": hosts[t.rank],
            "offset_ns": offset.ns,
            "offset_error_ns": offset.error_ns,
            "slots": s.slots,
            "seats": s.scheduler.max_num_seqs,
            "device": self.device.type,
        }
        with ExitStack() as stack:
            files = recording(folder, self.stage.clock, about)
            yield together(t, lambda: stack.enter_context(files))

    def _results(self, leader: Leader | None) -> Results:
        if self.groups.packets is None:
            assert leader is not None
            return Judged(leader, PacketQueue(), self.stop, self.stage.result_lag)
        packets = PacketWire(self.groups.packets, self.topology.leader, self.settings.scheduler.max_num_seqs)
        return Judged(leader, packets, self.stop, self.stage.result_lag) if leader else Followed(packets)

    def _metrics(self, engine: Engine, started: float, seconds: float) -> Metrics:
        """This rank's figures. `started`: on perf_counter's clock."""
        metrics = engine.results.figures(started, started + seconds)
        metrics.stopped(self.topology.pp_rank, engine.clock.account(seconds), seconds, self.phases.total)
        metrics.host, metrics.input_wait_seconds = engine.host_times, engine.source.waited
        replicas = engine.replicas
        metrics.mixed_ticks, metrics.exchanges = replicas.mixed_ticks, replicas.exchanges
        metrics.exchange_seconds = replicas.exchange_seconds
        if self.topology.is_leader:  # what all ranks of a replica count alike
            metrics.frozen_ticks = replicas.frozen_ticks
            counters = engine.scheduler.counters
            metrics.preemptions += counters.preemptions
            metrics.cache_hit_tokens += counters.cached_tokens
            metrics.cache_queried_tokens += counters.queried_tokens
        return metrics


def unheard(settings: Settings) -> None:
    """Nobody waits for the size of the KV cache."""


def settle(config: Config) -> Settings:
    """The settings of this rank: reads the model's shape and finds its device.

    Raises:
        ValueError: what the user can mend, on every rank alike.
    """
    device = choose_device(config.device)
    return resolve(config, read_model(config), device)


def start(settings: Settings, topology: Topology, stop: Stop, sized: Callable[[Settings], None] = unheard) -> Worker:
    """Bring up this rank.

    Args:
        sized: called on every rank once the size of the KV cache is known, a while before the rank is ready.

    Raises:
        ValueError: what the user can mend, on every rank alike.
    """
    phases = Phases(STARTED)
    phases.end("imports")
    s, device = settings.scheduler, choose_device(settings.kind)
    if dist.is_initialized():
        check_own_gpus(device, topology)  # NCCL refuses such ranks, in words of its own
    groups = connect(topology, device, s.lookahead > 0, settings.topology.ep, settings.guard.timeout)
    run_dir = open_run_dir(settings, topology)
    log.info("worked out: %s", worked_out(settings))
    check_model(settings, topology, device)
    phases.end("processes")
    decoder = together(topology, lambda: load_decoder(settings, topology, groups, device))
    layers = decoder.range
    log.info("layers %d-%d of %d loaded, %s", layers[0], layers[-1], settings.arch.num_layers, settings.arch.dtype)
    phases.end("weights")
    settings = settings.sized(count_blocks(settings, topology, device))
    log.info("%d KV blocks of %d tokens", settings.scheduler.num_blocks, s.block_size)
    record(settings, run_dir, topology)
    sized(settings)
    stage = build_stage(settings, decoder, topology, groups, device)
    gc.collect()
    gc.freeze()  # what start-up left is kept anyway: no collection in the loop needs to look at it, for 0.1 s each
    phases.end("cache and kernels")
    return Worker(settings, topology, groups, device, stage, run_dir, stop, phases)


def check_model(settings: Settings, topology: Topology, device: torch.device) -> None:
    """Check that the checkpoint has what all stages need, and that this fits the memory of the smallest devices.

    Raises:
        ValueError: on every rank alike.
    """
    m = settings.model
    own = this_device(device, f"rank {topology.rank} on {host()}", int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    devices, problem, cautions = smallest_of_stages(own, settings, topology), "", [""]
    if topology.rank == 0:  # for all: it takes a while, and ranks share their machine's cores
        try:
            check_files(settings.arch, m.path, m.load_format, m.revision, settings.stages)
            cautions = check_memory(settings, devices)
        except ValueError as error:
            problem = str(error)
    problem, cautions = from_rank_0(topology, (problem, cautions))
    if problem:
        raise ValueError(problem)
    for caution in cautions:
        warn(caution, topology.rank)


def _gather(metrics: Metrics, topology: Topology) -> Metrics | None:
    if topology.world_size == 1:
        return merge([metrics])
    parts: list[Metrics] | None = [metrics] * topology.world_size if topology.rank == 0 else None
    dist.gather_object(metrics, parts)
    return merge(parts) if parts else None


def build_scheduler(settings: Settings) -> Scheduler:
    """The replicated scheduler of a replica."""
    s = settings.scheduler
    assert s.num_blocks is not None
    limits = Limits(
        max_num_seqs=s.max_num_seqs,
        max_num_batched_tokens=s.max_num_batched_tokens,
        decode_rows=settings.decode_rows,
        slots=settings.slots,
        lookahead=s.lookahead,
        balanced=s.decode_cap,
        exclusive=s.prefill == "exclusive",
        prefill_batch=s.prefill_batch,
        prefill_spread=s.prefill_spread,
        prefill_min=s.prefill_min,
        long_prompt=0 if s.policy == "priority" else s.long_prefill_token_threshold,
        by_priority=s.policy == "priority",
        decode_buckets=tuple(s.decode_buckets),
        mixed_buckets=tuple(s.mixed_buckets),
    )
    return Scheduler(limits, BlockPool(s.num_blocks, s.block_size, s.prefix_caching))


def build_replicas(config: Settings, topology: Topology, groups: Groups) -> Replicas:
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
