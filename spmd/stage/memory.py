"""Whether a configuration fits the memory of its devices: what each stage needs, known before any weight is loaded.

Weights and KV cache are exact, since they are counted in the tensors that would be allocated. On GPUs both must fit the
share that `scheduler.gpu_memory_utilization` allows; activations, which are estimated, come out of the rest.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from spmd.config import Config
from spmd.defaults import block_size
from spmd.integers import ceil_div
from spmd.messages import readable
from spmd.model.architecture import Architecture, check_topology
from spmd.model.cache_spec import block_bytes
from spmd.model.decoder import Decoder
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel
from spmd.stage.activations import activation_bytes
from spmd.stage.build import CPU_CACHE_BYTES, exchanged_bytes, max_model_len, stages
from spmd.topology import Topology

CUDA_BYTES = 2**30  # what CUDA, NCCL and cuBLAS take of a GPU, about, where it can't be measured
MOST_UTILIZATION = 0.95  # that is advised
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Device:
    """The memory that one rank has: a GPU's, or its share of a machine's."""

    kind: str  # cuda or cpu
    total: int  # bytes
    used: int = 0  # of these, by CUDA itself and by others
    place: str = ""  # where it is, for people

    def room(self, config: Config) -> int:
        """Bytes for weights and KV cache."""
        share = config.scheduler.gpu_memory_utilization if self.kind == "cuda" else 1.0
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


def needs(config: Config, arch: Architecture, kind: str) -> list[Needs]:
    """What each stage needs on devices of a kind, cuda or cpu. Nothing is allocated."""
    t, tokens = config.topology, block_size(config, kind)
    ep = ExpertParallel(0, t.dp * t.tp) if t.ep else None
    longest, found = max_model_len(config, arch), []
    for stage, layers in enumerate(stages(config, arch)):
        first, last = stage == 0, stage == t.pp - 1
        decoder = Decoder(arch, layers, first, last, TensorParallel(0, t.tp), ep, "meta")
        weights = sum(parameter.nbytes for parameter in decoder.parameters()) + exchanged_bytes(config, arch, kind)
        block = block_bytes((arch.cache_spec(layer, t.tp) for layer in layers), tokens)
        found.append(Needs(stage, layers, weights, block, activation_bytes(config, arch, kind, longest, last)))
    return found


def least_blocks(config: Config, arch: Architecture, kind: str) -> int:
    """KV blocks without which a run makes no sense: those asked for, else one request of full length."""
    return config.scheduler.num_blocks or 1 + ceil_div(max_model_len(config, arch), block_size(config, kind))


def most_blocks(config: Config, arch: Architecture, kind: str) -> int:
    """KV blocks that all seats can use."""
    least = least_blocks(config, arch, kind)
    return config.scheduler.num_blocks or 1 + config.scheduler.max_num_seqs * (least - 1)


def blocks_that_fit(config: Config, arch: Architecture, devices: Sequence[Device]) -> int:
    """KV blocks that a replica gets: as many as the fullest stage has room for, and no more than all seats use."""
    if config.scheduler.num_blocks:
        return config.scheduler.num_blocks
    kind = devices[0].kind
    usable = most_blocks(config, arch, kind)
    each = zip(needs(config, arch, kind), devices, strict=True)
    if kind == "cpu":
        return min(usable, *(CPU_CACHE_BYTES // stage.block for stage, _ in each))
    return min(usable, *((device.room(config) - stage.weights) // stage.block for stage, device in each))


def check_memory(config: Config, arch: Architecture, devices: Sequence[Device]) -> list[str]:
    """Check that weights and KV cache fit.

    Args:
        devices: for each stage, the smallest of those that its ranks have.

    Returns:
        Warnings: what will probably not fit, but is estimated or may be known wrongly.

    Raises:
        ValueError: with the whole sum, and what would fit.
    """
    each = list(zip(needs(config, arch, devices[0].kind), devices, strict=True))
    if devices[0].kind == "cpu":
        return list(_cpu_warnings(each))
    least = least_blocks(config, arch, "cuda")
    stage, device = min(each, key=lambda pair: pair[1].room(config) - pair[0].with_cache(least))
    if stage.with_cache(least) > device.room(config):
        raise ValueError(_too_large(config, arch, stage, devices))
    return list(_gpu_warnings(each, blocks_that_fit(config, arch, devices)))


def this_device(device: torch.device, place: str = "", ranks: int = 1) -> Device:
    """The memory of this rank's device as it is now; on CPUs `ranks` of them share the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Device("cuda", total, total - free, place)
    return Device("cpu", machine_bytes() // ranks, 0, place)


def smallest_of_stages(own: Device, config: Config, topology: Topology) -> list[Device]:
    """For each stage the device with least room; every rank of the default process group calls this with its own."""
    everyone = [own] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(everyone, own)
    places = [replace(topology, rank=rank).pp_rank for rank in range(topology.world_size)]
    return [
        min(
            (device for device, place in zip(everyone, places, strict=True) if place == stage),
            key=lambda device: device.room(config),
        )
        for stage in range(topology.pp)
    ]


def machine_bytes() -> int:
    """Memory of this machine, or of the container."""
    limits = [Path(file).read_text().strip() for file in CGROUP_LIMITS if Path(file).is_file()]
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *(int(limit) for limit in limits if limit.isdigit())])


