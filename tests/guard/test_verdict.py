"""What is said of ranks that can't go on, from what is known of them."""

from collections.abc import Mapping

from spmd.guard.verdict import RankStatus, judge

SILENCE, STALL = 3.0, 120.0
ALIKE = {tick: (tick, 1, 2, 3) for tick in range(5, 9)}
PAIRS = [[0, 1], [2, 3]]


Changes = Mapping[str, object]


def statuses(changes: Mapping[int, Changes]) -> list[RankStatus]:
    """Four ranks at work, all well but for what is changed: {2: {"silent": 9}}."""
    made = [RankStatus(rank, f"place {rank}", 0.1, 0.2, 8, dict(ALIKE)) for rank in range(4)]
    for rank, values in changes.items():
        for name, value in values.items():
            setattr(made[rank], name, value)
    return made


def message(changes: Mapping[int, Changes], replicas: list[list[int]] = PAIRS) -> str | None:
    verdict = judge(statuses(changes), replicas, SILENCE, STALL)
    return verdict.message if verdict else None


def test_all_is_well() -> None:
    assert message({}) is None
    assert message({0: {"stalled": 500.0}}) is None, "somebody else computes"
    assert message({1: {"silent": 50.0, "done": True}}) is None, "one that is done needs no sign of life"
    assert message({1: {"trace": {9: (1, 2, 3, 4)}, "tick": 9}}) is None, "one may be ahead"


def test_a_lost_rank_is_named_with_its_last_tick() -> None:
    verdict = judge(statuses({2: {"silent": 4.0, "tick": 7}}), PAIRS, SILENCE, STALL)
    assert verdict is not None and verdict.lost == (2,)
    assert verdict.message.startswith("rank 2 (place 2) gave no sign of life for 4 s, at tick 7: killed, ")


def test_of_two_ranks_that_differ_both_are_named() -> None:
    other = ALIKE | {7: (7, 1, 9, 9), 8: (8, 9, 9, 9)}
    found = message({3: {"trace": other}})
    assert found is not None
    assert "at tick 7 rank 2 (place 2) and rank 3 (place 3) differ, first in 'positions', how many tokens" in found


def test_of_more_ranks_the_odd_one_is_named_the_leader_too() -> None:
    other = ALIKE | {7: (9, 9, 9, 9), 8: (9, 9, 9, 9)}
    for rank in range(4):
        found = message({rank: {"trace": other}}, [[0, 1, 2, 3]])
        assert found is not None
        assert (
            f"at tick 7 rank {rank} (place {rank}) differs from the other 3 of its replica, first in 'tokens'" in found
        )


def test_a_difference_comes_before_the_death_it_led_to() -> None:
    verdict = judge(statuses({0: {"trace": ALIKE | {8: (0, 0, 0, 0)}, "silent": 5.0}}), PAIRS, SILENCE, STALL)
    assert verdict is not None and verdict.lost == (0,)
    assert "drifted apart: at tick 8" in verdict.message


def test_a_standstill_of_all() -> None:
    stalled = {rank: {"stalled": 130.0 + rank, "tick": 8 - rank} for rank in range(4)}
    assert message(stalled) == (
        "no rank has moved for 130 s, nor do their plans differ; last ticks by rank: 0: 8, 1: 7, 2: 6, 3: 5"
    )
