"""The shape of a model, read from config.json and normalized: families differ in these values and in nothing else.

transformers' AutoConfig knows each family's defaults and both generations of rope keys; what it yields is checked and
turned into one frozen `Architecture` that the rest of the package receives.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from spmd.integers import round_up
from spmd.messages import first_line
from spmd.model.cache_spec import CacheSpec
from spmd.model.linear import Dense, WeightFormat
from spmd.model.rope import ROPE_TYPES, RopeConfig
from spmd.topology import Topology, split_layers

ATTENTION = "spmd.model.attention:Attention"
DENSE_MLP, SPARSE_MLP = "spmd.model.layers:MLP", "spmd.model.moe:SparseMLP"


@dataclass(frozen=True)
class Family:
    """What an architecture's name implies, as in its transformers modeling file.

    Attention and MLP are named as `module:Class`, which `DecoderLayer` imports: these classes import this file.
    """

    qkv_bias: bool = False  # always, whatever attention_bias says
    attention_bias: bool = False  # heeds config.attention_bias, for q, k, v and o
    qk_norm: bool = False
    sliding_window: bool = False
    norm_topk_prob: bool = False  # always, whatever norm_topk_prob says
    attention: str = ATTENTION
    mlp: str = DENSE_MLP  # of layers without experts
    activations: tuple[str, ...] = ("silu", "swish")  # values of hidden_act that its MLPs compute


FAMILIES = {
    "LlamaForCausalLM": Family(attention_bias=True),
    "MistralForCausalLM": Family(sliding_window=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True, sliding_window=True),
    "Qwen3ForCausalLM": Family(attention_bias=True, qk_norm=True, sliding_window=True),
    "Qwen3MoeForCausalLM": Family(attention_bias=True, qk_norm=True, sliding_window=True),
    "MixtralForCausalLM": Family(sliding_window=True, norm_topk_prob=True),
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class GroupedQuery:
    """The kind of attention in which several query heads share a KV head."""

    window: int | None = None  # tokens a query sees, itself included; None: all
    module: str = ATTENTION


@dataclass(frozen=True)
class LayerSpec:
    """What a layer consists of. Another kind of attention or MLP is another value here."""

    attention: GroupedQuery = GroupedQuery()
    mlp: str = DENSE_MLP


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Sizes are the whole model's, before any split over ranks."""

    family: str
    stored: torch.dtype  # of the checkpoint
    dtype: torch.dtype  # that is computed in
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # expert weights of a token sum to 1
    weight_format: type[WeightFormat] = Dense  # of attention's, MLPs' and experts' linears

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer's attention."""
        return tuple(layer.attention.window for layer in self.layers)

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Of each layer, whether it has experts in the place of one MLP."""
        return tuple(layer.mlp == SPARSE_MLP for layer in self.layers)

    def cache_spec(self, layer: int, tp: int = 1) -> CacheSpec:
        """What a token leaves behind in one layer, on one of `tp` ranks. So far all layers are alike."""
        return CacheSpec(self.num_kv_heads // tp, self.head_dim, self.dtype)

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of embedding and head, zero rows at the end included, so that tp divides them."""
        return round_up(self.vocab_size, tp)


def read_architecture(
    path: str, dtype: str = "auto", revision: str | None = None, overrides: dict[str, Any] | None = None
) -> Architecture:
    """Read the model's shape from the folder or Hub id `path`.

    Args:
        dtype: auto (the checkpoint's, float32 where it names none), float32, bfloat16 or float16.
        overrides: values that replace keys of config.json.

    Raises:
        ValueError: no config.json, an unknown architecture, or a feature of it that is not supported here.
    """
    name, config = _read_config(path, revision, dict(overrides or {}))
    family = FAMILIES[name]
    if config.hidden_act not in family.activations:
        raise ValueError(f"{path}: hidden_act={config.hidden_act} is not supported, only {family.activations[0]} is")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path}: quantized checkpoints are not supported")
    bias = family.attention_bias and config.attention_bias
    experts, stored = _experts(config), _stored(config)
    return Architecture(
        family=name,
        stored=stored,
        dtype=stored if dtype == "auto" else DTYPES[dtype],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=_layers(family, config, experts),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope=_rope(path, config),
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=getattr(config, "mlp_bias", False),
        qk_norm=family.qk_norm,
        num_experts=experts,
        experts_per_token=config.num_experts_per_tok if experts else 0,
        moe_intermediate_size=getattr(config, "moe_intermediate_size", config.intermediate_size) if experts else 0,
        norm_topk_prob=family.norm_topk_prob or getattr(config, "norm_topk_prob", False),
    )


