"""What keys of the scheduler come to that are null: it depends on the kind of device, cuda or cpu, and on others."""

from spmd.config import Config, decode_rows


def lookahead(config: Config, device: str) -> int:
    """Ticks a commit lags: one where a GPU would wait for its host, or a first stage for the last one's packet."""
    chosen = config.scheduler.lookahead
    return chosen if chosen is not None else int(device == "cuda" or config.topology.pp > 1)


def decode_buckets(config: Config, device: str) -> list[int]:
    """Row counts a decode batch may be padded to, largest first. A GPU gets a CUDA graph of each."""
    rows, chosen = decode_rows(config), config.scheduler.decode_buckets
    if chosen is None:
        chosen = _even_buckets(rows) if device == "cuda" else []
    return sorted({rows, *chosen}, reverse=True)


def _even_buckets(most: int) -> list[int]:
    """Row counts below `most`: by eights to 64, from there on by a quarter of the power of two below."""
    counts, rows = [], 8
    while rows < most:
        counts.append(rows)
        rows += max(8, 2 ** (rows.bit_length() - 3))
    return counts


def max_num_batched_tokens(config: Config, device: str) -> int:
    """Tokens of one plan. On GPUs enough that a forward with prompts takes longer than its launches."""
    chosen = config.scheduler.max_num_batched_tokens
    return chosen or max(8192 if device == "cuda" else 2048, decode_rows(config))


def block_size(config: Config, device: str) -> int:
    """Tokens of one KV block. FlashInfer's decode reads blocks of 64 4 to 8 % faster than blocks of 16 (one H200)."""
    return config.scheduler.block_size or (64 if device == "cuda" else 16)


def prefill_min(config: Config, device: str) -> int:
    """Prompt tokens of a plan at least. A GPU launches a forward with prompts kernel by kernel: make it worth that."""
    return config.scheduler.prefill_min or (512 if device == "cuda" else 1)


def prefill_spread(config: Config) -> int:
    """Plans over which waiting prompt tokens are spread; a pipeline needs micro-batches of about equal time."""
    if config.scheduler.prefill_spread is not None:
        return config.scheduler.prefill_spread
    return 4 * config.topology.pp if config.topology.pp > 1 else 0
