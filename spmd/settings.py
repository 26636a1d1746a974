"""What runs: the configuration with every null worked out, once, on each rank alike.

A start reads the model's shape, then calls `resolve`; whatever comes behind that takes the `Settings`, or a few of
their values, and asks nobody. They are what the start-up log names and what `run_dir/config.yaml` holds.

Two values become known only later. The number of KV blocks is what memory has room for once weights are loaded, see
`sized`. A row's sampling values may still replace those of `sampling`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from spmd.api.sampling_keys import default_sampling
from spmd.api.tokenizer import load_generation_config
from spmd.backend.choose import Name, choose_backend, default_block_size
from spmd.config import BalanceConfig, Config, ModelConfig, SchedulerConfig, TopologyConfig, keys, value_of
from spmd.config_checks import decode_rows
from spmd.model.architecture import Architecture, check_topology, read_architecture
from spmd.model.checkpoint import as_stored
from spmd.model.cost import head_cost, layer_params
from spmd.model.linear import computed_in
from spmd.topology import Topology, split_layers

# Rows of a batch with prompts times parameters of a layer up to which a GPU waits for its host: ten launches take that
# some 0.5 ms, in which an H100 or H200 computes 3e14 operations, two for each row and parameter.
LAUNCH_BOUND = 1.5e11
MIN_MIXED_ROWS = 256  # of its CUDA graphs: with fewer a forward takes the device about as long


@dataclass(frozen=True, kw_only=True)
class ModelSettings(ModelConfig):
    """`model.*` without nulls and autos. `revision` may be null: it is the Hub's to choose then."""

    path: str
    dtype: str  # that the device computes in
    max_model_len: int
    tokenizer: str
    attention_backend: Name  # flashinfer or torch


@dataclass(frozen=True, kw_only=True)
class TopologySettings(TopologyConfig):
    """`topology.*` without nulls."""

    layers: list[int]


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings(SchedulerConfig):
    """`scheduler.*` without nulls, but for `num_blocks` before weights are loaded."""

    max_num_batched_tokens: int
    block_size: int
    lookahead: int
    prefill_spread: int
    prefill_min: int
    long_prefill_token_threshold: int
    decode_buckets: list[int]  # all row counts that decode batches are padded to, largest first
    mixed_buckets: list[int]  # those that plans with prompts are padded to, largest first


@dataclass(frozen=True, kw_only=True)
class BalanceSettings(BalanceConfig):
    """`balance.*` without nulls."""

    gate: str


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """A `Config` without nulls, and what else is known of the model before its weights are loaded."""

    model: ModelSettings
    topology: TopologySettings
    scheduler: SchedulerSettings
    balance: BalanceSettings
    asked: Config  # what it was worked out from
    arch: Architecture  # as the device computes it
    kind: str  # of device: cuda or cpu
    decode_rows: int  # B, see `spmd.config_checks.decode_rows`
    asked_dtype: str  # that answers depend on: model.dtype, or the checkpoint's, whatever the device computes in
    default_sampling: Mapping[str, Any]  # of rows that say nothing, see `spmd.api.sampling_keys`

    @property
    def stages(self) -> list[range]:
        """Layers of each stage, contiguous and in order."""
        return [range(start, stop) for start, stop in pairwise(accumulate(self.topology.layers, initial=0))]

    @property
    def slots(self) -> int:
        """N, the micro-batches of a replica in flight."""
        return self.topology.pp + self.scheduler.async_depth

    @property
    def capacity(self) -> int:
        """Tokens that one request may have in the KV cache, whose size must be known."""
        assert self.scheduler.num_blocks is not None
        return (self.scheduler.num_blocks - 1) * self.scheduler.block_size

    @property
    def longest(self) -> int:
        """Tokens of the longest request there can be."""
        return min(self.model.max_model_len, self.capacity)

    def with_topology(self, **changes: Any) -> "Settings":
        """What the same configuration comes to on another topology, which the model must allow."""
        topology = replace(self.asked.topology, **changes)
        return resolve(replace(self.asked, topology=topology), self.arch, torch.device(self.kind))

    @property
    def seats_to_fill(self) -> int:
        """Those of all replicas where rows come longest first, else 0; see `spmd.schedule.longest_first`."""
        return self.topology.dp * self.scheduler.max_num_seqs if self.scheduler.policy == "longest" else 0

    def sized(self, num_blocks: int) -> "Settings":
        """With the number of KV blocks that a replica got."""
        return replace(self, scheduler=replace(self.scheduler, num_blocks=num_blocks))

    def as_config(self) -> dict[str, Any]:
        """The keys of the configuration with what they came to."""
        nested = {member.name: getattr(self, member.name) for member in fields(Config)}
        values = asdict(Config(**nested))
        sampling = {name: self.default_sampling[name] for name in values["sampling"]}
        return values | {"sampling": {name: list(v) if isinstance(v, tuple) else v for name, v in sampling.items()}}


def read_model(config: Config) -> Architecture:
    """Read the model's shape and check that it fits the topology.

    Raises:
        ValueError: one line, see `read_architecture`, `as_stored` and `check_topology`.
    """
    m, t = config.model, config.topology
    if m.path is None:
        raise ValueError("model.path is not set: give a folder with config.json, or a Hub id")
    arch = as_stored(read_architecture(m.path, m.dtype, m.revision, m.overrides), m.path, m.load_format, m.revision)
    check_topology(arch, Topology(t.dp, t.pp, t.tp), t.ep)
    longest = arch.rope.reach(arch.max_position_embeddings)
    if m.max_model_len and m.max_model_len > longest:
        stretched = f", {arch.rope.rope_type} factor {arch.rope.factor:g} included" if arch.rope.factor != 1 else ""
        raise ValueError(
            f"model.max_model_len={m.max_model_len} is more than the {longest} positions "
            f"the model was made for (max_position_embeddings{stretched})"
        )
    return arch