def check_topology(arch: Architecture, topology: Topology, ep: bool = False) -> None:
    """Check that the model can be split this way. The vocabulary always can: it is padded.

    Args:
        ep: each expert lies whole on one of the stage's dp * tp ranks.

    Raises:
        ValueError: fewer layers than stages, a size that tp does not divide (names every such size), or experts that
            can't be shared out evenly.
    """
    if ep:
        _check_experts(arch, topology)
    split_layers(arch.num_layers, topology.pp)
    sizes = {"num_attention_heads": arch.num_heads, "num_key_value_heads": arch.num_kv_heads}
    if not all(arch.sparse):
        sizes["intermediate_size"] = arch.intermediate_size
    if any(arch.sparse) and not ep:
        sizes["moe_intermediate_size"] = arch.moe_intermediate_size
    if any(size % topology.tp for size in sizes.values()):
        listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
        fitting = [tp for tp in range(1, topology.tp) if not any(size % tp for size in sizes.values())]
        raise ValueError(
            f"topology.tp={topology.tp} must divide each of {listed} of {arch.family}; "
            f"below it {', '.join(map(str, fitting))} would fit"
        )


def _check_experts(arch: Architecture, topology: Topology) -> None:
    dp, tp, ranks = topology.dp, topology.tp, topology.dp * topology.tp
    if not any(arch.sparse):
        raise ValueError(f"topology.ep=true shares out experts, {arch.family} has none; use topology.ep=false")
    if arch.num_experts % ranks:
        fitting = [n for n in range(1, arch.num_experts + 1) if arch.num_experts % n == 0]
        raise ValueError(
            f"topology.ep=true needs topology.dp={dp} x topology.tp={tp} = {ranks} ranks to divide the model's "
            f"num_experts={arch.num_experts}; {', '.join(map(str, fitting))} ranks would fit, or use topology.ep=false"
        )


def _read_config(path: str, revision: str | None, overrides: dict[str, Any]) -> tuple[str, PretrainedConfig]:
    """The family's name and its config with every default filled in."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model.path={path} has no config.json")
    try:
        values, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        kind = "" if folder.is_dir() else " is neither a model folder nor a Hub id within reach"
        raise ValueError(f"model.path={path}{kind}: {reason}") from error
    name, model_type = _family_name(path, values), values.pop("model_type")
    if "num_hidden_layers" in overrides:
        values.pop("layer_types", None)  # one entry a layer: the family's rule makes them anew
    try:
        known = AutoConfig.for_model(model_type)
        unknown = [key for key in overrides if key not in values and not hasattr(known, key)]
        if unknown:
            raise ValueError(f"model.overrides names {', '.join(unknown)}, which no {model_type} config has")
        return name, AutoConfig.for_model(model_type, **(values | overrides))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"model.path={path}: {' '.join(str(error).split())}") from error


def _family_name(path: str, values: dict[str, Any]) -> str:
    model_type = values.get("model_type", "")
    of_type = [name for name in FAMILIES if name.removesuffix("ForCausalLM").lower() == model_type.replace("_", "")]
    names = values.get("architectures") or of_type or [f"of model_type {model_type or 'unknown'}"]
    if names[0] not in of_type:
        raise ValueError(
            f"model.path={path}: architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return names[0]


def _stored(config: PretrainedConfig) -> torch.dtype:
    stored = config.dtype or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def _rope(path: str, config: PretrainedConfig) -> RopeConfig:
    values = config.rope_parameters
    rope = RopeConfig(**{f.name: values[f.name] for f in fields(RopeConfig) if values.get(f.name) is not None})
    if rope.rope_type not in ROPE_TYPES:
        raise ValueError(f"{path}: rope_type {rope.rope_type} is not supported; supported are {', '.join(ROPE_TYPES)}")
    return rope


def _layers(family: Family, config: PretrainedConfig, experts: int) -> tuple[LayerSpec, ...]:
    window = config.sliding_window if family.sliding_window else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(
        LayerSpec(
            GroupedQuery(window if kind == "sliding_attention" else None, family.attention),
            SPARSE_MLP if _is_sparse(config, layer, experts) else family.mlp,
        )
        for layer, kind in enumerate(types)
    )


def _experts(config: PretrainedConfig) -> int:
    return getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)


def _is_sparse(config: PretrainedConfig, layer: int, experts: int) -> bool:
    """The rule of Qwen3MoeDecoderLayer; Mixtral has neither key and is sparse throughout."""
    step = getattr(config, "decoder_sparse_step", 1)
    return experts > 0 and layer not in getattr(config, "mlp_only_layers", ()) and (layer + 1) % step == 0
