"""Rows that may run longest come first, as far as a window reaches."""

import random
from collections.abc import Callable, Iterator

import pytest

from spmd.bench.balance import make_job
from spmd.bench.simulation import Fleet
from spmd.schedule import longest_first as room
from spmd.schedule.balance import Rules
from spmd.schedule.longest_first import SEATS_AHEAD, longest_first


def ordered(lengths: list[int], seats: int) -> list[int]:
    rows = longest_first(enumerate(lengths), lambda row: row[1], lambda row: 1, seats)
    return [place for place, _ in rows]


def test_equal_rows_and_all_without_seats_come_as_they_are() -> None:
    assert ordered([7] * 50, 4) == [*range(50)]
    assert ordered([3, 9, 1, 5] * 10, 0) == [*range(40)]


def test_as_soon_as_rows_differ_the_longest_comes_first_and_equal_ones_in_order() -> None:
    assert ordered([3, 3, 9, 1, 9, 5, 2], 8) == [0, 1, 2, 4, 5, 6, 3]


@pytest.mark.parametrize("seed", range(20))
def test_each_comes_once_and_few_are_read_before_the_first_is_given(seed: int) -> None:
    rng = random.Random(seed)
    lengths, seats = [rng.randrange(1, 99) for _ in range(rng.randrange(400))], rng.randrange(1, 20)
    read: list[int] = []

    def source() -> Iterator[int]:
        for length in lengths:
            read.append(length)
            yield length

    given: list[int] = []
    for row in longest_first(source(), lambda length: length, lambda length: 1, seats):
        assert len(read) <= len(given) + 1 + min(SEATS_AHEAD * seats, seats + len(given))
        given.append(row)
    assert sorted(given) == sorted(lengths)
    last = given[-min(seats, len(given) - 1) :] if len(given) > 1 else []
    assert last == sorted(last, reverse=True)
    if len(given) > 10 * seats:
        assert sum(last) / len(last) < sum(given) / len(given) / 2, "those that run last are short"


def test_rows_without_a_length_wait_for_none() -> None:
    rows: list[int | None] = [5, 7, None, 9, None]
    assert list(longest_first(rows, lambda row: row, lambda row: 1, 8)) == [5, None, None, 9, 7]


def test_a_window_holds_few_bytes_whatever_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_BYTES", 100)
    held = most = 0

    def source() -> Iterator[int]:
        nonlocal held, most
        for length in range(1, 200):
            held += 30
            most = max(most, held)
            yield length

    for _ in longest_first(source(), lambda length: length, lambda length: 30, 50):
        held -= 30
    assert most <= 100 + 2 * 30


@pytest.mark.parametrize("dp", [1, 2])
def test_a_file_of_ragged_rows_takes_few_ticks_more_than_its_tokens_fill(dp: int) -> None:
    rng, seats = random.Random(0), 16
    lengths = [rng.randrange(10, 190) for _ in range(4 * seats * dp)]
    least = sum(lengths) / (seats * dp)
    as_they_are, longest = (ticks(dp, seats, lengths, order) for order in (lambda rows: rows, by_length(seats * dp)))
    assert as_they_are > 1.15 * least
    assert longest < 1.05 * least


def by_length(seats: int) -> Callable[[list[int]], list[int]]:
    return lambda lengths: list(longest_first(lengths, lambda length: length, lambda length: 1, seats))


def ticks(dp: int, seats: int, lengths: list[int], order: Callable[[list[int]], list[int]]) -> int:
    jobs = enumerate(order(lengths))
    made = [(index, 5, length) for index, length in jobs]
    fleet = Fleet(Rules(seats, dp=dp, lag=0), lambda: [make_job(*row) for row in made]).run()
    return max(fleet.busy)
