"""What a model costs by its shape alone: parameters read, KV bytes, operations. Of the whole model, before any split
over tensor ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import mean

import torch
from torch import Tensor

from spmd.model.architecture import Architecture, LayerSpec
from spmd.model.decoder import DecoderLayer
from spmd.model.linear import Dense
from spmd.model.moe import Experts
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel

SAMPLING_READS = 8  # reads of the logits that take as long as drawing takes longer than an argmax (one H200: 3 to 14)
CONTEXT = 1024  # tokens a row is taken to have where layers are weighed against the head


def layer_params(arch: Architecture, layer: int, experts: float | None = None) -> float:
    """Parameters of one layer; of a sparse one with `experts` of its experts (None: all)."""
    return _total(replace(arch, weight_format=Dense), layer, experts, Tensor.numel)


def layer_bytes(arch: Architecture, layer: int, experts: float | None = None) -> float:
    """Bytes of the same, in the format of the weights."""
    return _total(arch, layer, experts, lambda parameter: parameter.nbytes)


def _total(arch: Architecture, layer: int, experts: float | None, size: Callable[[Tensor], int]) -> float:
    module = _layer(arch, arch.layers[layer])
    total = sum(map(size, module.parameters()))
    if experts is None or not arch.sparse[layer]:
        return total
    of_experts = sum(size(p) for each in module.modules() if isinstance(each, Experts) for p in each.parameters())
    return total - of_experts + of_experts * experts / arch.num_experts


@cache
def _layer(arch: Architecture, spec: LayerSpec) -> DecoderLayer:
    """A layer of the model without memory for its parameters."""
    with torch.device("meta"):
        return DecoderLayer(arch, spec, TensorParallel(), ExpertParallel())


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


def head_cost(arch: Architecture, rows: int, drawn: bool = False) -> float:
    """What the head costs in a decode tick of `rows` rows, in layers; also their sampling, where tokens are `drawn`.

    A decode tick takes as long as reading its bytes takes: weights, and the KV cache of each row. Its products are too
    small to count, and the head keeps no cache. So what weighs a head against a layer is vocabulary and hidden size
    against the layer's weights (of a sparse one, the experts that so many rows touch) plus CONTEXT tokens a row.
    """
    experts, layers = touched_experts(arch, rows), range(arch.num_layers)
    weights = mean(layer_bytes(arch, layer, experts) for layer in layers)
    reach = [CONTEXT if window is None else min(CONTEXT, window) for window in arch.windows]
    context = mean(reach[layer] * arch.cache_spec(layer).token_bytes for layer in layers)
    logits = rows * arch.vocab_size if drawn else 0
    head = (head_params(arch) + SAMPLING_READS * logits) * arch.dtype.itemsize
    return head / (weights + rows * context)
