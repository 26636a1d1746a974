"""From the settings to one rank's stage: weights loaded, kernels compiled, graphs captured."""

import torch

from spmd.backend.cuda.decode_gemm import Products, supported
from spmd.backend.cuda.flashinfer import FlashInferBackend
from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.backend import TorchBackend
from spmd.integers import ceil_div
from spmd.model.architecture import Architecture
from spmd.model.backend import Backend
from spmd.model.checkpoint import load
from spmd.model.decoder import Decoder
from spmd.model.layers import ColumnLinear, RowLinear
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.groups import Groups
from spmd.parallel.hidden import HiddenChannel
from spmd.parallel.peer_memory import SymmetricBuffer, share, size_of, within_reach
from spmd.parallel.tensor import TensorParallel
from spmd.sampling.sampler import Sampler
from spmd.settings import Settings
from spmd.stage.cuda_graphs import Forward
from spmd.stage.inputs import InputBuilder
from spmd.stage.stage import Stage
from spmd.topology import Topology

WIDEST_GRAPH = 2048  # tokens of a request; plain PyTorch's graphs read as many for each row, however short it is


def load_decoder(settings: Settings, topology: Topology, groups: Groups, device: torch.device) -> Decoder:
    """This rank's layers with their weights.

    Raises:
        ValueError: the checkpoint lacks tensors or holds others.
    """
    m, arch, layers = settings.model, settings.arch, settings.stages[topology.pp_rank]
    tp = TensorParallel(topology.tp_rank, topology.tp, groups.tensor, _symmetric(arch, groups, device))
    ep = _expert_parallel(settings, topology, groups, device) if settings.topology.ep else None
    decoder = Decoder(arch, layers, topology.is_first_stage, topology.is_last_stage, tp, ep, device)
    load(decoder, m.path, m.load_format, m.revision)
    decoder.pack(settings.decode_rows)
    return decoder


def _expert_parallel(settings: Settings, topology: Topology, groups: Groups, device: torch.device) -> ExpertParallel:
    place, group, peers = topology.dp_rank * topology.tp + topology.tp_rank, groups.experts, None
    if group and exchanged_bytes(settings) and within_reach(group, device):
        peers = share(group, *_exchanged(settings), device)
    return ExpertParallel(place, topology.dp * topology.tp, group, peers)


def exchanged_bytes(settings: Settings) -> int:
    """Of a rank's memory for other replicas' rows, which kernels use on GPUs."""
    t = settings.topology
    by_kernels = settings.kind == "cuda" and settings.arch.dtype == torch.bfloat16
    return size_of(t.dp, *_exchanged(settings)) if t.ep and t.dp > 1 and by_kernels else 0


def _exchanged(settings: Settings) -> tuple[int, int, int]:
    """Rows of all replicas in the largest exchange, columns of a row, of a sum."""
    arch, rows = settings.arch, settings.topology.dp * settings.scheduler.max_num_batched_tokens
    return rows, arch.hidden_size + 2 * arch.experts_per_token, arch.hidden_size


def _symmetric(arch: Architecture, groups: Groups, device: torch.device) -> SymmetricBuffer | None:
    """Memory in which the GPUs of a tensor group sum, if there is one and they see each other's."""
    if groups.tensor is None or device.type != "cuda" or not within_reach(groups.tensor, device):
        return None
    return SymmetricBuffer(groups.tensor, arch.dtype, device)


def build_stage(
    settings: Settings, decoder: Decoder, topology: Topology, groups: Groups, device: torch.device
) -> Stage:
    """This rank's share of every tick, with a KV cache of the size that `settings` were given."""
    s, arch, longest, slots = settings.scheduler, decoder.arch, settings.longest, settings.slots
    assert s.num_blocks is not None
    cache = KVCache(arch, len(decoder.range), s.num_blocks, s.block_size, topology.tp, device)
    rows = s.max_num_batched_tokens
    inputs = InputBuilder(s.max_num_seqs, ceil_div(longest, s.block_size), rows, s.block_size, device)
    channel = feedback = None
    if topology.pp > 1:
        channel = HiddenChannel(topology, groups.hidden, arch.hidden_size, arch.dtype, device, slots)
    if s.lookahead:
        feedback = TokenFeedback(topology, groups.tokens, s.max_num_seqs, slots, device)
    sampler = Sampler(arch.vocab_size, device) if topology.is_leader else None
    flashinfer = settings.model.attention_backend == "flashinfer"
    by_turns = arch.num_experts and arch.dtype != torch.bfloat16  # the host must know how many tokens each gets
    by_graph = device.type == "cuda" and not settings.model.enforce_eager and not by_turns
    by_graph = by_graph and (flashinfer or longest <= WIDEST_GRAPH)
    backend: Backend
    if flashinfer:
        products = _decode_products(settings, decoder, device) if by_graph else None
        buckets = s.decode_buckets if by_graph else []
        backend = FlashInferBackend(arch, decoder.range, cache, topology.tp, products, buckets, inputs.tables.shape[1])
    else:
        backend = TorchBackend(arch, decoder.range, cache, topology.tp)
    stage = Stage(Forward(decoder, backend), inputs, channel, feedback, sampler)
    if device.type == "cuda":
        stage.warm_up(min(rows, longest))
    if by_graph:
        for decodes in s.decode_buckets:
            stage.forward.capture(decodes, inputs)
    return stage


def _decode_products(settings: Settings, decoder: Decoder, device: torch.device) -> Products | None:
    """Kernels for the products of decode batches, None where cuBLAS does all of them."""
    if settings.model.decode_products == "torch" or decoder.arch.dtype != torch.bfloat16 or not supported(device):
        return None
    kinds = (ColumnLinear,) if decoder.tp.size > 1 else (ColumnLinear, RowLinear)  # partial sums go where others read
    shapes = [(*m.weight.shape, m.halves) for m in decoder.modules() if isinstance(m, kinds)]
    return Products(shapes, settings.scheduler.decode_buckets, device)
