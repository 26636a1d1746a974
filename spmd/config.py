"""Every key of the configuration: its default, choices, least value and help stand together here, and nowhere else.

`Config` is the schema Hydra validates against (unknown keys and wrong types are errors) and the frozen value that a
start begins with. Names are vLLM's where vLLM has one. `spmd.config_checks` checks what is said here, `spmd.settings`
works out what is null, and docs/configuration.md is made of it (`make docs`).
"""

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any


def key(
    default: Any, help: str, *, choices: Sequence[str] = (), least: float | None = None, kind: str | None = None
) -> Any:
    """A field of the schema.

    Args:
        default: the value or, of a list or a mapping, what makes one.
        help: what the key does and, where its default is null, what null comes to.
        choices: the values that a text may have; empty: any.
        least: the smallest number allowed.
        kind: what values there are, where the type, of those that OmegaConf knows, can't say it.
    """
    metadata = {"help": help, "choices": tuple(choices), "least": least, "kind": kind}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Which model runs, and what computes it."""

    path: str | None = key(None, "A folder with config.json (and safetensors), or a Hub id. Must be given.")
    dtype: str = key(
        "auto",
        "What is computed in. auto: the checkpoint's dtype, but float32 on CPUs that multiply in it by emulation.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    load_format: str = key(
        "auto",
        "dummy: random weights, of which only config.json is needed; auto, safetensors: the checkpoint's files.",
        choices=("auto", "safetensors", "dummy"),
    )
    max_model_len: int | None = key(
        None,
        "Tokens of a request, prompt and output. null: max_position_embeddings, with YaRN factor x original.",
        least=1,
    )
    tokenizer: str | None = key(None, "A folder or Hub id to take the tokenizer from. null: model.path.")
    revision: str | None = key(None, "Branch, tag or commit of a Hub id. null: the main branch.")
    overrides: dict[str, Any] = key(dict, "Replaces keys of config.json.")
    attention_backend: str = key(
        "auto",
        "What computes a forward. flashinfer: FlashInfer and kernels of ours, on GPUs; torch: plain PyTorch, "
        "everywhere; auto: flashinfer where it can run.",
        choices=("auto", "flashinfer", "torch"),
    )
    enforce_eager: bool = key(
        False, "On GPUs, launch decode batches kernel by kernel instead of replaying them as CUDA graphs."
    )
    decode_products: str = key(
        "auto",
        "Products of decode batches within CUDA graphs. auto: by a kernel of ours where that is faster (Hopper); "
        "torch: by cuBLAS.",
        choices=("auto", "torch"),
    )


@dataclass(frozen=True)
class TopologyConfig:
    """How `dp * pp * tp` processes share the work."""

    dp: int = key(1, "Replicas: copies of the model that share the rows (data parallelism).", least=1)
    pp: int = key(1, "Stages of the pipeline, each with some of the layers.", least=1)
    tp: int = key(1, "Ranks of a stage, each with a slice of its layers (tensor parallelism).", least=1)
    layers: list[int] | None = key(
        None, "Layers of each stage, as a list of counts. null: split so that the slowest stage is as fast as can be."
    )
    ep: bool = key(False, "Each expert lies whole on one of its stage's dp * tp ranks; replicas then run in lockstep.")


@dataclass(frozen=True)
class SchedulerConfig:
    """Which requests run in a tick, and how much memory they have."""

    max_num_seqs: int = key(128, "Running requests of a replica: its seats.", least=1)
    max_num_batched_tokens: int | None = key(
        None, "Tokens of one plan. null: 8192 on GPUs, else 2048, and at least the rows of a decode batch.", least=1
    )
    block_size: int | None = key(None, "Tokens of one KV block. null: 64 with FlashInfer, else 16.", least=1)
    num_blocks: int | None = key(
        None, "KV blocks of a replica. null: what memory has room for, and no more than all seats can use.", least=2
    )
    gpu_memory_utilization: float = key(
        0.9, "Share of a GPU's memory for weights and KV cache, above 0 and at most 1; activations take the rest."
    )
    async_depth: int = key(0, "Micro-batches in flight beyond topology.pp.", least=0)
    lookahead: int | None = key(
        None, "Ticks by which a commit lags, so that plans needn't wait for it. null: 1 on GPUs or if pp > 1, else 0.",
        least=0,
    )  # fmt: skip
    prefill: str = key(
        "mixed",
        "mixed: chunks of prompts ride along with decodes; exclusive: a plan is all prefill or all decode.",
        choices=("mixed", "exclusive"),
    )
    prefill_batch: int = key(1, "Prompts of one plan with prefill=exclusive.", least=1)
    prefill_spread: int | None = key(
        None,
        "With prefill=mixed, the number of plans over which waiting prompt tokens are spread; 0: as many tokens in a "
        "plan as fit. null: 4 * pp in a pipeline, else 0.",
        least=0,
    )
    prefill_min: int | None = key(
        None,
        "Prompt tokens of a plan below which they aren't spread further. null: 512 on GPUs, else a block.",
        least=1,
    )
    long_prefill_token_threshold: int | None = key(
        None,
        "Prompts of more tokens wait until few others are left, if they are 16 times as long as those usually are; at "
        "most 64 rows do, and none with policy=priority. 0: none. null: max_num_batched_tokens.",
        least=0,
    )
    policy: str = key(
        "longest",
        "Which rows come first. longest: of the next ones, as many as 4 times all seats, those with most max_tokens, "
        "so that the last to run are short; fcfs: in the order of the input; priority: by the rows' priority (smaller "
        "is earlier), of the 2 * max_num_seqs that a replica has read ahead.",
        choices=("longest", "fcfs", "priority"),
    )  # fmt: skip
    prefix_caching: bool = key(True, "Prompts that begin alike share the KV blocks of what they have in common.")
    decode_cap: bool = key(
        True, "At most max_num_seqs // pp decode rows in a plan; off only to measure what that brings."
    )
    decode_buckets: list[int] | None = key(
        None, "Smaller row counts to which decode batches may be padded. null: on GPUs 8, 16, 24, ..., else none."
    )
    mixed_buckets: list[int] | None = key(
        None,
        "Row counts to which plans with prompts may be padded. null: on GPUs those whose kernels take less time than "
        "their launches, by the size of a layer; such plans run as CUDA graphs.",
    )


@dataclass(frozen=True)
class BalanceConfig:
    """Between replicas; at dp=1 nothing of this is in use."""

    share: str = key(
        "dynamic",
        "dynamic: the next row goes to the replica that lacks most; static: rows are dealt out in turn.",
        choices=("dynamic", "static"),
    )
    gate: str | None = key(
        None,
        "When replicas admit new requests. off: whenever there is a seat; saturated: not while some replica has all "
        "its seats taken; near: all but one; interval: at every balance.interval-th tick. null: saturated where "
        "replicas share experts, as their prompts hold each other up there, else off.",
        choices=("off", "saturated", "near", "interval"),
    )
    interval: int = key(2, "Ticks from one admission to the next with gate=interval.", least=1)
    patience: int = key(64, "Ticks for which a gate may hold somebody back at most.", least=1)
    lag: int = key(
        4, "Ticks by which replicas may be apart, and by which what they know of each other is late.", least=0
    )


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults for rows that say nothing. null: generation_config.json's value, else vLLM's default."""

    max_tokens: int | None = key(None, "Tokens of an output at most. null: until model.max_model_len.")
    min_tokens: int | None = key(None, "Tokens before which nothing ends an output.")
    temperature: float | None = key(None, "0: greedy, the most likely token.")
    top_k: int | None = key(None, "Draw among so many tokens; 0 or -1: all.")
    top_p: float | None = key(None, "Draw among the likeliest tokens that have this share together.")
    min_p: float | None = key(None, "Draw among tokens at least this likely, relative to the likeliest.")
    repetition_penalty: float | None = key(None, "Divides the scores of tokens in prompt or output, if above 1.")
    presence_penalty: float | None = key(None, "Subtracted from the scores of tokens in the output.")
    frequency_penalty: float | None = key(None, "The same, times how often they stand there.")
    n: int | None = key(None, "Choices of a row.")
    seed: int | None = key(None, "Of the random numbers, together with the row's custom_id, choice and position.")
    stop: list[str] | None = key(None, "Strings that end an output.")
    stop_token_ids: list[int] | None = key(None, "Token ids that end an output.")
    ignore_eos: bool | None = key(None, "Go on behind the model's end-of-sequence token.")
    logprobs: int | None = key(None, "Log-probabilities of so many likeliest tokens, beside the sampled one's.")
    skip_special_tokens: bool | None = key(None, "Leave special tokens out of the text.")
    include_stop_str_in_output: bool | None = key(None, "Keep in the text what ended it.")


