"""What a model costs by its shape alone: parameters read, KV bytes, operations. Of the whole model, before any split
over tensor ranks.
"""

from collections.abc import Iterator
from statistics import mean

from spmd.model.architecture import Architecture

CONTEXT = 1024  # tokens a row is taken to have where layers are weighed against the head


def layer_params(arch: Architecture, layer: int, experts: float | None = None) -> float:
    """Parameters of one layer; of a sparse one with `experts` of its experts (None: all)."""
    return _others(arch, layer) + sum(count * out * size for count, out, size in _linears(arch, layer, experts))


def layer_bytes(arch: Architecture, layer: int, experts: float | None = None) -> float:
    """Bytes of the same; those of linears depend on the weights' format."""
    others, nbytes = _others(arch, layer) * arch.dtype.itemsize, arch.weight_format.nbytes
    return others + sum(count * nbytes(arch.dtype, *shape) for count, *shape in _linears(arch, layer, experts))


def _linears(arch: Architecture, layer: int, experts: float | None) -> Iterator[tuple[float, int, int]]:
    """How many a layer has of each linear, and its outputs and inputs."""
    hidden, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    count: float = 1
    inner = arch.intermediate_size
    if arch.sparse[layer]:
        count, inner = arch.num_experts if experts is None else experts, arch.moe_intermediate_size
    yield from ((1, q + 2 * kv, hidden), (1, hidden, q), (count, 2 * inner, hidden), (count, hidden, inner))


def _others(arch: Architecture, layer: int) -> int:
    """Parameters in no such linear: norms, biases, the router."""
    hidden, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    mlp = hidden * arch.num_experts if arch.sparse[layer] else arch.mlp_bias * (2 * arch.intermediate_size + hidden)
    return 2 * hidden + arch.qkv_bias * (q + 2 * kv) + arch.o_bias * hidden + arch.qk_norm * 2 * arch.head_dim + mlp


def head_params(arch: Architecture) -> int:
    """Parameters of the head and the norm before it; those of a tied embedding are read here too."""
    return (arch.vocab_size + 1) * arch.hidden_size


def touched_experts(arch: Architecture, rows: float) -> float:
    """Experts of a layer that `rows` tokens read, in the mean, if every expert is chosen as often as the others."""
    if not arch.num_experts:
        return 0.0
    return arch.num_experts * float(1 - (1 - arch.experts_per_token / arch.num_experts) ** rows)


def seen(window: int | None, tokens: int) -> int:
    """Tokens that the queries at the first `tokens` positions see in all, each itself included."""
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def head_cost(arch: Architecture, rows: int) -> float:
    """What the head costs in a decode tick of `rows` rows, in layers.

    A decode tick takes as long as reading its bytes takes: weights, and the KV cache of each row. Its products are too
    small to count, and the head keeps no cache. So what weighs a head against a layer is vocabulary and hidden size
    against the layer's weights (of a sparse one, the experts that so many rows touch) plus CONTEXT tokens a row.
    """
    experts, layers = touched_experts(arch, rows), range(arch.num_layers)
    weights = mean(layer_bytes(arch, layer, experts) for layer in layers)
    reach = [CONTEXT if window is None else min(CONTEXT, window) for window in arch.windows]
    context = mean(reach[layer] * arch.cache_spec(layer).token_bytes for layer in layers)
    return head_params(arch) * arch.dtype.itemsize / (weights + rows * context)
