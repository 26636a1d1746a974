"""Which configurations can't be, and which are rarely meant: all that is known without torch and transformers.

Launchers check that much before they start or submit anything.
"""

import json
from contextlib import suppress
from pathlib import Path

from spmd.config import Config, keys, value_of
from spmd.messages import show
from spmd.topology import split_layers


def check(config: Config, world_size: int) -> None:
    """Check what can be known without torch and transformers, on every rank alike.

    Raises:
        ValueError: one line that names the keys, their values and what to change.
    """
    _check_each(config)
    _check_processes(config, world_size)
    _check_lists(config)
    _check_scheduler(config)
    if (num_layers := _num_layers(config)) is not None:
        split_layers(num_layers, config.topology.pp, config.topology.layers)


def warnings(config: Config) -> list[str]:
    """What is allowed but rarely meant."""
    t, s, found = config.topology, config.scheduler, []
    if t.dp == 1 and config.balance.gate not in (None, "off"):
        found.append(f"balance.gate={config.balance.gate} does nothing with topology.dp=1: there is nobody to wait for")
    if s.decode_cap and s.max_num_seqs % t.pp and s.async_depth == 0:
        used = s.max_num_seqs // t.pp * t.pp
        found.append(
            f"scheduler.max_num_seqs={s.max_num_seqs} is no multiple of topology.pp={t.pp}: "
            f"at most {used} requests decode at once; {used} or {used + t.pp} wastes no seat"
        )
    return found


def decode_rows(config: Config) -> int:
    """B, the decode rows of a micro-batch: max_num_seqs // pp (vLLM-RBLN's decode cap)."""
    s = config.scheduler
    return s.max_num_seqs // config.topology.pp if s.decode_cap else s.max_num_seqs


def _check_each(config: Config) -> None:
    """What the schema says of single keys."""
    members = keys()
    for name, member in members.items():
        choices, value = member.metadata["choices"], value_of(config, name)
        if choices and value not in choices and not (value is None and member.default is None):
            raise ValueError(f"{name}={value} is not one of {', '.join(choices)}")
    for name, member in members.items():
        least = member.metadata["least"]
        if least is not None and (number := value_of(config, name)) is not None and number < least:
            raise ValueError(f"{name}={number} must be at least {least}")


def _check_processes(config: Config, world_size: int) -> None:
    t, s = config.topology, config.scheduler
    needed = t.dp * t.pp * t.tp
    if needed != world_size:
        raise ValueError(
            f"topology.dp={t.dp} x topology.pp={t.pp} x topology.tp={t.tp} needs {needed} processes, "
            f"torchrun started {world_size}; start {needed} (--nproc-per-node {needed} on one machine) "
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


def _check_lists(config: Config) -> None:
    given = [] if config.input is None else config.input
    if not isinstance(given, str | list) or not all(isinstance(path, str) for path in given):
        raise ValueError(f"input={show(given)} must be a file or a list of files, as in input=[a.jsonl,b.jsonl]")
    if (shard := config.shard) is not None and not (len(shard) == 2 and 0 <= shard[0] < shard[1]):
        raise ValueError(f"shard={shard} must be null or two numbers [i, n] with 0 <= i < n: the i-th of n, from 0 on")
    if (ticks := config.profile.ticks) is not None and not (len(ticks) == 2 and 0 <= ticks[0] < ticks[1]):
        raise ValueError(f"profile.ticks={ticks} must be null or two numbers [a, b] with 0 <= a < b")
    for name in ("input_len", "output_len"):
        if not (len(ends := value_of(config, f"workload.{name}")) == 2 and 1 <= ends[0] <= ends[1]):
            raise ValueError(f"workload.{name}={ends} must be two numbers [a, b] with 1 <= a <= b")


def _check_scheduler(config: Config) -> None:
    t, s, rows = config.topology, config.scheduler, decode_rows(config)
    if not 0 < s.gpu_memory_utilization <= 1:
        raise ValueError(f"scheduler.gpu_memory_utilization={s.gpu_memory_utilization} must lie in (0, 1]")
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


def _num_layers(config: Config) -> int | None:
    """As config.json of a model folder says; None if that doesn't: what is wrong with it, transformers will say."""
    values, m = {}, config.model
    with suppress(OSError, ValueError):
        values = json.loads((Path(m.path or "") / "config.json").read_bytes())
    found = ((values if isinstance(values, dict) else {}) | m.overrides).get("num_hidden_layers")
    return found if type(found) is int and found > 0 else None
