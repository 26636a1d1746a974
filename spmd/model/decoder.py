"""The decoder of every supported family: one pipeline stage of it, one tensor-parallel slice, differences by flag.

Modules that a stage lacks are None. Parameters bear their checkpoint names (without `model.`), except that q, k and v,
gate and up, and the experts of a layer are fused.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.attention import AttentionPlan
from spmd.model.batch import Batch
from spmd.model.kv_cache import KVCache
from spmd.model.layers import MLP, ColumnLinear, Embedding, Head, RMSNorm, RowLinear
from spmd.model.moe import Experts, SparseMLP
from spmd.model.rope import Rotary, rotate
from spmd.model.weights import Piece, Weights
from spmd.parallel.tensor import TensorParallel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v of the batch's rows to the heads' outputs, over the cache


class Attention(nn.Module):
    """Self-attention of one layer, up to what happens between q, k, v and the cache."""

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim = arch.head_dim
        q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.heads = [arch.num_heads // tp.size, arch.num_kv_heads // tp.size, arch.num_kv_heads // tp.size]
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = ColumnLinear(arch.hidden_size, parts, arch.qkv_bias, arch.dtype, tp)
        self.o_proj = RowLinear(q, arch.hidden_size, arch.o_bias, arch.dtype, tp)
        self.q_norm = RMSNorm(arch.head_dim, arch) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch) if arch.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(1, (-1, self.head_dim)).split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(rotate(q, *rope), rotate(k, *rope), v))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after its norm and added to the residual."""

    def __init__(self, arch: Architecture, sparse: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch)
        self.self_attn = Attention(arch, tp)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch)
        self.mlp = SparseMLP(arch, tp) if sparse else MLP(arch, tp)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The layers `layers` of a model; with the embedding on the first stage, final norm and head on the last."""

    def __init__(
        self,
        arch: Architecture,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        tp: TensorParallel | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate this rank's share, uninitialised, on `device`. By default the whole model."""
        super().__init__()
        self.arch = arch
        self.tp = tp = tp or TensorParallel()
        self.first, self.last = first, last
        self.range = range(arch.num_layers) if layers is None else layers
        with torch.device(device):
            self.embed_tokens = Embedding(arch, tp) if first else None
            self.layers = nn.ModuleDict({str(i): DecoderLayer(arch, arch.sparse[i], tp) for i in self.range})
            self.norm = RMSNorm(arch.hidden_size, arch) if last else None
            self.lm_head = Head(arch, tp) if last else None
        if self.embed_tokens is not None and self.lm_head is not None and arch.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rotary = Rotary(arch.rope, arch.head_dim, device)

    @torch.inference_mode()
    def forward(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor | None:
        """Run this stage.

        Args:
            x: token ids `[T]` on the first stage, else the hidden states `[T, hidden]` of the one before.

        Returns:
            Hidden states `[T, hidden]`; on the last stage float32 logits `[S, vocab]` of `batch.sample_rows`, which
            only tp rank 0 has (None on the others).
        """
        windows = [self.arch.windows[i] for i in self.range]
        plan = AttentionPlan(batch, cache, self.arch.num_heads // self.tp.size, windows)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        rope = self.rotary.tables(batch.positions, x.dtype)
        for i, (layer, window) in enumerate(zip(self.layers.values(), windows, strict=True)):
            x = layer(x, rope, partial(plan, i, window))
        if self.norm is None or self.lm_head is None:
            return x
        return self.lm_head(self.norm(x[batch.sample_rows]))

    def pieces(self, stacked_experts: bool = False) -> dict[str, list[Piece]]:
        """What this rank reads from a checkpoint, by tensor name; tied embeddings go by the embedding's."""
        found: dict[str, list[Piece]] = {}
        for path, module in self.named_modules():
            if not isinstance(module, Weights):
                continue
            parent, _, own = path.rpartition(".")
            if module is self.lm_head and self.arch.tie_word_embeddings:
                if self.embed_tokens is not None:
                    continue  # its weight is the head's
                own = "embed_tokens"
            pieces = module.stacked_pieces if stacked_experts and isinstance(module, Experts) else module.pieces
            for piece in pieces(own):
                name = f"{parent}.{piece.name}" if parent else piece.name
                found.setdefault(name, []).append(replace(piece, name=name))
        return found

    def pack(self, rows: int) -> None:
        """Reorder loaded weights for forwards of about `rows` rows, where that is faster (CPU, bf16)."""
        for module in self.modules():
            if isinstance(module, Weights):
                module.pack(rows)
