"""From a configuration to one rank's stage: weights loaded, KV cache sized, kernels compiled, graphs captured."""

from dataclasses import replace

import torch
import torch.distributed as dist

from spmd.backend.choose import Name, choose_backend, exchange_bytes, make_backend, share_exchange_memory
from spmd.backend.kv_cache import KVCache
from spmd.config import Config, decode_rows
from spmd.defaults import block_size, decode_buckets, lookahead, max_num_batched_tokens
from spmd.integers import ceil_div
from spmd.model.architecture import Architecture
from spmd.model.cache_spec import block_bytes
from spmd.model.checkpoint import load
from spmd.model.cost import head_cost
from spmd.model.decoder import Decoder
from spmd.model.linear import computed_in
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.groups import Groups
from spmd.parallel.hidden import HiddenChannel
from spmd.parallel.peer_memory import symmetric_buffer
from spmd.parallel.tensor import TensorParallel
from spmd.sampling.sampler import Sampler
from spmd.stage.cuda_graphs import Forward
from spmd.stage.inputs import InputBuilder
from spmd.stage.stage import Stage
from spmd.topology import Topology, split_layers

CPU_CACHE_BYTES = 4 * 2**30  # KV cache of a rank without a GPU, as vLLM's CPU default


def stages(config: Config, arch: Architecture) -> list[range]:
    """Layers of each stage: as `topology.layers` says, or by cost."""
    t = config.topology
    return split_layers(arch.num_layers, t.pp, t.layers, head_cost(arch, decode_rows(config)))


def max_model_len(config: Config, arch: Architecture) -> int:
    return config.model.max_model_len or arch.max_position_embeddings


def on_device(config: Config, arch: Architecture, device: str) -> Architecture:
    """The model as a kind of device computes it, which with `model.dtype=auto` may be in another dtype."""
    return arch if config.model.dtype != "auto" else replace(arch, dtype=computed_in(arch.dtype, device))


def load_decoder(
    config: Config, arch: Architecture, topology: Topology, groups: Groups, device: torch.device
) -> Decoder:
    """This rank's layers with their weights.

    Raises:
        ValueError: the checkpoint lacks tensors or holds others.
    """
    layers = stages(config, arch)[topology.pp_rank]
    tp = TensorParallel(
        topology.tp_rank, topology.tp, groups.tensor, symmetric_buffer(groups.tensor, arch.dtype, device)
    )
    ep = _expert_parallel(config, arch, topology, groups, device) if config.topology.ep else None
    decoder = Decoder(arch, layers, topology.is_first_stage, topology.is_last_stage, tp, ep, device)
    assert config.model.path is not None
    load(decoder, config.model.path, config.model.load_format, config.model.revision)
    decoder.pack(decode_rows(config))
    return decoder


def _expert_parallel(
    config: Config, arch: Architecture, topology: Topology, groups: Groups, device: torch.device
) -> ExpertParallel:
    name, rows = _backend_name(config, arch, device), max_num_batched_tokens(config, device.type)
    peers = share_exchange_memory(name, arch, groups.experts, rows, device)
    place = topology.dp_rank * topology.tp + topology.tp_rank
    return ExpertParallel(place, topology.dp * topology.tp, groups.experts, peers)


def exchanged_bytes(config: Config, arch: Architecture, kind: str) -> int:
    """Of a rank's memory for other replicas' rows, which kernels use on GPUs."""
    t, rows = config.topology, max_num_batched_tokens(config, kind)
    return exchange_bytes(_backend_name(config, arch, torch.device(kind)), arch, t.dp if t.ep else 1, rows)


def count_blocks(config: Config, arch: Architecture, topology: Topology, device: torch.device) -> int:
    """KV blocks of a replica: what the poorest rank has room for, and no more than all seats can fill.

    Raises:
        ValueError: not even one block fits.
    """
    s, tokens = config.scheduler, block_size(config, device.type)
    if s.num_blocks is not None:
        return s.num_blocks
    layers = stages(config, arch)[topology.pp_rank]
    size = block_bytes((arch.cache_spec(layer, topology.tp) for layer in layers), tokens)
    room = _cache_bytes(config, device)
    usable = 1 + s.max_num_seqs * ceil_div(max_model_len(config, arch), tokens)
    blocks = torch.tensor(min(room // size, usable))
    if topology.world_size > 1:
        dist.all_reduce(blocks, dist.ReduceOp.MIN)
    if blocks < 2:
        raise ValueError(
            f"no room for a KV cache: {room / 2**30:.2f} GiB are left, a block of {tokens} tokens takes "
            f"{size / 2**20:.2f} MiB; use more stages or tensor ranks, or a higher scheduler.gpu_memory_utilization"
        )
    return int(blocks)


def _cache_bytes(config: Config, device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total * config.scheduler.gpu_memory_utilization) - (total - free))


def use_flashinfer(config: Config, arch: Architecture, device: torch.device) -> bool:
    """Whether FlashInfer computes attention, and kernels of ours what stands around it.

    Raises:
        ValueError: model.attention_backend=flashinfer asks for what can't be.
    """
    return _backend_name(config, arch, device) == "flashinfer"


def _backend_name(config: Config, arch: Architecture, device: torch.device) -> Name:
    return choose_backend(config.model.attention_backend, arch, block_size(config, device.type), device)


def build_stage(
    config: Config, decoder: Decoder, num_blocks: int, topology: Topology, groups: Groups, device: torch.device
) -> Stage:
    """This rank's share of every tick."""
    s, arch, tokens = config.scheduler, decoder.arch, block_size(config, device.type)
    longest = min(max_model_len(config, arch), (num_blocks - 1) * tokens)
    cache = KVCache([arch.cache_spec(layer, topology.tp) for layer in decoder.range], num_blocks, tokens, device)
    rows = max_num_batched_tokens(config, device.type)
    inputs = InputBuilder(s.max_num_seqs, ceil_div(longest, tokens), rows, tokens, device)
    slots = topology.pp + s.async_depth
    channel = feedback = None
    if topology.pp > 1:
        channel = HiddenChannel(topology, groups.hidden, arch.hidden_size, arch.dtype, device, slots)
    if lookahead(config, device.type):
        feedback = TokenFeedback(topology, groups.tokens, s.max_num_seqs, slots, device)
    sampler = Sampler(arch.vocab_size, device) if topology.is_leader else None
    by_graph = device.type == "cuda" and not config.model.enforce_eager
    buckets = decode_buckets(config, device.type) if by_graph else []
    name = _backend_name(config, arch, device)
    backend = make_backend(name, decoder, cache, longest, buckets, config.model.decode_products != "torch")
    stage = Stage(Forward(decoder, backend), inputs, channel, feedback, sampler)
    if device.type == "cuda":
        stage.warm_up(min(rows, longest))
    for decodes in buckets if backend.capturable else ():
        stage.forward.capture(decodes, inputs)
    return stage
