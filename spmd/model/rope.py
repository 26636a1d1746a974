"""Rotary position embedding: frequencies with their scalings (default, linear, llama3, yarn) and the rotation.

The formulas are those of transformers' `modeling_rope_utils.py`, operation by operation, so that fp32 results agree.
Cosines and sines are computed from the positions of each forward, once for all layers: no table, no length limit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


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
