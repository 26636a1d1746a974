"""Where ranks leave rows for each other: three places that don't overlap, and what doesn't fit."""

import torch

from spmd.parallel.experts import ExpertParallel
from spmd.parallel.peers import PeerRows, size_of

RANKS, CAPACITY, COLUMNS, WIDTH = 3, 12, 10, 7


def rows_of_three() -> PeerRows:
    memories = [torch.zeros(size_of(RANKS, CAPACITY, COLUMNS, WIDTH), dtype=torch.uint8) for _ in range(RANKS)]
    return PeerRows(1, CAPACITY, COLUMNS, WIDTH, memories, torch.zeros(1, dtype=torch.int64))


def test_places_do_not_overlap() -> None:
    peers = rows_of_three()
    places = [peers.arrived(), peers.rows(CAPACITY, torch.bfloat16), peers.sums(CAPACITY, torch.bfloat16)]
    for number, place in enumerate(places):
        for rank, part in enumerate(place):
            part.fill_(3 * number + rank)
    assert [part.shape for part, *_ in places] == [(2 * RANKS,), (CAPACITY, COLUMNS), (CAPACITY, WIDTH)]
    for number, place in enumerate(places):
        assert all((part == 3 * number + rank).all() for rank, part in enumerate(place))


def test_few_rows_have_room() -> None:
    peers = rows_of_three()
    shared = ExpertParallel(1, RANKS, None, peers)
    assert shared.room(CAPACITY // RANKS) is peers and shared.room(CAPACITY // RANKS + 1) is None
    assert ExpertParallel().room(1) is None
