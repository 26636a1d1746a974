"""Arithmetic of ranks and layers."""

from collections.abc import Iterator
from itertools import combinations, pairwise, product

import pytest

from spmd.topology import TIE, Topology, split_layers

SIZES = list(product((1, 2, 3), repeat=3))  # dp, pp, tp


def everyone(dp: int, pp: int, tp: int) -> list[Topology]:
    return [Topology(dp, pp, tp, rank) for rank in range(dp * pp * tp)]


@pytest.mark.parametrize(("dp", "pp", "tp"), SIZES)
def test_ranks_and_places_are_one_to_one(dp: int, pp: int, tp: int) -> None:
    world = everyone(dp, pp, tp)
    places = [(t.dp_rank, t.pp_rank, t.tp_rank) for t in world]
    assert places == list(product(range(dp), range(pp), range(tp))), "tp innermost, dp outermost"
    assert [t.rank_of(*place) for t, place in zip(world, places, strict=True)] == list(range(dp * pp * tp))
    assert {t.world_size for t in world} == {dp * pp * tp}


@pytest.mark.parametrize(("dp", "pp", "tp"), SIZES)
def test_each_replica_has_one_leader_on_its_last_stage(dp: int, pp: int, tp: int) -> None:
    world = everyone(dp, pp, tp)
    leaders = [t for t in world if t.is_leader]
    assert [(t.dp_rank, t.pp_rank, t.tp_rank) for t in leaders] == [(d, pp - 1, 0) for d in range(dp)]
    assert all(t.leader == leaders[t.dp_rank].rank for t in world)
    assert [t.is_first_stage for t in world] == [t.pp_rank == 0 for t in world]
    assert [t.is_last_stage for t in world] == [t.pp_rank == pp - 1 for t in world]


@pytest.mark.parametrize(("dp", "pp", "tp"), SIZES)
def test_neighbouring_stages_know_each_other(dp: int, pp: int, tp: int) -> None:
    world = everyone(dp, pp, tp)
    for t in world:
        if not t.is_last_stage:
            peer = world[t.next_stage]
            assert (peer.dp_rank, peer.pp_rank, peer.tp_rank) == (t.dp_rank, t.pp_rank + 1, t.tp_rank)
            assert peer.previous_stage == t.rank


def test_groups_partition_the_world() -> None:
    topology = Topology(dp=2, pp=2, tp=2)
    assert topology.replicas() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert topology.stages() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Topology().replicas() == Topology().stages() == [[0]]


def test_a_rank_is_shown_by_its_place() -> None:
    assert str(Topology(2, 3, 2, rank=9)) == "dp1/pp1/tp1"


@pytest.mark.parametrize(
    ("num_layers", "pp", "counts"),
    [
        (8, 1, [8]),
        (8, 4, [2, 2, 2, 2]),
        (7, 2, [4, 3]),  # no stage between: the first rather than the last, which also samples
        (7, 3, [2, 3, 2]),
        (8, 3, [3, 3, 2]),
        (10, 4, [2, 3, 3, 2]),
        (11, 4, [3, 3, 3, 2]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_a_remainder_goes_to_the_middle_stages(num_layers: int, pp: int, counts: list[int]) -> None:
    assert split_layers(num_layers, pp) == counts


@pytest.mark.parametrize(
    ("num_layers", "pp", "head_cost", "counts"),
    [
        (36, 1, 1.9, [36]),
        (36, 2, 1.9, [19, 17]),
        (36, 4, 1.9, [9, 10, 9, 8]),
        (36, 4, 3.0, [9, 10, 10, 7]),
        (12, 2, 1.0, [6, 6]),  # 7, 5 costs the same
        (12, 2, 1.05, [6, 6]),  # and about the same
        (12, 2, 1.2, [7, 5]),
        (4, 3, 9.0, [1, 2, 1]),  # no stage without a layer
    ],
)
def test_the_head_counts_as_layers_of_the_last_stage(
    num_layers: int, pp: int, head_cost: float, counts: list[int]
) -> None:
    assert split_layers(num_layers, pp, head_cost=head_cost) == counts


def every_split(num_layers: int, pp: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), pp - 1):
        yield [end - start for start, end in pairwise((0, *cuts, num_layers))]


@pytest.mark.parametrize("head_cost", [0.0, 0.3, 0.95, 1.5, 1.9, 3.2, 8.0])
def test_no_split_has_a_faster_slowest_stage(head_cost: float) -> None:
    def cost(counts: list[int]) -> float:
        return max(*counts, counts[-1] + head_cost)

    for num_layers, pp in product(range(2, 13), range(2, 6)):
        if num_layers >= pp:
            counts = split_layers(num_layers, pp, head_cost=head_cost)
            assert sum(counts) == num_layers and cost(counts) <= min(map(cost, every_split(num_layers, pp))) + TIE


def test_layers_can_be_given() -> None:
    given = [1, 5, 1]
    assert split_layers(7, 3, given) == split_layers(7, 3, given, head_cost=4.0) == given


@pytest.mark.parametrize(
    ("layers", "stages", "total"), [([3, 4], 2, 7), ([2, 2, 2], 3, 6), ([4, 4, -1], 3, 7), ([0, 4, 3], 3, 7)]
)
def test_a_wrong_split_is_refused_with_its_numbers(layers: list[int], stages: int, total: int) -> None:
    with pytest.raises(ValueError) as error:
        split_layers(7, 3, layers)
    assert f"{layers} has {stages} stages and {total} layers" in str(error.value)
    assert "3 counts >= 1" in str(error.value) and "7 layers" in str(error.value)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"topology\.pp=4 needs at least 4 layers, the model has 3"):
        split_layers(3, 4)
