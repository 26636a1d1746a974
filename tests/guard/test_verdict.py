"""What is said of ranks that can't go on, from what is known of them."""

from spmd.guard.verdict import RankStatus, judge

SILENCE, STILLNESS = 3.0, 120.0
ALIKE = {tick: (tick, 1, 2, 3) for tick in range(5, 9)}
PAIRS = [[0, 1], [2, 3]]


def sights(**changes: dict[str, object]) -> list[RankStatus]:
    """Four ranks at work, all well but for what is changed: rank_2={"silent": 9}."""
    made = [RankStatus(rank, f"place {rank}", 0.1, 0.2, 8, dict(ALIKE)) for rank in range(4)]
    for rank, values in changes.items():
        for name, value in values.items():
            setattr(made[int(rank.removeprefix("rank_"))], name, value)
    return made


def told(replicas: list[list[int]] = PAIRS, **changes: dict[str, object]) -> str | None:
    verdict = judge(sights(**changes), replicas, SILENCE, STILLNESS)
    return verdict and verdict.message


def test_all_is_well() -> None:
    assert told() is None
    assert told(rank_0={"still": 500.0}) is None, "somebody else computes"
    assert told(rank_1={"silent": 50.0, "done": True}) is None, "one that is done needs no sign of life"
    assert told(rank_1={"trace": {9: (1, 2, 3, 4)}, "tick": 9}) is None, "one may be ahead"


def test_a_lost_rank_is_named_with_its_last_tick() -> None:
    verdict = judge(sights(rank_2={"silent": 4.0, "tick": 7}), PAIRS, SILENCE, STILLNESS)
    assert verdict is not None and verdict.lost == (2,)
    assert verdict.message.startswith("rank 2 (place 2) gave no sign of life for 4 s, at tick 7: killed, ")


def test_of_two_ranks_that_differ_both_are_named() -> None:
    other = ALIKE | {7: (7, 1, 9, 9), 8: (8, 9, 9, 9)}
    message = told(rank_3={"trace": other})
    assert message is not None
    assert "at tick 7 rank 2 (place 2) and rank 3 (place 3) differ, first in 'positions', how many tokens" in message


def test_of_more_ranks_the_odd_one_is_named_the_leader_too() -> None:
    other = ALIKE | {7: (9, 9, 9, 9), 8: (9, 9, 9, 9)}
    for rank in range(4):
        message = told([[0, 1, 2, 3]], **{f"rank_{rank}": {"trace": other}})
        assert message is not None
        assert (
            f"at tick 7 rank {rank} (place {rank}) differs from the other 3 of its replica, first in 'tokens'"
            in message
        )


def test_a_difference_comes_before_the_death_it_led_to() -> None:
    verdict = judge(sights(rank_0={"trace": ALIKE | {8: (0, 0, 0, 0)}, "silent": 5.0}), PAIRS, SILENCE, STILLNESS)
    assert verdict is not None and verdict.lost == (0,)
    assert "drifted apart: at tick 8" in verdict.message


def test_a_standstill_of_all() -> None:
    still = {f"rank_{rank}": {"still": 130.0 + rank, "tick": 8 - rank} for rank in range(4)}
    assert told(**still) == (
        "no rank has moved for 130 s, nor do their plans differ; last ticks by rank: 0: 8, 1: 7, 2: 6, 3: 5"
    )