@dataclass(frozen=True)
class WorkloadConfig:
    """A synthetic workload for `spmd.bench`: lengths from inclusive ranges; greedy without sampling.temperature."""

    name: str = key("cpu", "What the figures call it.")
    num_prompts: int = key(64, "Rows.", least=1)
    input_len: list[int] = key(lambda: [64, 128], "Tokens of a prompt: [least, most].")
    output_len: list[int] = key(lambda: [32, 64], "Tokens of an output: [least, most].")
    output_sigma: float = key(
        0.0, "Above 0, outputs are lognormal with this sigma and the range's geometric mean as median.", least=0
    )
    seed: int = key(0, "Of lengths and tokens.")
    text: bool = key(
        False,
        "Chat rows of made-up English, from a file in `run_dir` to another one, as `spmd.generate` answers them. "
        "It takes a model with a tokenizer and a chat template. false: random token ids, from memory.",
    )


@dataclass(frozen=True)
class BenchConfig:
    """What the device can do at best, from which `spmd.bench` computes the floor. null: measured on a GPU."""

    bandwidth: float | None = key(None, "Bytes a second, read and written together.", least=1)
    flops: float | None = key(None, "Operations a second in the model's dtype.", least=1)


@dataclass(frozen=True)
class ProfileConfig:
    """A look inside a few ticks."""

    ticks: list[int] | None = key(
        None, "[a, b]: every rank traces ticks a to b - 1 into <run_dir>/profile. null: none."
    )


