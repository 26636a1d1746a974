"""The shape of a model, read from config.json and normalized: families differ in these values and in nothing else.

transformers' AutoConfig knows each family's defaults and both generations of rope keys; what it yields is checked and
turned into one frozen `Architecture` that the rest of the package receives.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from spmd.integers import round_up
from spmd.messages import check_no_pointer, first_line, show
from spmd.model.cache_spec import CacheSpec
from spmd.model.linear import DTYPES, Dense, WeightFormat, stored_dtype
from spmd.model.rope import ROPE_KEYS, RopeConfig, merge_rope, read_rope
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

# Keys that change what a model computes where transformers or vLLM heed them, and that nothing here does, by the value
# besides null, false and nothing with which they change nothing.
NOT_DONE: dict[str, Any] = {
    **dict.fromkeys(("dual_chunk_attention_config", "compression_config", "transformers_weights", "per_layer_config")),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "alibi", "attention_multiplier")),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1),
    **dict.fromkeys(("query_pre_attn_scalar", "use_bidirectional_attention")),
    "is_causal": True,
}
DUAL_CHUNK = (
    ": up to chunk_size - local_size tokens plain attention is the same, which 'model.overrides="
    "{dual_chunk_attention_config: null}' runs; set model.max_model_len to no more than that"
)
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "sliding_window", "decoder_sparse_step"),
    *("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


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
    values = _config_values(path, revision)
    try:
        return _architecture(values, dict(overrides or {}), dtype)
    except _MISTAKES as error:
        where = "config.json with model.overrides" if overrides else "config.json"
        raise ValueError(f"model.path={path}: {where}: {' '.join(str(error).split())}") from error


def _architecture(values: dict[str, Any], overrides: dict[str, Any], dtype: str) -> Architecture:
    """From the content of config.json; what is wrong with it raises one of `_MISTAKES`."""
    name, named, config = _config(values, overrides)
    stored = stored_dtype(named, dtype)
    family, experts = FAMILIES[name], _experts(config)
    if config.hidden_act not in family.activations:
        raise ValueError(f"hidden_act={config.hidden_act} is not supported, only {family.activations[0]} is")
    bias = family.attention_bias and config.attention_bias
    rope = read_rope(config.rope_parameters)
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
        max_position_embeddings=rope.positions(config.max_position_embeddings),
        tie_word_embeddings=config.tie_word_embeddings,
        rope=rope,
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


_MISTAKES = (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError)


def _config_values(path: str, revision: str | None) -> dict[str, Any]:
    """The content of config.json."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model.path={path} has no config.json")
    check_no_pointer(folder / "config.json")
    try:
        values, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        kind = "" if folder.is_dir() else " is neither a model folder nor a Hub id within reach"
        raise ValueError(f"model.path={path}{kind}: {reason}") from error
    except (TypeError, AttributeError):  # transformers', of another kind of value
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"model.path={path}: config.json is not a JSON object")
    return values


def _config(values: dict[str, Any], overrides: dict[str, Any]) -> tuple[str, Any, PretrainedConfig]:
    """The family's name, the dtype that is named, and the config with every default filled in."""
    name, model_type = _family_name(values | overrides)
    known = AutoConfig.for_model(model_type)
    other_names = known.attribute_map | {"torch_dtype": "dtype"}
    own = (*values, *ROPE_KEYS, *other_names, *(key for key in overrides if not callable(getattr(known, key, print))))
    if unknown := [key for key in overrides if key not in own]:
        raise ValueError(f"model.overrides names {', '.join(unknown)}, which no {model_type} config has")
    replaced = {other_names.get(key, key) for key in overrides}
    merged = {key: value for key, value in values.items() if other_names.get(key, key) not in replaced} | overrides
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        merged.pop("layer_types", None)  # one entry a layer: the family's rule makes them anew
    _refuse_ignored(merged)
    named, older = merged.pop("dtype", None), merged.pop("torch_dtype", None)
    rest = {key: value for key, value in merged.items() if key not in (*ROPE_KEYS, "model_type")}
    config = AutoConfig.for_model(model_type, **rest, rope_parameters=merge_rope(values, overrides))
    _check_sizes(config)
    return name, older if named is None else named, config


def _family_name(values: dict[str, Any]) -> tuple[str, str]:
    """The architecture's name, and transformers' for its kind of config."""
    model_type, names = values.get("model_type"), values.get("architectures")
    of_type = [
        name for name in FAMILIES if name.removesuffix("ForCausalLM").lower() == str(model_type).replace("_", "")
    ]
    name = str(
        (names if isinstance(names, str) else next(iter(names or of_type), None)) or f"of model_type {model_type}"
    )
    if name in FAMILIES and name not in of_type:
        raise ValueError(f"model_type={show(model_type)} is not that of architecture {name}")
    if name not in of_type:
        raise ValueError(f"architecture {name} is not supported; supported are {', '.join(FAMILIES)}")
    return name, str(model_type)


def _refuse_ignored(values: dict[str, Any]) -> None:
    if values.get("quantization_config"):
        raise ValueError("quantized checkpoints are not supported")
    for key, neutral in NOT_DONE.items():
        value = values.get(key)
        if value != neutral and (value or (neutral is True and value is False)):
            hint = DUAL_CHUNK if key.startswith("dual") else ""
            raise ValueError(f"{key}={show(value)} is not supported{hint}")


def _check_sizes(config: PretrainedConfig) -> None:
    """What transformers doesn't check."""
    for name in SIZES:
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={show(value)} must be a whole number, at least 1")
    heads, kv_heads, experts = config.num_attention_heads, config.num_key_value_heads, _experts(config)
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
    if experts and config.num_experts_per_tok > experts:
        raise ValueError(f"num_experts_per_tok={config.num_experts_per_tok} is more than the {experts} experts")


def _layers(family: Family, config: PretrainedConfig, experts: int) -> tuple[LayerSpec, ...]:
    window = config.sliding_window if family.sliding_window else None
    kinds = ("full_attention", "sliding_attention") if family.sliding_window else ("full_attention",)
    types = getattr(config, "layer_types", None) or [kinds[-1]] * config.num_hidden_layers
    if foreign := sorted(set(types) - set(kinds)):
        raise ValueError(
            f"layer_types has {', '.join(foreign)}; of this family's layers supported are {', '.join(kinds)}"
        )
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
