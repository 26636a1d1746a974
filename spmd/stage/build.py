"""From the settings to one rank's stage: weights loaded, kernels compiled, graphs captured."""

import torch

from spmd.backend.choose import make_backend, make_sampler, share_exchange_memory
from spmd.backend.kv_cache import KVCache
from spmd.integers import ceil_div
from spmd.model.checkpoint import load
from spmd.model.decoder import Decoder
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.groups import Groups
from spmd.parallel.hidden import HiddenChannel
from spmd.parallel.peer_memory import symmetric_buffer
from spmd.parallel.tensor import TensorParallel
from spmd.settings import Settings, runs_mixed_graphs
from spmd.stage.cuda_graphs import Forward
from spmd.stage.inputs import InputBuilder
from spmd.stage.stage import Stage
from spmd.topology import Topology
from spmd.trace.device_clock import DeviceClock
from spmd.trace.host_clock import HostClock


def load_decoder(settings: Settings, topology: Topology, groups: Groups, device: torch.device) -> Decoder:
    """This rank's layers with their weights.

    Raises:
        ValueError: the checkpoint lacks tensors or holds others.
    """
    m, arch, layers = settings.model, settings.arch, settings.stages[topology.pp_rank]
    buffer = symmetric_buffer(groups.tensor, arch.dtype, device)
    tp = TensorParallel(topology.tp_rank, topology.tp, groups.tensor, buffer)
    ep = _expert_parallel(settings, topology, groups, device) if settings.topology.ep else None
    decoder = Decoder(arch, layers, topology.is_first_stage, topology.is_last_stage, tp, ep, device)
    load(decoder, m.path, m.load_format, m.revision)
    decoder.pack(settings.decode_rows)
    return decoder


def _expert_parallel(settings: Settings, topology: Topology, groups: Groups, device: torch.device) -> ExpertParallel:
    backend, rows = settings.model.attention_backend, settings.scheduler.max_num_batched_tokens
    peers = share_exchange_memory(backend, settings.arch, groups.experts, rows, device)
    place = topology.dp_rank * topology.tp + topology.tp_rank
    return ExpertParallel(place, topology.dp * topology.tp, groups.experts, peers)


def build_stage(
    settings: Settings, decoder: Decoder, topology: Topology, groups: Groups, device: torch.device
) -> Stage:
    """This rank's share of every tick, with a KV cache of the size that `settings` were given."""
    m, s, arch, longest = settings.model, settings.scheduler, decoder.arch, settings.longest
    assert s.num_blocks is not None
    specs = [arch.cache_spec(layer, topology.tp) for layer in decoder.range]
    cache = KVCache(specs, s.num_blocks, s.block_size, device)
    rows, slots = s.max_num_batched_tokens, settings.slots
    inputs = InputBuilder(s.max_num_seqs, ceil_div(longest, s.block_size), rows, s.block_size, device)
    channel = feedback = None
    if topology.pp > 1:
        channel = HiddenChannel(topology, groups.hidden, arch.hidden_size, arch.dtype, device, slots)
    if s.lookahead:
        feedback = TokenFeedback(topology, groups.tokens, s.max_num_seqs, slots, device)
    sampler = make_sampler(arch, device) if topology.is_leader else None
    buckets = s.decode_buckets if device.type == "cuda" and not m.enforce_eager else []
    backend = make_backend(m.attention_backend, decoder, cache, longest, buckets, m.decode_products != "torch")
    clock = DeviceClock() if device.type == "cuda" else HostClock()
    stage = Stage(Forward(decoder, backend), cache, inputs, channel, feedback, sampler, clock)
    if device.type == "cuda":
        stage.warm_up(min(rows, longest))
    for decodes in buckets if backend.capturable else ():
        stage.forward.capture(decodes, inputs)
    if s.mixed_buckets and runs_mixed_graphs(settings, arch, m.attention_backend):
        stage.forward.capture_mixed(s.mixed_buckets, s.max_num_seqs, inputs)
    return stage
