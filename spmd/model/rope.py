"""Rotary position embedding: frequencies with their scalings (default, linear, llama3, yarn) and the rotation.

The formulas are those of transformers' `modeling_rope_utils.py`, operation by operation, so that fp32 results agree.
Cosines and sines are computed from the positions of each forward, once for all layers: no table, no length limit.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from spmd.messages import show

NEEDED: dict[Any, tuple[str, ...]] = {  # what a rope type can't do without; a trained length transformers fills in
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
BESIDE = ("rope_theta", "partial_rotary_factor")  # formerly keys of config.json beside `rope_scaling`
ROPE_KEYS = ("rope_parameters", "rope_scaling", *BESIDE)  # of both generations
NOT_DONE = {"extrapolation_factor": 1, "attn_factor": 1, "apply_yarn_scaling": True}  # and what changes nothing


@dataclass(frozen=True)
class RopeConfig:
    """Keys of config.json's `rope_parameters` (formerly `rope_scaling` and `rope_theta`)."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn, from here on
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate={show(self.truncate)} must be true or false")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            high, low = self.high_freq_factor, self.low_freq_factor
            raise ValueError(f"high_freq_factor={high} must be more than low_freq_factor={low}")

    def positions(self, named: int) -> int:
        """How many a model is for whose max_position_embeddings is `named`: with YaRN, as in vLLM, those it was
        trained for times the factor. Its authors may have put the one number or the other into config.json.
        """
        return int(self.original_max_position_embeddings * self.factor) if self.rope_type == "yarn" else named

    def reach(self, positions: int) -> int:
        """How many may be asked for. With linear scaling, of which vLLM takes all, nobody knows whether the factor is
        in max_position_embeddings already.
        """
        return int(positions * max(1, self.factor)) if self.rope_type == "linear" else positions


def merge_rope(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the rope keys of config.json, of either generation, and of overrides come to: `rope_parameters`.

    A scaling replaces the one before it as a whole, `rope_theta` stays until it is named itself. Within config.json
    `rope_scaling` goes before `rope_parameters`, as in transformers. Numbers may stand in quotes.

    Raises:
        ValueError: one of them isn't what it should be.
    """
    merged: dict[str, Any] = {}
    for values, null_counts in ((config, False), (overrides, True)):
        named: dict[str, Any] = {}
        for key in ("rope_parameters", "rope_scaling"):
            if values.get(key) or (null_counts and key in values):
                named = _mapping(key, values[key] or {})
                merged = {name: merged[name] for name in BESIDE if name in merged} | named
        merged |= {key: values[key] for key in BESIDE if values.get(key) is not None and key not in named}
        if (original := values.get("original_max_position_embeddings")) is not None and merged.get("factor"):
            merged["original_max_position_embeddings"] = original  # transformers prefers the one beside the mapping
    numbers = {f.name for f in fields(RopeConfig)} - {"rope_type", "truncate"} | {"partial_rotary_factor"}
    kind = merged.get("rope_type", "default")
    if lacking := [key for key in NEEDED.get(kind, ()) if key not in merged]:
        raise ValueError(f"rope_type {kind} lacks {', '.join(lacking)}")
    return {key: _number(key, value) if key in numbers else value for key, value in merged.items()}


def read_rope(values: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters`, with the defaults that transformers has filled in.

    Raises:
        ValueError: a type that is not supported, or a value that it lacks, that can't be or that nothing here heeds.
    """
    kind = values.get("rope_type", "default")
    if kind not in NEEDED:
        raise ValueError(f"rope_type {kind} is not supported; supported are {', '.join(NEEDED)}")
    if kind == "default" and values.get("factor") not in (None, 1):
        raise ValueError(f"rope factor {values['factor']} has no rope_type: name one of {', '.join(NEEDED)} with it")
    # With the default type transformers ignores it for all supported families.
    if kind != "default" and values.get("partial_rotary_factor") not in (None, 1):
        told = show(values["partial_rotary_factor"])
        raise ValueError(f"partial_rotary_factor={told} with rope_type {kind} is not supported, only 1 is")
    if ignored := [f"{key}={show(values[key])}" for key, same in NOT_DONE.items() if values.get(key, same) != same]:
        raise ValueError(f"{', '.join(ignored)} of rope_type {kind} is not supported")
    return RopeConfig(**{f.name: values[f.name] for f in fields(RopeConfig) if values.get(f.name) is not None})


def _mapping(key: str, value: Any) -> dict[str, Any]:
    """One set of parameters for all layers, without those that are null."""
    if not isinstance(value, Mapping) or any(isinstance(inner, Mapping) for inner in value.values()):
        raise ValueError(f"{key}={show(value)} must be one mapping of rope parameters, for all layers")
    found = {name: inner for name, inner in value.items() if inner is not None}
    return found if "rope_type" in found or "type" not in found else found | {"rope_type": found["type"]}


def _number(key: str, told: Any) -> int | float:
    value: int | float = told
    if isinstance(told, str):
        with suppress(ValueError):
            value = int(told) if told.isdecimal() else float(told)
    least = 1 if key == "rope_theta" else 0
    if isinstance(value, bool) or not isinstance(value, int | float):
        value = math.nan
    if least < value < math.inf or (value == 0 and key.startswith("mscale")):  # 0: as if it weren't there
        return value
    raise ValueError(f"{key}={show(told)} must be a number above {least}")


class Rotary:
    """Rotates queries and keys by their positions."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(config, head_dim).to(device)
        self.scale = attention_scale(config)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 `[T, head_dim // 2]`, of `positions` `[T]`."""
        angles = positions[:, None].float() * self.frequencies
        return angles.cos() * self.scale, angles.sin() * self.scale

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[T, 1, head_dim]` of `positions` `[T]`, as `rotate` wants them."""
        cos, sin = self.angles(positions)
        return (
            torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
            torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x * cos + rotate_half(x) * sin` for `x` `[T, heads, head_dim]`; the half's sign sits in `sin`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of dimensions, `[head_dim // 2]` float32, on the CPU."""
    plain = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
    match config.rope_type:
        case "linear":
            return plain / config.factor
        case "llama3":
            return _llama3(config, plain)
        case "yarn":
            return _yarn(config, head_dim)
    assert config.rope_type == "default"
    return plain


def attention_scale(config: RopeConfig) -> float:
    """Factor on cosines and sines: 1 but for yarn (section 3.4 of the YaRN paper)."""
    if config.rope_type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    length, low, high = config.original_max_position_embeddings, config.low_freq_factor, config.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > length / low, plain / config.factor, plain)
    smooth = (length / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * stretched / config.factor + smooth * stretched
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(between, smoothed, stretched)


def _yarn(config: RopeConfig, head_dim: int) -> Tensor:
    """YaRN: a ramp over the dimensions from the plain frequencies to those divided by `factor`."""
    powers = config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)

    def dimension_of(rotations: float) -> float:
        turns = config.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(config.beta_fast or 32), dimension_of(config.beta_slow or 1)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does: no division by zero
    plain_share = 1 - ((torch.arange(head_dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (config.factor * powers) * (1 - plain_share) + 1.0 / powers * plain_share
