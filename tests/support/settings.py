"""Settings of a model's shape alone, with no checkpoint behind it."""

from dataclasses import replace

import torch

from spmd.config import Config
from spmd.model.architecture import Architecture
from spmd.runtime.compose import CONF
from spmd.settings import Settings, resolve

NO_DEFAULTS = str(CONF / "shapes" / "tiny")  # a folder without generation_config.json


def settled(config: Config, arch: Architecture, kind: str = "cpu", num_blocks: int | None = None) -> Settings:
    """What a configuration comes to for such a model, in the dtype it has, on devices of a kind.

    `num_blocks`: the size of the KV cache, if it is to be known.
    """
    dtype = str(arch.dtype).removeprefix("torch.") if config.model.dtype == "auto" else config.model.dtype
    model = replace(config.model, path=config.model.path or NO_DEFAULTS, dtype=dtype)
    settings = resolve(replace(config, model=model), arch, torch.device(kind))
    return settings if num_blocks is None else settings.sized(num_blocks)
