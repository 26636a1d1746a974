"""What a forward takes besides weights and KV cache: an estimate, from shapes.

It adds up the tensors that are alive at the widest point of a layer, at the largest plan, and takes a margin for what
an allocator loses. On CPUs the peak of real forwards lies within it and above half of it, which a test asserts; on GPUs
it is the same sum for the kernels used there.
"""

from spmd.backend.cuda.limits import WORKSPACE_BYTES
from spmd.backend.plain.attention import QUERY_TILE
from spmd.config import Config
from spmd.defaults import decode_buckets, max_num_batched_tokens
from spmd.model.architecture import Architecture

MARGIN = 1.2
SAMPLING_BYTES = 46  # of each logit, with penalties and top_p, the most there is (counted in `Sampler.sample`)


def activation_bytes(config: Config, arch: Architecture, device: str, longest: int, last: bool) -> int:
    """Bytes of the largest forward on one rank, of the last stage or of another.

    Args:
        device: cuda or cpu.
        longest: tokens of the longest request.
    """
    t, size = config.topology, arch.dtype.itemsize
    rows = max_num_batched_tokens(config, device)
    fused = device == "cuda" and config.model.attention_backend != "torch"
    peak = rows * _row_elements(arch, config, fused) * size
    if not fused:
        peak += _score_elements(arch, t.tp, rows, longest) * size
    if last:
        peak = max(peak, 2 * rows * arch.hidden_size * size + _head_bytes(config, arch, rows))
    kept = 2 * WORKSPACE_BYTES if fused else 0
    if t.pp > 1:  # hidden states on their way to the next stage
        kept += (t.pp + config.scheduler.async_depth) * rows * arch.hidden_size * size
    if device == "cuda" and not config.model.enforce_eager:
        kept += _graph_elements(config, arch, fused, last) * size
    return int(MARGIN * peak) + kept


def _row_elements(arch: Architecture, config: Config, fused: bool) -> int:
    """Numbers that one row of a batch keeps alive in a layer: residual, input, output, and the widest part's own."""
    tp, hidden = config.topology.tp, arch.hidden_size
    q, kv = arch.num_heads * arch.head_dim // tp, arch.num_kv_heads * arch.head_dim // tp
    # Plain PyTorch keeps them as projected, normed and rotated, keys and values copied, and the outputs once more.
    widest = 3 * q + 2 * kv if fused else 5 * q + 6 * kv
    if not all(arch.sparse):
        widest = max(widest, 4 * arch.intermediate_size // tp)
    if any(arch.sparse):
        widest = max(widest, _expert_elements(arch, config))
    return 3 * hidden + widest


def _expert_elements(arch: Architecture, config: Config) -> int:
    """The same of a sparse layer: each row stands in it once for each of its experts, with `ep` every replica's row."""
    t, hidden = config.topology, arch.hidden_size
    inner = arch.moe_intermediate_size // (1 if t.ep else t.tp)
    return (
        arch.experts_per_token
        * (t.dp if t.ep else 1)
        * max(3 * inner, hidden + 2 * inner, inner + 2 * hidden, 3 * hidden)
    )


def _score_elements(arch: Architecture, tp: int, rows: int, longest: int) -> int:
    """Attention scores of one tile and their softmax; masks of all tiles."""
    heads, group = arch.num_heads // tp, arch.num_heads // arch.num_kv_heads
    return longest * (2 * heads * min(QUERY_TILE, rows) + len(set(arch.windows)) * group * rows)


def _head_bytes(config: Config, arch: Architecture, rows: int) -> int:
    """Logits of this rank's slice of the vocabulary, and on the leader of all of it, with what the sampler makes."""
    samples = min(config.scheduler.max_num_seqs, rows)
    local = arch.padded_vocab_size(config.topology.tp) // config.topology.tp
    return samples * (local * arch.dtype.itemsize + arch.vocab_size * SAMPLING_BYTES)


def _graph_elements(config: Config, arch: Architecture, fused: bool, last: bool) -> int:
    """What CUDA graphs keep: the widest point of the largest, and the logits of each."""
    buckets = decode_buckets(config, "cuda")
    local = arch.padded_vocab_size(config.topology.tp) // config.topology.tp
    return buckets[0] * _row_elements(arch, config, fused) + (sum(buckets) * local if last else 0)