def resolve(config: Config, arch: Architecture, device: torch.device) -> Settings:
    """Work out what is null, for a model read by `read_model` and a kind of device that all ranks have.

    Raises:
        ValueError: model.attention_backend, topology.layers or a default of sampling can't be.
    """
    m, t = config.model, config.topology
    assert m.path is not None
    computed = replace(arch, dtype=computed_in(arch.dtype, device.type)) if m.dtype == "auto" else arch
    backend = choose_backend(m.attention_backend, computed, config.scheduler.block_size, device)
    rows = decode_rows(config)
    scheduler = _scheduler(config.scheduler, t.pp, rows, device.type == "cuda", backend)
    if config.scheduler.mixed_buckets is None and runs_mixed_graphs(config, computed, backend):
        scheduler = replace(scheduler, mixed_buckets=_launch_bound(computed, scheduler.max_num_batched_tokens))
    generation_config = load_generation_config(m.path, m.revision)
    sampling = default_sampling(generation_config, config.sampling, arch.vocab_size)
    drawn = sampling["temperature"] > 0  # by rows that don't say
    layers = split_layers(arch.num_layers, t.pp, t.layers, head_cost(computed, rows, drawn))
    model = vars(m) | {
        "dtype": _name(computed.dtype),
        "max_model_len": m.max_model_len or arch.max_position_embeddings,
        "tokenizer": m.tokenizer or m.path,
        "attention_backend": backend,
    }
    gate = config.balance.gate or ("saturated" if t.ep and t.dp > 1 else "off")
    sections = {
        "model": ModelSettings(**model),
        "topology": TopologySettings(**vars(t) | {"layers": layers}),
        "scheduler": scheduler,
        "balance": BalanceSettings(**vars(config.balance) | {"gate": gate}),
    }
    return Settings(
        **vars(config) | sections,
        asked=config,
        arch=computed,
        kind=device.type,
        decode_rows=rows,
        asked_dtype=_name(arch.dtype),
        default_sampling=sampling,
    )


def worked_out(settings: Settings) -> str:
    """The keys that came to something else than what was asked for, for the log."""
    values = settings.as_config()
    found = []
    for name in keys():
        section, _, last = name.rpartition(".")
        value = values[section][last] if section else values[last]
        if value != value_of(settings.asked, name):
            found.append(f"{name}={value}")
    return ", ".join(found)


def _scheduler(s: SchedulerConfig, pp: int, rows: int, on_gpu: bool, backend: Name) -> SchedulerSettings:
    buckets, mixed, long_prompt = s.decode_buckets, s.mixed_buckets or [], s.long_prefill_token_threshold
    if buckets is None:
        buckets = _even_buckets(rows) if on_gpu else []
    # On GPUs enough that a forward with prompts takes longer than its launches.
    budget = s.max_num_batched_tokens or max(8192 if on_gpu else 2048, rows)
    if not all(1 <= bucket <= budget for bucket in mixed):
        raise ValueError(f"scheduler.mixed_buckets={mixed} must lie between 1 and max_num_batched_tokens={budget}")
    values = {
        "max_num_batched_tokens": budget,
        "block_size": s.block_size or default_block_size(backend),
        # One where a GPU would wait for its host, or a first stage for the last one's packet.
        "lookahead": int(on_gpu or pp > 1) if s.lookahead is None else s.lookahead,
        # A pipeline needs micro-batches of about equal time.
        "prefill_spread": (4 * pp if pp > 1 else 0) if s.prefill_spread is None else s.prefill_spread,
        # A GPU launches a forward with prompts kernel by kernel: it must be worth that.
        "prefill_min": s.prefill_min or (512 if on_gpu else 1),
        # A prompt that one plan can hold is no burden for long.
        "long_prefill_token_threshold": budget if long_prompt is None else long_prompt,
        # A GPU gets a CUDA graph of each.
        "decode_buckets": sorted({rows, *buckets}, reverse=True),
        "mixed_buckets": sorted(mixed, reverse=True),
    }
    return SchedulerSettings(**vars(s) | values)


def runs_mixed_graphs(config: Config, arch: Architecture, backend: Name) -> bool:
    """Whether plans with prompts can run as CUDA graphs. With experts or tensor ranks nobody has tried yet."""
    return (
        backend == "flashinfer" and not config.model.enforce_eager and config.topology.tp == 1 and not any(arch.sparse)
    )


def _launch_bound(arch: Architecture, most: int) -> list[int]:
    """Row counts, largest first, of which a layer takes the device less time than its launches take the host."""
    rows = min(most, int(LAUNCH_BOUND // layer_params(arch, 0)))
    return [count for count in reversed(_even_buckets(rows + 1)) if count >= MIN_MIXED_ROWS]


def _even_buckets(most: int) -> list[int]:
    """Row counts below `most`: by eights to 64, from there on by a quarter of the power of two below."""
    counts, rows = [], 8
    while rows < most:
        counts.append(rows)
        rows += max(8, 2 ** (rows.bit_length() - 3))
    return counts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
