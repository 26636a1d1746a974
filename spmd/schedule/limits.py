"""What bounds a scheduler's plans, and what it counts."""

from dataclasses import dataclass


@dataclass
class Counters:
    """What the scheduler did, for the summary."""

    output_tokens: int = 0  # committed
    preemptions: int = 0
    queried_tokens: int = 0  # prompt tokens looked up in the prefix cache
    cached_tokens: int = 0  # of these, found


@dataclass(frozen=True)
class Limits:
    """How large a plan may grow; see `spmd.config.SchedulerConfig` for the keys."""

    max_num_seqs: int
    max_num_batched_tokens: int
    decode_rows: int  # B: decode rows of one plan
    slots: int  # N: micro-batches in the ring
    lookahead: int = 0  # plans in flight beyond these
    balanced: bool = True  # share the decodes equally among the slots
    exclusive: bool = False  # a plan is all prefill or all decode
    prefill_batch: int = 1
    prefill_spread: int = 0
    prefill_min: int = 1
    long_prompt: int = 0  # tokens from which a prompt far longer than others lets them go first; 0: none does
    by_priority: bool = False
    decode_buckets: tuple[int, ...] = ()
    mixed_buckets: tuple[int, ...] = ()
