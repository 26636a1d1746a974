"""Where a rank stands: rank <-> (dp, pp, tp), its peers, and which layers its stage owns. Pure arithmetic.

`rank = (dp_rank * pp + pp_rank) * tp + tp_rank`: tp innermost (its all-reduces want the fastest links), dp outermost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TIE = 0.1  # layers


@dataclass(frozen=True)
class Topology:
    """The place of one rank in a world of `dp * pp * tp` ranks."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    rank: int = 0

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.pp * self.tp)

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp % self.pp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_leader(self) -> bool:
        """The leader of a replica (last stage, tp 0) samples, detokenises, decides stops and writes the answers."""
        return self.rank == self.leader

    @property
    def leader(self) -> int:
        return self.rank_of(self.dp_rank, self.pp - 1, 0)

    def rank_of(self, dp_rank: int, pp_rank: int, tp_rank: int) -> int:
        return (dp_rank * self.pp + pp_rank) * self.tp + tp_rank

    @property
    def previous_stage(self) -> int:
        """Rank that sends hidden states to this one (same dp and tp rank)."""
        return self.rank_of(self.dp_rank, self.pp_rank - 1, self.tp_rank)

    @property
    def next_stage(self) -> int:
        """Rank that this one sends hidden states to (same dp and tp rank)."""
        return self.rank_of(self.dp_rank, self.pp_rank + 1, self.tp_rank)

    def replicas(self) -> list[list[int]]:
        """Ranks of each replica, by dp rank."""
        size = self.pp * self.tp
        return [list(range(d * size, (d + 1) * size)) for d in range(self.dp)]

    def stages(self) -> list[list[int]]:
        """Ranks of each tensor-parallel group: one stage of one replica."""
        return [list(range(first, first + self.tp)) for first in range(0, self.world_size, self.tp)]

    def __str__(self) -> str:
        return f"dp{self.dp_rank}/pp{self.pp_rank}/tp{self.tp_rank}"


def split_layers(num_layers: int, pp: int, layers: Sequence[int] | None = None, head_cost: float = 0.0) -> list[int]:
    """How many layers each stage has, such that the slowest stage is as fast as can be.

    The last stage also pays for the head: `head_cost`, in layers. The embedding is a lookup and costs the first one
    nothing. Among splits of equal cost the most even one is taken; a remainder goes to the middle stages, then to the
    first, then to the last. `layers` overrides with one count a stage.

    Raises:
        ValueError: fewer layers than stages, or an override of wrong length or sum.
    """
    if num_layers < pp:
        raise ValueError(f"topology.pp={pp} needs at least {pp} layers, the model has {num_layers}")
    if layers is None:
        return _cheapest(num_layers, pp, head_cost)
    counts = list(layers)
    if len(counts) != pp or sum(counts) != num_layers or min(counts) < 1:
        raise ValueError(
            f"topology.layers={counts} has {len(counts)} stages and {sum(counts)} layers; "
            f"it must list {pp} counts >= 1 (topology.pp) that sum to the model's {num_layers} layers"
        )
    return counts


def _cheapest(num_layers: int, pp: int, head_cost: float) -> list[int]:
    """The counts `split_layers` chooses. Costs no further apart than TIE are equal: `head_cost` is an estimate."""

    def cost(counts: list[int]) -> float:
        return max(*counts, counts[-1] + head_cost)

    if pp == 1:
        return [num_layers]
    candidates = [[*_even(num_layers - last, pp - 1), last] for last in range(1, num_layers - pp + 2)]
    best = min(map(cost, candidates))
    good = [counts for counts in candidates if cost(counts) <= best + TIE]
    return min(good, key=lambda counts: sum(count**2 for count in counts))


def _even(num_layers: int, stages: int) -> list[int]:
    """Counts of the stages before the last: a remainder goes to all but the first."""
    counts = [num_layers // stages] * stages
    by_preference = [*range(1, stages), 0]
    for stage in by_preference[: num_layers % stages]:
        counts[stage] += 1
    return counts
