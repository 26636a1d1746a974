"""The shortest time a workload can take, from the shapes of model and workload and the rates of one device.

The model, per rank of a stage (1/tp of its weights, heads and cache; the slowest stage of the slowest replica counts,
as stages and replicas run side by side):

- Prefill is arithmetic: 2 operations a token and parameter that it uses, and attention's products. The head runs once a
  prompt. Weights and cache read meanwhile are not counted.
- Every request holds a seat from its first token to its last and gets one token a turn of the ring. So decode takes at
  least as many turns as all output tokens fill seats, and at least as many as the longest output has tokens.
- In a turn every stage runs pp micro-batches, each of which reads the stage's weights once: all but the embedding,
  which is a lookup; of experts those that the rows of a micro-batch touch, with `ep` a share of those that all
  replicas' rows do. Where so many rows make their products slower than that read, the products count.
- At every decode step a request's whole cache is read, as far as a layer's window goes.

These times add up: kernels run one after the other. Not counted: activations, sampling, communication, the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spmd.bench.rates import Rates
from spmd.model.cost import head_params, layer_bytes, layer_params, seen, touched_experts
from spmd.settings import Settings
from spmd.trace.account import Account

Rows = Sequence[tuple[int, int]]  # tokens of the prompt and of the output, row by row
UNKNOWN: Mapping[str, Any] = dict.fromkeys(  # what `figures` says of a workload that was stopped
    (
        *("floor_output_throughput", "floor_percent", "stage_floor_percent"),
        *("achieved_bandwidth", "device_bandwidth", "device_flops"),
    )
)


@dataclass(frozen=True)
class Work:
    """What one rank has at least to do."""

    weight_bytes: float  # read by all decode micro-batches together
    cache_bytes: float  # read by decode
    decode_flops: float  # products with weights
    prefill_flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def seconds(self, rates: Rates) -> float:
        decode = max(self.weight_bytes / rates.bandwidth, self.decode_flops / rates.flops)
        return decode + self.cache_bytes / rates.bandwidth + self.prefill_flops / rates.flops


def ranks_work(settings: Settings, rows: Rows) -> list[Work]:
    """The work of one rank of every stage of every replica; rows are dealt out to the replicas in turn."""
    dp, seats = settings.topology.dp, settings.scheduler.max_num_seqs
    dealt = [rows[replica::dp] for replica in range(dp)]
    return [
        _work(settings, stage, share, _turns(share, seats)) for share in dealt if share for stage in settings.stages
    ]


def figures(
    work: Sequence[Work], rates: Rates | None, seconds: float, output_tokens: int, accounts: Sequence[Account]
) -> dict[str, Any]:
    """What a run of `seconds` made of the device; without rates the floor is None.

    `achieved_bandwidth` is of the rank that has most to read: bytes a second, of what it has to read at least.
    `stage_floor_percent`: where the time of each stage went, see `shares_of`. `accounts`: one a stage.
    """
    floor = max(each.seconds(rates) for each in work) if rates else None
    return {
        "floor_output_throughput": output_tokens / floor if floor else None,
        "floor_percent": 100 * floor / seconds if floor else None,
        "stage_floor_percent": shares_of(work, rates, seconds, accounts) if rates else None,
        "achieved_bandwidth": max(each.bytes for each in work) / seconds,
        "device_bandwidth": rates.bandwidth if rates else None,
        "device_flops": rates.flops if rates else None,
    }


def shares_of(
    work: Sequence[Work], rates: Rates, seconds: float, accounts: Sequence[Account]
) -> list[dict[str, float]]:
    """Of each stage, in percent of `seconds` and in the mean of its ranks: its own floor, and what else the time was.

    `slower`: by how much more than their floor forwards and sampling took; below 0 if the rates are too low. The other
    parts are those of its account. All of a stage make 100. The floor of the run is that of the slowest rank.
    """
    shares = []
    for stage, account in enumerate(accounts):
        own = work[stage :: len(accounts)]
        floor = 100 * sum(each.seconds(rates) for each in own) / len(own) / seconds
        percent = account.percent()
        slower = percent.pop("forward") + percent.pop("sample") - floor
        shares.append({"floor": floor, "slower": slower} | percent)
    return shares


def lines(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The same for the table."""
    if figures["achieved_bandwidth"] is None:
        return []
    read = f"{figures['achieved_bandwidth'] / 1e9:,.1f} GB/s"
    if figures["floor_percent"] is None:
        return [("read", read)]
    return [
        ("floor", f"{figures['floor_output_throughput']:,.1f} tok/s", f"{figures['floor_percent']:.1f} % reached"),
        ("read", read, f"of {figures['device_bandwidth'] / 1e9:,.1f} GB/s"),
    ]


def _turns(rows: Rows, seats: int) -> float:
    """Turns of the ring that decode takes; a request's first token comes from its prompt."""
    decodes = [output - 1 for _, output in rows]
    return max(sum(decodes) / seats, max(decodes))


def _work(settings: Settings, stage: range, rows: Rows, turns: float) -> Work:
    arch, pp, tp = settings.arch, settings.topology.pp, settings.topology.tp
    prompt, decoded = sum(tokens for tokens, _ in rows), sum(output - 1 for _, output in rows)
    head = head_params(arch) if arch.num_layers - 1 in stage else 0
    sharing = settings.topology.dp if settings.topology.ep else 1  # replicas that share the experts of all their rows
    touched = touched_experts(arch, sharing * decoded / (turns * pp)) / sharing if turns else 0.0
    read = sum(layer_bytes(arch, layer, touched) for layer in stage) + head * arch.dtype.itemsize
    used = sum(layer_params(arch, layer, arch.experts_per_token) for layer in stage)
    attention = 4 * arch.num_heads * arch.head_dim  # operations of one query with one key and value
    layers = [(arch.windows[layer], arch.cache_spec(layer).token_bytes) for layer in stage]
    pairs = sum(seen(window, tokens) for window, _ in layers for tokens, _ in rows)
    cached = sum(kv * (seen(w, tokens + output - 1) - seen(w, tokens)) for w, kv in layers for tokens, output in rows)
    return Work(
        weight_bytes=turns * pp * read / tp,
        cache_bytes=cached / tp,
        decode_flops=2 * decoded * (used + head) / tp,
        prefill_flops=(2 * (prompt * used + len(rows) * head) + attention * pairs) / tp,
    )
