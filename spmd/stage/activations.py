"""What a forward takes besides weights and KV cache: an estimate, from shapes.

It adds up the tensors that are alive at the widest point of a layer, at the largest plan, and takes a margin for what
an allocator loses. On CPUs the peak of real forwards lies within it and above half of it, which a test asserts; on GPUs
it is the same sum for the kernels used there.
"""

from spmd.backend.cuda.limits import WORKSPACE_BYTES
from spmd.backend.plain.attention import QUERY_TILE
from spmd.backend.plain.gather import buffer_blocks
from spmd.settings import Settings

MARGIN = 1.2
SAMPLING_BYTES = 46  # of each logit, with penalties and top_p, the most there is (counted in `Sampler.sample`)
KERNEL_SAMPLING_BYTES = 16  # likewise by the kernel: token counts as their table grows, and logits that topk takes


def activation_bytes(settings: Settings, last: bool) -> int:
    """Bytes of the largest forward on one rank, of the last stage or of another."""
    t, s, arch = settings.topology, settings.scheduler, settings.arch
    rows, size, on_gpu = s.max_num_batched_tokens, arch.dtype.itemsize, settings.kind == "cuda"
    fused = settings.model.attention_backend == "flashinfer"
    peak = rows * _row_elements(settings, fused) * size
    if not fused:
        peak += _score_elements(settings) * size
    if last:
        peak = max(peak, 2 * rows * arch.hidden_size * size + _head_bytes(settings, rows, fused))
    kept = 2 * WORKSPACE_BYTES if fused else _buffer_tokens(settings) * arch.cache_spec(0, t.tp).token_bytes
    if t.pp > 1:  # hidden states on their way to the next stage
        kept += settings.slots * rows * arch.hidden_size * size
    if on_gpu and not settings.model.enforce_eager:
        kept += _graph_elements(settings, fused, last) * size
    return int(MARGIN * peak) + kept


def _row_elements(settings: Settings, fused: bool) -> int:
    """Numbers that one row of a batch keeps alive in a layer: residual, input, output, and the widest part's own."""
    arch, tp, hidden = settings.arch, settings.topology.tp, settings.arch.hidden_size
    q, kv = arch.num_heads * arch.head_dim // tp, arch.num_kv_heads * arch.head_dim // tp
    # Plain PyTorch keeps them as projected, normed and rotated, keys and values copied, and the outputs once more.
    widest = 3 * q + 2 * kv if fused else 5 * q + 6 * kv
    if not all(arch.sparse):
        widest = max(widest, 4 * arch.intermediate_size // tp)
    if any(arch.sparse):
        widest = max(widest, _expert_elements(settings))
    return 3 * hidden + widest


def _expert_elements(settings: Settings) -> int:
    """The same of a sparse layer: each row stands in it once for each of its experts, with `ep` every replica's row."""
    t, arch, hidden = settings.topology, settings.arch, settings.arch.hidden_size
    inner = arch.moe_intermediate_size // (1 if t.ep else t.tp)
    return (
        arch.experts_per_token
        * (t.dp if t.ep else 1)
        * max(3 * inner, hidden + 2 * inner, inner + 2 * hidden, 3 * hidden)
    )


def _buffer_tokens(settings: Settings) -> int:
    """Tokens of one layer that plain PyTorch's buffers hold side by side."""
    size, spec = settings.scheduler.block_size, settings.arch.cache_spec(0, settings.topology.tp)
    return size * buffer_blocks(spec, size, settings.kind, settings.model.max_model_len)


def _score_elements(settings: Settings) -> int:
    """Scores of one tile of a prompt, or of decodes read at once, and their softmax; masks of all of both."""
    arch, tp, longest = settings.arch, settings.topology.tp, settings.model.max_model_len
    rows, decodes = settings.scheduler.max_num_batched_tokens, settings.decode_rows
    heads, group = arch.num_heads // tp, arch.num_heads // arch.num_kv_heads
    scored = max(longest * min(QUERY_TILE, rows), min(_buffer_tokens(settings), longest * decodes))
    masked = longest * (group * rows + arch.cache_spec(0, tp).kv_heads * decodes)
    return 2 * heads * scored + len(set(arch.windows)) * masked


def _head_bytes(settings: Settings, rows: int, fused: bool) -> int:
    """Logits of this rank's slice of the vocabulary, and on the leader of all of it, with what the sampler makes."""
    arch, tp = settings.arch, settings.topology.tp
    samples, local = min(settings.scheduler.max_num_seqs, rows), arch.padded_vocab_size(tp) // tp
    sampling = KERNEL_SAMPLING_BYTES if fused else SAMPLING_BYTES
    return samples * (local * arch.dtype.itemsize + arch.vocab_size * sampling)


def _graph_elements(settings: Settings, fused: bool, last: bool) -> int:
    """What CUDA graphs keep: the widest point of the largest, and the logits of each."""
    buckets, tp = settings.scheduler.decode_buckets, settings.topology.tp
    local = settings.arch.padded_vocab_size(tp) // tp
    kept = buckets[0] * _row_elements(settings, fused) + (sum(buckets) * local if last else 0)
    if mixed := settings.scheduler.mixed_buckets:  # one pool, queries and what attention gives, and an output for all
        arch, samples = settings.arch, settings.scheduler.max_num_seqs
        kept += mixed[0] * (_row_elements(settings, fused) + 2 * arch.num_heads * arch.head_dim + 2 * arch.hidden_size)
        kept += 2 * samples * local if last else 0
    return kept
