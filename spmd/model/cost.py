"""What a model costs by its shape alone: parameters read, KV bytes, operations. Of the whole model, before any split
over tensor ranks.
"""

from statistics import mean

from spmd.model.architecture import Architecture

CONTEXT = 1024  # tokens a row is taken to have where layers are weighed against the head


def layer_params(arch: Architecture, layer: int, experts: float | None = None) -> float:
    """Parameters of one layer; of a sparse one with `experts` of its experts (None: all)."""
    hidden, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    count = 2 * hidden * (q + kv) + 2 * hidden  # q, k, v, o; the norms before attention and MLP
    count += arch.qkv_bias * (q + 2 * kv) + arch.o_bias * hidden + arch.qk_norm * 2 * arch.head_dim
    if not arch.sparse[layer]:
        return count + 3 * hidden * arch.intermediate_size + arch.mlp_bias * (2 * arch.intermediate_size + hidden)
    experts = arch.num_experts if experts is None else experts
    return count + hidden * arch.num_experts + experts * 3 * hidden * arch.moe_intermediate_size


def head_params(arch: Architecture) -> int:
    """Parameters of the head and the norm before it; those of a tied embedding are read here too."""
    return (arch.vocab_size + 1) * arch.hidden_size


def touched_experts(arch: Architecture, rows: float) -> float:
    """Experts of a layer that `rows` tokens read, in the mean, if every expert is chosen as often as the others."""
    if not arch.num_experts:
        return 0.0
    return arch.num_experts * (1 - (1 - arch.experts_per_token / arch.num_experts) ** rows)


def kv_bytes(arch: Architecture) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * arch.num_kv_heads * arch.head_dim * arch.dtype.itemsize


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
    experts = touched_experts(arch, rows)
    params = mean(layer_params(arch, layer, experts) for layer in range(arch.num_layers))
    context = mean(CONTEXT if window is None else min(CONTEXT, window) for window in arch.windows)
    return head_params(arch) * arch.dtype.itemsize / (params * arch.dtype.itemsize + rows * context * kv_bytes(arch))
