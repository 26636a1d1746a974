"""From a configuration to one rank's stage: weights loaded, KV cache sized, kernels compiled, graphs captured."""

from dataclasses import replace

import torch
import torch.distributed as dist

from spmd.backend.cuda.decode_gemm import Products, supported
from spmd.backend.cuda.flashinfer import FlashInferBackend, why_not
from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.backend import TorchBackend
from spmd.config import Config, decode_rows
from spmd.defaults import block_size, decode_buckets, lookahead, max_num_batched_tokens
from spmd.integers import ceil_div
from spmd.model.architecture import Architecture
from spmd.model.backend import Backend
from spmd.model.checkpoint import load
from spmd.model.cost import head_cost
from spmd.model.decoder import Decoder
from spmd.model.layers import ColumnLinear, RowLinear
from spmd.model.weights import computed_in
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.groups import Groups
from spmd.parallel.hidden import HiddenChannel
from spmd.parallel.peer_memory import SymmetricBuffer, share, size_of, within_reach
from spmd.parallel.tensor import TensorParallel
from spmd.sampling.sampler import Sampler
from spmd.stage.cuda_graphs import Forward
from spmd.stage.inputs import InputBuilder
from spmd.stage.stage import Stage
from spmd.topology import Topology, split_layers

CPU_CACHE_BYTES = 4 * 2**30  # KV cache of a rank without a GPU, as vLLM's CPU default
WIDEST_GRAPH = 2048  # tokens of a request; plain PyTorch's graphs read as many for each row, however short it is


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
    tp = TensorParallel(topology.tp_rank, topology.tp, groups.tensor, _symmetric(arch, groups, device))
    ep = _expert_parallel(config, arch, topology, groups, device) if config.topology.ep else None
    decoder = Decoder(arch, layers, topology.is_first_stage, topology.is_last_stage, tp, ep, device)
    assert config.model.path is not None
    load(decoder, config.model.path, config.model.load_format, config.model.revision)
    decoder.pack(decode_rows(config))
    return decoder


def _expert_parallel(
    config: Config, arch: Architecture, topology: Topology, groups: Groups, device: torch.device
) -> ExpertParallel:
    place, group, peers = topology.dp_rank * topology.tp + topology.tp_rank, groups.experts, None
    if group and exchanged_bytes(config, arch, device.type) and within_reach(group, device):
        peers = share(group, *_exchanged(config, arch), device)
    return ExpertParallel(place, topology.dp * topology.tp, group, peers)


def exchanged_bytes(config: Config, arch: Architecture, kind: str) -> int:
    """Of a rank's memory for other replicas' rows, which kernels use on GPUs."""
    t = config.topology
    by_kernels = t.ep and t.dp > 1 and kind == "cuda" and arch.dtype == torch.bfloat16
    return size_of(t.dp, *_exchanged(config, arch)) if by_kernels else 0


def _exchanged(config: Config, arch: Architecture) -> tuple[int, int, int]:
    """Rows of all replicas in the largest exchange, columns of a row, of a sum."""
    rows = config.topology.dp * max_num_batched_tokens(config, "cuda")
    return rows, arch.hidden_size + 2 * arch.experts_per_token, arch.hidden_size


def _symmetric(arch: Architecture, groups: Groups, device: torch.device) -> SymmetricBuffer | None:
    """Memory in which the GPUs of a tensor group sum, if there is one and they see each other's."""
    if groups.tensor is None or device.type != "cuda" or not within_reach(groups.tensor, device):
        return None
    return SymmetricBuffer(groups.tensor, arch.dtype, device)


def count_blocks(config: Config, arch: Architecture, topology: Topology, device: torch.device) -> int:
    """KV blocks of a replica: what the poorest rank has room for, and no more than all seats can fill.

    Raises:
        ValueError: not even one block fits.
    """
    s, tokens = config.scheduler, block_size(config, device.type)
    if s.num_blocks is not None:
        return s.num_blocks
    size = KVCache.bytes_per_block(arch, len(stages(config, arch)[topology.pp_rank]), topology.tp, tokens)
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
    """Whether FlashInfer computes what is no matrix product.

    Raises:
        ValueError: model.attention_backend=flashinfer asks for what can't be.
    """
    chosen, reason = config.model.attention_backend, why_not(arch, block_size(config, device.type), device)
    if chosen == "flashinfer" and reason:
        raise ValueError(f"model.attention_backend=flashinfer: {reason}; use model.attention_backend=auto")
    return chosen != "torch" and reason is None


def build_stage(
    config: Config, decoder: Decoder, num_blocks: int, topology: Topology, groups: Groups, device: torch.device
) -> Stage:
    """This rank's share of every tick."""
    s, arch, tokens = config.scheduler, decoder.arch, block_size(config, device.type)
    longest = min(max_model_len(config, arch), (num_blocks - 1) * tokens)
    cache = KVCache(arch, len(decoder.range), num_blocks, tokens, topology.tp, device)
    rows = max_num_batched_tokens(config, device.type)
    inputs = InputBuilder(s.max_num_seqs, ceil_div(longest, tokens), rows, tokens, device)
    slots = topology.pp + s.async_depth
    channel = feedback = None
    if topology.pp > 1:
        channel = HiddenChannel(topology, groups.hidden, arch.hidden_size, arch.dtype, device, slots)
    if lookahead(config, device.type):
        feedback = TokenFeedback(topology, groups.tokens, s.max_num_seqs, slots, device)
    sampler = Sampler(arch.vocab_size, device) if topology.is_leader else None
    flashinfer = use_flashinfer(config, arch, device)
    by_turns = arch.num_experts and arch.dtype != torch.bfloat16  # the host must know how many tokens each gets
    by_graph = device.type == "cuda" and not config.model.enforce_eager and not by_turns
    by_graph = by_graph and (flashinfer or longest <= WIDEST_GRAPH)
    backend: Backend
    if flashinfer:
        products = _decode_products(config, decoder, device) if by_graph else None
        buckets = decode_buckets(config, device.type) if by_graph else []
        backend = FlashInferBackend(arch, decoder.range, cache, topology.tp, products, buckets, inputs.tables.shape[1])
    else:
        backend = TorchBackend(arch, decoder.range, cache, topology.tp)
    stage = Stage(Forward(decoder, backend), inputs, channel, feedback, sampler)
    if device.type == "cuda":
        stage.warm_up(min(rows, longest))
    if by_graph:
        for decodes in decode_buckets(config, device.type):
            stage.forward.capture(decodes, inputs)
    return stage


def _decode_products(config: Config, decoder: Decoder, device: torch.device) -> Products | None:
    """Kernels for the products of decode batches, None where cuBLAS does all of them."""
    if config.model.decode_products == "torch" or decoder.arch.dtype != torch.bfloat16 or not supported(device):
        return None
    kinds = (ColumnLinear,) if decoder.tp.size > 1 else (ColumnLinear, RowLinear)  # partial sums go where others read
    shapes = [(*m.weight.shape, m.halves) for m in decoder.modules() if isinstance(m, kinds)]
    return Products(shapes, decode_buckets(config, device.type), device)