def _too_large(config: Config, arch: Architecture, stage: Needs, devices: Sequence[Device]) -> str:
    least, device = least_blocks(config, arch, "cuda"), devices[stage.stage]
    cache = f"the KV cache of one request of {max_model_len(config, arch)} tokens"
    if config.scheduler.num_blocks:
        cache = f"the KV cache of scheduler.num_blocks={least} blocks"
    utilization = config.scheduler.gpu_memory_utilization
    place = f" ({device.place})" if device.place else ""
    return (
        f"each rank of {stage} needs {readable(stage.with_cache(least))}: weights {readable(stage.weights)}, "
        f"{cache} {readable(least * stage.block)}, beside activations of about {readable(stage.activations)}; "
        f"the smallest GPU{place} has {readable(device.total)}, {readable(device.used)} of it taken, "
        f"and scheduler.gpu_memory_utilization={utilization} leaves {readable(max(0, device.room(config)))}; "
        f"use {' or '.join(_advice(config, arch, devices)) or 'more stages and tensor ranks, or larger GPUs'}"
    )


def _advice(config: Config, arch: Architecture, devices: Sequence[Device]) -> Iterator[str]:
    """Single keys with which the configuration would fit."""
    t, least = config.topology, least_blocks(config, arch, "cuda")
    smallest = min(devices, key=lambda device: device.room(config))
    for key in ("pp", "tp"):
        for factor in (2, 4, 8, 16):
            count = getattr(t, key) * factor
            layers = t.layers if key == "tp" else None
            changed = replace(config, topology=replace(t, **{key: count, "layers": layers}))
            if _possible(changed, arch) and _fits(changed, arch, smallest):
                yield f"topology.{key}={count}"
                break
    each = list(zip(needs(config, arch, "cuda"), devices, strict=True))
    blocks = min((device.room(config) - stage.weights) // stage.block for stage, device in each)
    if blocks > 1:
        tokens = (blocks - 1) * block_size(config, "cuda")
        yield f"scheduler.num_blocks={blocks}" if config.scheduler.num_blocks else f"model.max_model_len={tokens}"
    taken = max((stage.with_cache(least) + device.used) / device.total for stage, device in each)
    if (share := math.ceil(100 * taken) / 100) <= MOST_UTILIZATION:
        yield f"scheduler.gpu_memory_utilization={share}"


def _possible(config: Config, arch: Architecture) -> bool:
    t = config.topology
    try:
        check_topology(arch, Topology(t.dp, t.pp, t.tp), t.ep)
    except ValueError:
        return False
    return config.scheduler.max_num_seqs >= t.pp


def _fits(config: Config, arch: Architecture, device: Device) -> bool:
    least = least_blocks(config, arch, "cuda")
    return all(stage.with_cache(least) <= device.room(config) for stage in needs(config, arch, "cuda"))


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


def _cpu_warnings(each: list[tuple[Needs, Device]]) -> Iterator[str]:
    """Only of what is impossible: how much of a machine is free, and who else will run on it, nobody knows."""
    weights = sum(stage.weights for stage, _ in each) // len(each)
    smallest = min(device.total for _, device in each)
    if weights > smallest:
        yield (
            f"the weights of a rank take {readable(weights)} in the mean, its share of its machine's memory is "
            f"{readable(smallest)}; use more machines, or a smaller model.dtype"
        )
