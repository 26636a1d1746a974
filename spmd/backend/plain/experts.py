"""A layer's experts in plain PyTorch, one after the other: the host must know how many tokens each one gets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spmd.model.backend import ExpertLayer
from spmd.model.linear import Weight

PADDING = -1  # the expert of rows that are padding


class Routed(NamedTuple):
    """Tokens and the experts they go to."""

    x: Tensor  # [T, hidden]
    weights: Tensor  # [T, top_k], in x's dtype
    experts: Tensor  # [T, top_k], integers

    def packed(self) -> Tensor:
        """All in one tensor `[T, hidden + 2 * top_k]`, to travel at once.

        Experts are counted from 1 in it, in integers as wide as x's numbers, so that a row of zeros is padding.
        """
        numbers = self.experts.to(_integers(self.x)) - PADDING
        return torch.cat([self.x, self.weights, numbers.view(self.x.dtype)], dim=1)

    @staticmethod
    def unpacked(packed: Tensor, top_k: int) -> "Routed":
        x, weights, numbers = packed.tensor_split([-2 * top_k, -top_k], dim=1)
        return Routed(x, weights, numbers.view(_integers(packed)) + PADDING)


def _integers(x: Tensor) -> torch.dtype:
    """Of the same size as x's elements."""
    return torch.int16 if x.element_size() == 2 else torch.int32


def route(x: Tensor, logits: Tensor, layer: ExpertLayer) -> Routed:
    """Tokens `[T, hidden]` to the experts that their logits `[T, experts]` choose."""
    weights, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(layer.top_k, dim=-1)
    if layer.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routed(x, weights.to(x.dtype), experts)


class PlainExperts:
    """Only those that some token chose are run, each on its tokens at once."""

    def __init__(self, gated_linear: Callable[[Tensor, Weight], Tensor]) -> None:
        """`gated_linear`: the backend's."""
        self.gated_linear = gated_linear

    def __call__(self, x: Tensor, logits: Tensor, layer: ExpertLayer, rows: int) -> Tensor:
        """See `Backend.experts`."""
        routed, ep = route(x, logits, layer), layer.ep
        if ep.group is not None:
            routed = Routed.unpacked(ep.gather(routed.packed(), rows), layer.top_k)
        return ep.scatter_sum(self.share(routed, layer))[: len(x)]

    def share(self, routed: Routed, layer: ExpertLayer) -> Tensor:
        """This rank's share of the weighted sum of each token's experts, `[T, hidden]`."""
        x, weights, experts = routed
        tokens, top_k = experts.shape
        owned = layer.ep.owned(layer.num_experts)
        if len(owned) < layer.num_experts:  # counted from the first own one; others', and padding's, come behind
            experts = (experts - owned.start).remainder(layer.num_experts + 1)
        chosen, order = experts.flatten().sort(stable=True)
        counts = chosen.bincount(minlength=len(owned))[: len(owned)].tolist()
        outputs = x.new_zeros(len(order), x.shape[1])
        here = order[: sum(counts)]
        for expert, (places, part) in enumerate(zip(here.split(counts), x[here // top_k].split(counts), strict=True)):
            if len(part):
                outputs[places] = layer.down[expert].linear(self.gated_linear(part, layer.gate_up[expert]))
        return (outputs.view(tokens, top_k, -1) * weights.unsqueeze(-1)).sum(dim=1)
