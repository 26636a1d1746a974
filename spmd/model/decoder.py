"""The decoder of every supported family: one pipeline stage of it, one tensor-parallel slice, differences by flag.

Modules that a stage lacks are None. Parameters bear their checkpoint names (without `model.`), except that q, k and v,
gate and up, and the experts of a layer are fused.
"""

from dataclasses import replace
from pkgutil import resolve_name

import torch
from torch import Tensor, nn

from spmd.model.architecture import Architecture, LayerSpec
from spmd.model.backend import Backend, Sums
from spmd.model.batch import Batch
from spmd.model.layers import Embedding, Head, RMSNorm
from spmd.model.moe import Experts
from spmd.model.weights import Piece, Weights
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel


class DecoderLayer(nn.Module):
    """Attention and MLP, each after its norm and added to the residual."""

    def __init__(self, arch: Architecture, spec: LayerSpec, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch)
        self.self_attn = resolve_name(spec.attention.module)(arch, spec.attention, tp)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch)
        self.mlp = resolve_name(spec.mlp)(arch, tp, ep)

    def forward(
        self, x: Sums, residual: Tensor | None, layer: int, backend: Backend, shared_rows: int | None
    ) -> tuple[Sums, Tensor]:
        """Both `[T, hidden]`: what the MLP adds, and what it is to be added to, so that the next norm can fuse it."""
        x, residual = self.input_layernorm(x, residual, backend)
        x, residual = self.post_attention_layernorm(self.self_attn(x, layer, backend), residual, backend)
        return self.mlp(x, backend, shared_rows), residual


class Decoder(nn.Module):
    """The layers `layers` of a model; with the embedding on the first stage, final norm and head on the last."""

    def __init__(
        self,
        arch: Architecture,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        tp: TensorParallel | None = None,
        ep: ExpertParallel | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate this rank's share, uninitialised, on `device`. By default the whole model."""
        super().__init__()
        self.arch = arch
        self.tp = tp = tp or TensorParallel()
        ep = ep or ExpertParallel()
        self.first, self.last = first, last
        self.range = range(arch.num_layers) if layers is None else layers
        with torch.device(device):
            self.embed_tokens = Embedding(arch, tp) if first else None
            self.layers = nn.ModuleDict({str(i): DecoderLayer(arch, arch.layers[i], tp, ep) for i in self.range})
            self.norm = RMSNorm(arch.hidden_size, arch) if last else None
            self.lm_head = Head(arch, tp) if last else None
        if self.embed_tokens is not None and self.lm_head is not None and arch.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.inference_mode()
    def forward(self, x: Tensor, batch: Batch, backend: Backend) -> Tensor:
        """Run this stage, after `backend.prepare(batch)`.

        Args:
            x: token ids `[T]` on the first stage, else the hidden states `[T, hidden]` of the one before.

        Returns:
            Hidden states `[T, hidden]`; on the last stage logits of `batch.sample_rows`, of this rank's slice of the
            vocabulary: `[S, padded vocab / tp]`.
        """
        backend.begin(batch)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x, backend)
        added: Sums = x
        residual: Tensor | None = None
        for i, layer in enumerate(self.layers.values()):
            added, residual = layer(added, residual, i, backend, batch.shared_rows)
        assert residual is not None
        if self.norm is None or self.lm_head is None:
            return backend.collect(added, len(residual)) + residual
        if batch.sample_rows is not None:
            added = backend.collect(added, len(residual))[batch.sample_rows]
            residual = residual[batch.sample_rows]
        normed, _ = self.norm(added, residual, backend)
        logits: Tensor = self.lm_head(normed, backend)
        return logits

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
        """Of all that it holds, see `Weights.pack`."""
        for module in self.modules():
            if isinstance(module, Weights):
                module.pack(rows)
