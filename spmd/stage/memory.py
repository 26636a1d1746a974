"""Whether a configuration fits the memory of its devices: what each stage needs, known before any weight is loaded.

Weights and KV cache are exact, since they are counted in the tensors that would be allocated. On GPUs both must fit the
share that `scheduler.gpu_memory_utilization` allows; activations, which are estimated, come out of the rest. On CPUs a
machine that was filled would end other people's processes too: what it can't hold is refused.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spmd.backend.choose import exchange_bytes
from spmd.integers import ceil_div
from spmd.messages import readable
from spmd.model.architecture import check_topology
from spmd.model.cache_spec import block_bytes
from spmd.model.decoder import Decoder
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel
from spmd.settings import Settings
from spmd.stage.activations import activation_bytes
from spmd.topology import Topology

CPU_CACHE_BYTES = 4 * 2**30  # KV cache of a rank without a GPU, as vLLM's CPU default
CUDA_BYTES = 2**30  # what CUDA, NCCL and cuBLAS take of a GPU, about, where it can't be measured
MOST_UTILIZATION = 0.95  # that is advised
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # lines of id, controllers and path; version 2 has one, without controllers


@dataclass(frozen=True)
class Device:
    """The memory that one rank has: a GPU's, or its share of a machine's."""

    kind: str  # cuda or cpu
    total: int  # bytes
    used: int = 0  # of these, by CUDA itself and by others
    place: str = ""  # where it is, for people

    def usable(self, settings: Settings) -> int:
        """Bytes for weights and KV cache."""
        share = settings.scheduler.gpu_memory_utilization if self.kind == "cuda" else 1.0
        return int(self.total * share) - self.used


@dataclass(frozen=True)
class Needs:
    """Bytes on each rank of a stage: its tensor ranks, and those of other replicas, need the same."""

    stage: int
    layers: range
    weights: int  # with the memory that ranks share for the rows of experts
    block: int  # of the KV cache
    activations: int

    def with_cache(self, blocks: int) -> int:
        return self.weights + blocks * self.block

    def __str__(self) -> str:
        return f"stage {self.stage} (layers {self.layers[0]}-{self.layers[-1]})"


def needs(settings: Settings) -> list[Needs]:
    """What each stage needs. Nothing is allocated."""
    t, s, arch, found = settings.topology, settings.scheduler, settings.arch, []
    ep = ExpertParallel(0, t.dp * t.tp) if t.ep else None
    sharing = t.dp if t.ep else 1  # replicas
    exchanged = exchange_bytes(settings.model.attention_backend, arch, sharing, s.max_num_batched_tokens)
    for stage, layers in enumerate(settings.stages):
        first, last = stage == 0, stage == t.pp - 1
        decoder = Decoder(arch, layers, first, last, TensorParallel(0, t.tp), ep, "meta")
        weights = sum(parameter.nbytes for parameter in decoder.parameters()) + exchanged
        block = block_bytes((arch.cache_spec(layer, t.tp) for layer in layers), s.block_size)
        found.append(Needs(stage, layers, weights, block, activation_bytes(settings, last)))
    return found


def least_blocks(settings: Settings) -> int:
    """KV blocks without which a run makes no sense: those asked for, else one request of full length."""
    s = settings.scheduler
    return s.num_blocks or 1 + ceil_div(settings.model.max_model_len, s.block_size)


def most_blocks(settings: Settings) -> int:
    """KV blocks that all seats can use."""
    s = settings.scheduler
    return s.num_blocks or 1 + s.max_num_seqs * (least_blocks(settings) - 1)


def blocks_in(settings: Settings, available: int, block: int) -> int:
    """KV blocks of `block` bytes that a rank gets of `available` bytes: no more than all seats can use.

    On CPUs CPU_CACHE_BYTES are available, whatever the machine has.
    """
    if settings.kind == "cpu":
        available = CPU_CACHE_BYTES
    return settings.scheduler.num_blocks or min(most_blocks(settings), available // block)


def blocks_that_fit(settings: Settings, devices: Sequence[Device]) -> int:
    """KV blocks that a replica will get: what its fullest stage has room for, by what is known before a start."""
    each = zip(needs(settings), devices, strict=True)
    return min(blocks_in(settings, device.usable(settings) - stage.weights, stage.block) for stage, device in each)


def count_blocks(settings: Settings, topology: Topology, device: torch.device) -> int:
    """KV blocks of a replica, once weights are loaded: what the poorest rank has room for.

    Raises:
        ValueError: not even one block fits.
    """
    s, layers = settings.scheduler, settings.stages[topology.pp_rank]
    if s.num_blocks is not None:
        return s.num_blocks
    size = block_bytes((settings.arch.cache_spec(layer, topology.tp) for layer in layers), s.block_size)
    available = max(0, this_device(device).usable(settings)) if device.type == "cuda" else CPU_CACHE_BYTES
    blocks = torch.tensor(blocks_in(settings, available, size))
    if topology.world_size > 1:
        dist.all_reduce(blocks, dist.ReduceOp.MIN)
    if blocks < 2:
        raise ValueError(
            f"no room for a KV cache: {available / 2**30:.2f} GiB are left, a block of {s.block_size} tokens takes "
            f"{size / 2**20:.2f} MiB; use more stages or tensor ranks, or a higher scheduler.gpu_memory_utilization"
        )
    return int(blocks)


def check_memory(settings: Settings, devices: Sequence[Device]) -> list[str]:
    """Check that weights and KV cache fit.

    Args:
        devices: for each stage, the smallest of those that its ranks have.

    Returns:
        Warnings: what will probably not fit, but is estimated or may be known wrongly.

    Raises:
        ValueError: with the whole sum, and what would fit.
    """
    each = list(zip(needs(settings), devices, strict=True))
    if settings.kind == "cpu":
        return _check_machines(settings, each)
    least = least_blocks(settings)
    stage, device = min(each, key=lambda pair: pair[1].usable(settings) - pair[0].with_cache(least))
    if stage.with_cache(least) > device.usable(settings):
        raise ValueError(_too_large(settings, stage, devices))
    return list(_gpu_warnings(each, blocks_that_fit(settings, devices)))


def this_device(device: torch.device, place: str = "", ranks: int = 1) -> Device:
    """The memory of this rank's device as it is now; on CPUs `ranks` of them share the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Device("cuda", total, total - free, place)
    return Device("cpu", machine_bytes() // ranks, 0, place)


def smallest_of_stages(own: Device, settings: Settings, topology: Topology) -> list[Device]:
    """For each stage the device with least room; every rank of the default process group calls this with its own."""
    everyone = [own] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(everyone, own)
    places = [replace(topology, rank=rank).pp_rank for rank in range(topology.world_size)]
    return [
        min(
            (device for device, place in zip(everyone, places, strict=True) if place == stage),
            key=lambda device: device.usable(settings),
        )
        for stage in range(topology.pp)
    ]


def machine_bytes() -> int:
    """Memory of this machine, or what the container, or the job under SLURM, may take of it."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Bytes that the control groups of this process allow: its own and all above it. Both versions of these."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, file = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                limit = folder / file
                told = limit.read_text().strip() if folder.is_relative_to(root) and limit.is_file() else "max"
                if told.isdigit():
                    yield int(told)


def _too_large(settings: Settings, stage: Needs, devices: Sequence[Device]) -> str:
    s, least, device = settings.scheduler, least_blocks(settings), devices[stage.stage]
    cache = f"the KV cache of one request of {settings.model.max_model_len} tokens"
    if s.num_blocks:
        cache = f"the KV cache of scheduler.num_blocks={least} blocks"
    place = f" ({device.place})" if device.place else ""
    return (
        f"each rank of {stage} needs {readable(stage.with_cache(least))}: weights {readable(stage.weights)}, "
        f"{cache} {readable(least * stage.block)}, beside activations of about {readable(stage.activations)}; "
        f"the smallest GPU{place} has {readable(device.total)}, {readable(device.used)} of it taken, "
        f"and scheduler.gpu_memory_utilization={s.gpu_memory_utilization} leaves "
        f"{readable(max(0, device.usable(settings)))}; "
        f"use {' or '.join(_advice(settings, devices)) or 'more stages and tensor ranks, or larger GPUs'}"
    )


def _advice(settings: Settings, devices: Sequence[Device]) -> Iterator[str]:
    """Single keys with which the configuration would fit."""
    smallest = min(devices, key=lambda device: device.usable(settings))
    for key in ("pp", "tp"):
        counts = (getattr(settings.topology, key) * factor for factor in (2, 4, 8, 16))
        if fitting := next((count for count in counts if _would_fit(settings, key, count, smallest)), None):
            yield f"topology.{key}={fitting}"
    s, least = settings.scheduler, least_blocks(settings)
    each = list(zip(needs(settings), devices, strict=True))
    blocks = min((device.usable(settings) - stage.weights) // stage.block for stage, device in each)
    if blocks > 1:
        yield f"scheduler.num_blocks={blocks}" if s.num_blocks else f"model.max_model_len={(blocks - 1) * s.block_size}"
    taken = max((stage.with_cache(least) + device.used) / device.total for stage, device in each)
    if (share := math.ceil(100 * taken) / 100) <= MOST_UTILIZATION:
        yield f"scheduler.gpu_memory_utilization={share}"


def _would_fit(settings: Settings, key: str, count: int, device: Device) -> bool:
    """Whether all stages would fit such a device with `count` stages (pp) or ranks a stage (tp)."""
    t = settings.topology
    changes: dict[str, Any] = {"pp": count, "layers": None} if key == "pp" else {"tp": count}
    pp, tp = changes.get("pp", t.pp), changes.get("tp", t.tp)
    try:
        check_topology(settings.arch, Topology(t.dp, pp, tp), t.ep)
    except ValueError:
        return False
    if settings.scheduler.max_num_seqs < pp:
        return False
    changed = settings.with_topology(**changes)
    least = least_blocks(changed)
    return all(stage.with_cache(least) <= device.usable(changed) for stage in needs(changed))


def _gpu_warnings(each: list[tuple[Needs, Device]], blocks: int) -> Iterator[str]:
    def rest(pair: tuple[Needs, Device]) -> int:
        stage, device = pair
        return device.total - device.used - stage.with_cache(blocks)

    stage, device = fullest = min(each, key=lambda pair: rest(pair) - pair[0].activations)
    if stage.activations > rest(fullest):
        share = math.floor(100 * (1 - stage.activations / device.total)) / 100
        lower = f"scheduler.gpu_memory_utilization={share} or " if share > 0 else ""
        yield (
            f"activations on {stage} may take {readable(stage.activations)} (an estimate), where weights and KV cache "
            f"leave them {readable(rest(fullest))}; should memory run out, use {lower}"
            f"a smaller scheduler.max_num_batched_tokens"
        )


def _check_machines(settings: Settings, each: list[tuple[Needs, Device]]) -> list[str]:
    """As `check_memory` on CPUs, where ranks of several stages share a machine, so that their mean counts.

    Only what is impossible is refused, for how much of a machine is free, and who else will run on it, nobody knows:
    weights, and a KV cache that was asked for, of more bytes than even the largest share. A cache that wasn't asked for
    is bounded by CPU_CACHE_BYTES, and the kernel finds its pages only as they are written.
    """
    blocks = settings.scheduler.num_blocks or 0
    weights = sum(stage.weights for stage, _ in each) // len(each)
    needed = sum(stage.with_cache(blocks) for stage, _ in each) // len(each)
    cache = f"and the KV cache of scheduler.num_blocks={blocks} blocks {readable(needed - weights)} " * bool(blocks)
    shares = sorted(device.total for _, device in each)
    told = (
        f"the weights of a rank take {readable(weights)} {cache}in the mean, its share of its machine's memory is "
        f"{readable(shares[0])}; use {'fewer blocks, ' * bool(blocks)}more machines, or a smaller model.dtype"
    )
    if needed > shares[-1]:
        raise ValueError(told)
    return [told] if needed > shares[0] else []
