"""From a configuration to a rank that is loaded and ready, and from there to figures: what all mains share."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist

from spmd.config import Config, decode_rows, prefill_spread
from spmd.engine import Engine
from spmd.io.rows import BadRow, Job
from spmd.leader import Leader
from spmd.model.architecture import Architecture, check_topology, read_architecture
from spmd.model.checkpoint import load
from spmd.model.decoder import Decoder
from spmd.model.inputs import InputBuilder
from spmd.model.kv_cache import KVCache
from spmd.model.sampler import Sampler
from spmd.model.stage import Stage
from spmd.parallel.groups import Groups, connect
from spmd.parallel.hidden import HiddenChannel
from spmd.parallel.packet import PacketWire
from spmd.parallel.tensor import TensorParallel
from spmd.report.metrics import Metrics, merge
from spmd.runtime import choose_device, log, open_run_dir, together
from spmd.schedule.blocks import BlockPool
from spmd.schedule.scheduler import Limits, Scheduler
from spmd.topology import Topology, split_layers

CPU_CACHE_BYTES = 4 * 2**30  # KV cache of a rank without a GPU, as vLLM's CPU default


@dataclass(frozen=True)
class Worker:
    """One rank with its weights loaded and its KV cache sized."""

    config: Config
    topology: Topology
    groups: Groups
    device: torch.device
    decoder: Decoder
    num_blocks: int  # KV blocks of the replica
    launched: float  # when start-up began

    @property
    def max_model_len(self) -> int:
        return max_model_len(self.config, self.decoder.arch)

    @property
    def capacity(self) -> int:
        """Tokens one request may have in the KV cache."""
        return (self.num_blocks - 1) * self.config.scheduler.block_size

    def run(
        self,
        source: Iterator[Job | BadRow],
        leader: Leader | None,
        watch: Callable[[Engine], None] | None = None,
    ) -> Metrics | None:
        """Answer all rows of `source`; on rank 0 returns the figures of all ranks."""
        t, metrics = self.topology, leader.metrics if leader else Metrics()
        stage = build_stage(self.config, self.decoder, self.num_blocks, t, self.groups, self.device)
        packets = PacketWire(self.groups.packets, t.leader, t.is_leader, self.config.scheduler.max_num_seqs)
        engine = Engine(build_scheduler(self.config, self.num_blocks), stage, packets, source, leader, watch)
        started = perf_counter()
        engine.run()
        metrics.stopped(t.pp_rank, stage.busy_s, perf_counter() - started, started - self.launched)
        if leader:
            counters = engine.scheduler.counters
            metrics.preemptions += counters.preemptions
            metrics.cache_hit_tokens += counters.cached_tokens
            metrics.cache_queried_tokens += counters.queried_tokens
        return _gather(metrics, t)


def start(config: Config, topology: Topology, check: Callable[[], None] | None = None) -> Worker:
    """Bring up this rank. `check` is the main's own check of files, made by every rank before weights load.

    Raises:
        ValueError: what the user can mend, on every rank alike.
    """
    launched = perf_counter()
    arch = model_shape(config, topology)
    device = choose_device(config)
    groups = connect(topology, device)
    open_run_dir(config, topology)
    if check:
        together(topology, check)
    decoder = together(topology, lambda: load_decoder(config, arch, topology, groups, device))
    num_blocks = count_blocks(config, arch, topology, device)
    log.info("%d KV blocks of %d tokens", num_blocks, config.scheduler.block_size)
    return Worker(config, topology, groups, device, decoder, num_blocks, launched)


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
    check_topology(arch, topology)
    split_layers(arch.num_layers, topology.pp, config.topology.layers)
    if m.max_model_len and m.max_model_len > arch.max_position_embeddings:
        raise ValueError(
            f"model.max_model_len={m.max_model_len} is more than the {arch.max_position_embeddings} positions "
            f"the model was made for (max_position_embeddings)"
        )
    return arch


def max_model_len(config: Config, arch: Architecture) -> int:
    return config.model.max_model_len or arch.max_position_embeddings


def load_decoder(
    config: Config, arch: Architecture, topology: Topology, groups: Groups, device: torch.device
) -> Decoder:
    """This rank's layers with their weights.

    Raises:
        ValueError: the checkpoint lacks tensors or holds others.
    """
    layers = split_layers(arch.num_layers, topology.pp, config.topology.layers)[topology.pp_rank]
    tp = TensorParallel(topology.tp_rank, topology.tp, groups.tensor)
    decoder = Decoder(arch, layers, topology.is_first_stage, topology.is_last_stage, tp, device)
    assert config.model.path is not None
    load(decoder, config.model.path, config.model.load_format, config.model.revision)
    decoder.pack(decode_rows(config))
    log.info("layers %d-%d of %d loaded, %s on %s", layers[0], layers[-1], arch.num_layers, arch.dtype, device)
    return decoder


def count_blocks(config: Config, arch: Architecture, topology: Topology, device: torch.device) -> int:
    """KV blocks of a replica: what the poorest rank has room for, and no more than all seats can fill.

    Raises:
        ValueError: not even one block fits.
    """
    s = config.scheduler
    if s.num_blocks is not None:
        return s.num_blocks
    stages = split_layers(arch.num_layers, topology.pp, config.topology.layers)
    size = KVCache.bytes_per_block(arch, len(stages[topology.pp_rank]), topology.tp, s.block_size)
    room = _cache_bytes(config, device)
    usable = 1 + s.max_num_seqs * math.ceil(max_model_len(config, arch) / s.block_size)
    blocks = torch.tensor(min(room // size, usable))
    if topology.world_size > 1:
        dist.all_reduce(blocks, dist.ReduceOp.MIN)
    if blocks < 2:
        raise ValueError(
            f"no room for a KV cache: {room / 2**30:.2f} GiB are left, a block of {s.block_size} tokens takes "
            f"{size / 2**20:.2f} MiB; use more stages or tensor ranks, or a higher scheduler.gpu_memory_utilization"
        )
    return int(blocks)


def _cache_bytes(config: Config, device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total * config.scheduler.gpu_memory_utilization) - (total - free))


def build_scheduler(config: Config, num_blocks: int) -> Scheduler:
    """The replicated scheduler of a replica."""
    s = config.scheduler
    limits = Limits(
        max_num_seqs=s.max_num_seqs,
        max_num_batched_tokens=s.max_num_batched_tokens,
        decode_rows=decode_rows(config),
        slots=config.topology.pp + s.async_depth,
        balanced=s.decode_cap,
        exclusive=s.prefill == "exclusive",
        prefill_batch=s.prefill_batch,
        prefill_spread=prefill_spread(config),
        by_priority=s.policy == "priority",
        decode_buckets=tuple(s.decode_buckets),
    )
    return Scheduler(limits, BlockPool(num_blocks, s.block_size, s.prefix_caching))


def build_stage(
    config: Config, decoder: Decoder, num_blocks: int, topology: Topology, groups: Groups, device: torch.device
) -> Stage:
    """This rank's share of every tick."""
    s, arch = config.scheduler, decoder.arch
    longest = min(max_model_len(config, arch), (num_blocks - 1) * s.block_size)
    cache = KVCache(arch, len(decoder.range), num_blocks, s.block_size, topology.tp, device)
    inputs = InputBuilder(s.max_num_seqs, math.ceil(longest / s.block_size), s.block_size, device)
    channel = None
    if topology.pp > 1:
        slots = topology.pp + s.async_depth
        channel = HiddenChannel(topology, groups.hidden, arch.hidden_size, arch.dtype, device, slots)
    sampler = Sampler(arch.vocab_size, device) if topology.is_leader else None
    return Stage(decoder, cache, inputs, channel, sampler)