@dataclass(frozen=True)
class GuardConfig:
    """What ends a run whose ranks have drifted apart, died or gone silent."""

    enabled: bool = key(True, "Off, only signals are passed on.")
    timeout: float = key(
        30.0, "Seconds in which every surviving rank has ended, once one is dead, silent or different.", least=2
    )
    startup_timeout: float = key(
        3600.0, "Seconds that a rank may take to load its weights while the others wait.", least=10
    )


@dataclass(frozen=True)
class PreflightConfig:
    """For `spmd.preflight` alone."""

    device_memory: float | None = key(None, "GiB of the smallest device. null: what this machine's GPUs have.")


@dataclass(frozen=True)
class Config:
    """All keys; those of a section stand under its name."""

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
    input: Any = key(
        None,
        "The rows: a file, a pattern of names, a list of such, or - for standard input. JSON, one object a line or an "
        "array of objects, perhaps compressed; or tables: Parquet, Arrow, a saved dataset, hf://datasets/OWNER/NAME.",
        kind="text or list of texts",
    )
    input_column: str | None = key(
        None, "Of tables, the column that holds the prompts. null: the one called messages, prompt or body."
    )
    output: str | None = key(None, "The file of answers: JSON lines, or with the ending .parquet a table of them.")
    errors: str | None = key(None, "A file of those answers that are errors, beside the output. null: none.")
    input_workers: int | None = key(
        None,
        "Processes a node that tokenize rows ahead. null: four a rank, at most half the cores ranks leave.",
        least=1,
    )
    output_order: str = key(
        "input", "How answers stand at the end: in input order, or as they finished.", choices=("input", "completion")
    )
    shard: list[int] | None = key(
        None, "[i, n]: only every n-th row from row i on, into an output of its own. null: all rows."
    )
    resume: str = key(
        "auto",
        "auto: pass over all rows that earlier runs did; retry_errors: not over those that failed; fresh: over none.",
        choices=("auto", "fresh", "retry_errors"),
    )
    device: str = key("auto", "auto: a GPU for each rank where there is one.", choices=("auto", "cpu", "cuda"))
    run_dir: str | None = key(
        None, "Folder of logs and configuration. null: runs/<SLURM job id, or start time and process>."
    )
    progress: bool = key(True, "Show on rank 0 how far the run is.")
    trace: bool = key(
        False,
        "Every rank records what it does in each tick, in <run_dir>/trace (120 bytes a tick, 160 on GPUs); "
        "python -m spmd.report RUN_DIR makes a page of it.",
    )


def sections() -> dict[str, type]:
    """The schema of each section, by its name."""
    return {name: type(value) for name, value in vars(Config()).items() if is_dataclass(value)}


def keys() -> dict[str, Field[Any]]:
    """The field of every key, by its dotted name, in the order of the schema."""
    nested = {f"{name}.{member.name}": member for name, section in sections().items() for member in fields(section)}
    return nested | {member.name: member for member in fields(Config) if member.metadata}


def value_of(config: Config, name: str) -> Any:
    """The value of a key, given its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
