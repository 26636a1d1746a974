"""Every key of the configuration, with its default, and every rule that spans keys, checked here once.

`Config` is the schema Hydra validates against (unknown keys and wrong types are errors) and the frozen value the rest
of the package receives. Names are vLLM's where vLLM has one.
"""

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None  # a folder with config.json (+ safetensors), or a Hub id
    dtype: str = "auto"  # auto: the checkpoint's, float32 on CPUs without it; float32, bfloat16, float16
    load_format: str = "auto"  # auto, safetensors, dummy (random weights, needs only config.json)
    max_model_len: int | None = None  # null: the model's max_position_embeddings
    tokenizer: str | None = None  # null: model.path
    revision: str | None = None  # branch, tag or commit of a Hub id
    overrides: dict[str, Any] = field(default_factory=dict)  # replaces keys of config.json
    attention_backend: str = "auto"  # auto: flashinfer where it can run, else torch; flashinfer, torch
    enforce_eager: bool = False  # GPUs: launch decode batches kernel by kernel instead of as CUDA graphs
    decode_products: str = "auto"  # in CUDA graphs; auto: by a kernel of ours where it is faster (Hopper); torch


@dataclass(frozen=True)
class TopologyConfig:
    dp: int = 1
    pp: int = 1
    tp: int = 1
    layers: list[int] | None = None  # layers of each stage; null: split so that the slowest stage is fastest
    ep: bool = False  # each expert lies whole on one of its stage's dp * tp ranks; replicas then run in lockstep


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int = 128  # running requests of a replica
    max_num_batched_tokens: int | None = None  # tokens of one plan; null: 8192 on GPUs, else 2048
    block_size: int | None = None  # tokens of one KV block; null: 64 on GPUs, else 16
    num_blocks: int | None = None  # KV blocks of a replica; null: from memory
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for weights and KV cache; activations take the rest
    async_depth: int = 0  # micro-batches in flight beyond pp
    lookahead: int | None = None  # ticks a commit lags, so that plans needn't wait; null: 1 on GPUs or if pp > 1, or 0
    prefill: str = "mixed"  # mixed: chunks ride along with decodes; exclusive: a plan is all prefill or all decode
    prefill_batch: int = 1  # prompts of one exclusive prefill plan
    prefill_spread: int | None = None  # mixed: plans that waiting prompts are spread over; 0: one; null: 4 * pp, or 0
    prefill_min: int | None = None  # tokens below which prompts aren't spread further; null: 512 on GPUs, else a block
    policy: str = "fcfs"  # fcfs, priority
    prefix_caching: bool = True
    decode_cap: bool = True  # at most max_num_seqs // pp decode rows in a plan; off only to measure what it brings
    decode_buckets: list[int] | None = None  # smaller row counts to pad decode batches to; null: on GPUs 8, 16, 24, ...


@dataclass(frozen=True)
class BalanceConfig:
    """Between replicas; at dp=1 nothing of this is in use."""

    share: str = "dynamic"  # dynamic: a row goes to the replica with most room; static: rows are dealt out in turn
    gate: str = "off"  # admit nobody while some replica has all seats taken (saturated) or all but one (near), or
    interval: int = 2  # but at every so many ticks (interval); off: whenever there is a seat
    patience: int = 64  # ticks for which a gate may hold somebody back
    lag: int = 4  # ticks by which replicas may be apart, and by which what they know of each other is late


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults for rows that say nothing. null: generation_config.json's value, else vLLM's default."""

    max_tokens: int | None = None  # null: until max_model_len
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None


@dataclass(frozen=True)
class WorkloadConfig:
    """A synthetic workload for `spmd.bench`: random token ids, uniform lengths from inclusive ranges."""

    name: str = "cpu"
    num_prompts: int = 64
    input_len: list[int] = field(default_factory=lambda: [64, 128])
    output_len: list[int] = field(default_factory=lambda: [32, 64])
    output_sigma: float = 0.0  # > 0: outputs are lognormal with this sigma, the range's geometric mean the median
    seed: int = 0


@dataclass(frozen=True)
class BenchConfig:
    """What the device can do at best, from which `spmd.bench` computes the floor. null: measured on a GPU."""

    bandwidth: float | None = None  # bytes/s, read and written together
    flops: float | None = None  # operations/s in the model's dtype


@dataclass(frozen=True)
class ProfileConfig:
    ticks: list[int] | None = None  # [a, b]: every rank traces ticks a to b - 1 into <run_dir>/profile; null: none


@dataclass(frozen=True)
class GuardConfig:
    """What ends a run whose ranks have drifted apart, died or gone silent."""

    enabled: bool = True
    timeout: float = 30.0  # seconds in which every surviving rank has ended, once one is dead, silent or different
    startup_timeout: float = 3600.0  # seconds that a rank may take to load its weights while the others wait


@dataclass(frozen=True)
class PreflightConfig:
    device_memory: float | None = None  # GiB of the smallest device, for `spmd.preflight` where there is none


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    input: str | None = None
    output: str | None = None
    output_order: str = "input"  # input: answers stand in input order at the end; completion: as they finished
    shard: list[int] | None = None  # [i, n]: only every n-th row from row i on, into an output of its own; null: all
    resume: str = "auto"  # auto: pass over rows done by earlier runs; retry_errors: not if in vain; fresh: over none
    device: str = "auto"  # auto, cpu, cuda
    run_dir: str | None = None  # logs and summary of this run; null: runs/<SLURM job id or start time>
    progress: bool = True


CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.load_format": ("auto", "safetensors", "dummy"),
    "model.attention_backend": ("auto", "flashinfer", "torch"),
    "model.decode_products": ("auto", "torch"),
    "scheduler.prefill": ("mixed", "exclusive"),
    "scheduler.policy": ("fcfs", "priority"),
    "balance.share": ("dynamic", "static"),
    "balance.gate": ("off", "saturated", "near", "interval"),
    "resume": ("auto", "fresh", "retry_errors"),
    "output_order": ("input", "completion"),
    "device": ("auto", "cpu", "cuda"),
}

AT_LEAST = {
    "topology.dp": 1,
    "topology.pp": 1,
    "topology.tp": 1,
    "scheduler.max_num_seqs": 1,
    "scheduler.max_num_batched_tokens": 1,
    "scheduler.block_size": 1,
    "scheduler.num_blocks": 2,
    "scheduler.async_depth": 0,
    "scheduler.lookahead": 0,
    "scheduler.prefill_batch": 1,
    "scheduler.prefill_spread": 0,
    "scheduler.prefill_min": 1,
    "balance.interval": 1,
    "balance.patience": 1,
    "balance.lag": 0,
    "model.max_model_len": 1,
    "workload.num_prompts": 1,
    "workload.output_sigma": 0,
    "bench.bandwidth": 1,
    "bench.flops": 1,
    "guard.timeout": 2,
    "guard.startup_timeout": 10,
}


def register_schema() -> None:
    """Give Hydra the schema under the name conf/config.yaml starts from.

    OmegaConf takes a frozen dataclass for a read-only node, which would refuse every override: the flag is lifted.
    """
    ConfigStore.instance().store(name="schema", node=_writable(OmegaConf.structured(Config)))


def from_hydra(cfg: DictConfig) -> Config:
    """The frozen Config of a composed Hydra configuration.

    Raises:
        ValueError: it has a key that is none of ours; with a + before it Hydra lets it pass.
    """
    try:
        config = OmegaConf.to_object(cfg)
    except FrozenInstanceError as error:
        raise ValueError(f"unknown key {str(error).split()[-1]}, added with +") from error
    assert isinstance(config, Config)
    return config


def check(config: Config, world_size: int) -> None:
    """Check what can be known without the model, on every rank alike.

    Raises:
        ValueError: one line that names the keys, their values and what to change.
    """
    for key, allowed in CHOICES.items():
        if (value := _get(config, key)) not in allowed:
            raise ValueError(f"{key}={value} is not one of {', '.join(allowed)}")
    for key, least in AT_LEAST.items():
        if (number := _get(config, key)) is not None and number < least:
            raise ValueError(f"{key}={number} must be at least {least}")
    t, s = config.topology, config.scheduler
    if t.dp * t.pp * t.tp != world_size:
        raise ValueError(
            f"topology.dp={t.dp} x topology.pp={t.pp} x topology.tp={t.tp} needs {t.dp * t.pp * t.tp} processes, "
            f"torchrun started {world_size}; start {t.dp * t.pp * t.tp} (launch/local.sh counts them for you) "
            f"or change the topology"
        )
    if s.max_num_seqs < t.pp:
        raise ValueError(
            f"scheduler.max_num_seqs={s.max_num_seqs} is less than topology.pp={t.pp}: a stage would never have a row "
            f"of its own; use scheduler.max_num_seqs >= {t.pp}"
        )
    if config.balance.gate == "near" and s.max_num_seqs == 1:
        raise ValueError(
            "balance.gate=near with scheduler.max_num_seqs=1 would always hold back: a replica with nobody running has "
            "all seats but one taken; use scheduler.max_num_seqs >= 2 or another gate"
        )
    if (shard := config.shard) is not None and not (len(shard) == 2 and 0 <= shard[0] < shard[1]):
        raise ValueError(f"shard={shard} must be null or two numbers [i, n] with 0 <= i < n: the i-th of n, from 0 on")
    if (ticks := config.profile.ticks) is not None and not (len(ticks) == 2 and 0 <= ticks[0] < ticks[1]):
        raise ValueError(f"profile.ticks={ticks} must be null or two numbers [a, b] with 0 <= a < b")
    for name in ("input_len", "output_len"):
        if not (len(ends := getattr(config.workload, name)) == 2 and 1 <= ends[0] <= ends[1]):
            raise ValueError(f"workload.{name}={ends} must be two numbers [a, b] with 1 <= a <= b")
    if not 0 < s.gpu_memory_utilization <= 1:
        raise ValueError(f"scheduler.gpu_memory_utilization={s.gpu_memory_utilization} must lie in (0, 1]")
    rows = decode_rows(config)
    if s.decode_buckets and not all(1 <= bucket <= rows for bucket in s.decode_buckets):
        raise ValueError(
            f"scheduler.decode_buckets={s.decode_buckets} must lie between 1 and {rows} "
            f"(max_num_seqs {s.max_num_seqs} // pp {t.pp})"
        )
    if s.max_num_batched_tokens is not None and s.max_num_batched_tokens < rows:
        raise ValueError(
            f"scheduler.max_num_batched_tokens={s.max_num_batched_tokens} is less than the {rows} rows of a decode "
            f"batch (max_num_seqs {s.max_num_seqs} // pp {t.pp}); raise it to at least {rows}"
        )


def warnings(config: Config) -> list[str]:
    """What is allowed but rarely meant."""
    t, s, told = config.topology, config.scheduler, []
    if t.dp == 1 and config.balance.gate != "off":
        told.append(f"balance.gate={config.balance.gate} does nothing with topology.dp=1: there is nobody to wait for")
    if s.decode_cap and s.max_num_seqs % t.pp and s.async_depth == 0:
        used = s.max_num_seqs // t.pp * t.pp
        told.append(
            f"scheduler.max_num_seqs={s.max_num_seqs} is no multiple of topology.pp={t.pp}: "
            f"at most {used} requests decode at once; {used} or {used + t.pp} wastes no seat"
        )
    return told


def decode_rows(config: Config) -> int:
    """B, the decode rows of a micro-batch: max_num_seqs // pp (vLLM-RBLN's decode cap)."""
    s = config.scheduler
    return s.max_num_seqs // config.topology.pp if s.decode_cap else s.max_num_seqs


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _writable(node: DictConfig) -> DictConfig:
    OmegaConf.set_readonly(node, None)
    if node._metadata.object_type is dict:
        OmegaConf.set_struct(node, False)  # model.overrides takes any key of config.json
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _writable(child)
    return node
