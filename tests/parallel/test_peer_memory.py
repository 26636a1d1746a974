"""Where ranks leave rows for each other: places that don't overlap, what doesn't fit, and who can have such memory."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from spmd.parallel.experts import ExpertParallel
from spmd.parallel.groups import join
from spmd.parallel.peer_memory import PeerMemory, size_of, within_reach
from tests.support.ranks import Ranks

RANKS, CAPACITY, COLUMNS, WIDTH = 3, 12, 10, 7


def rows_of_three() -> PeerMemory:
    memories = [torch.zeros(size_of(RANKS, CAPACITY, COLUMNS, WIDTH), dtype=torch.uint8) for _ in range(RANKS)]
    return PeerMemory(1, CAPACITY, COLUMNS, WIDTH, memories, torch.zeros(1, dtype=torch.int64))


def test_places_do_not_overlap() -> None:
    peers = rows_of_three()
    places = [peers.arrived(), peers.rows(CAPACITY, torch.bfloat16), peers.sums(CAPACITY, torch.bfloat16)]
    for number, place in enumerate(places):
        for rank, part in enumerate(place):
            part.fill_(3 * number + rank)
    assert [part.shape for part, *_ in places] == [(2 * RANKS,), (CAPACITY, COLUMNS), (CAPACITY, WIDTH)]
    for number, place in enumerate(places):
        assert all((part == 3 * number + rank).all() for rank, part in enumerate(place))


def test_few_rows_fit() -> None:
    peers = rows_of_three()
    shared = ExpertParallel(1, RANKS, None, peers)
    assert shared.peers_for(CAPACITY // RANKS) is peers and shared.peers_for(CAPACITY // RANKS + 1) is None
    assert ExpertParallel().peers_for(1) is None


def asked(rank: int, hosts: list[str], apart: tuple[int, int]) -> bool:
    """What a rank finds out where the GPUs `apart` don't see each other."""
    join()
    assert dist.group.WORLD is not None
    with (
        patch("socket.gethostname", lambda: hosts[rank]),
        patch("torch.cuda.can_device_access_peer", lambda *pair: pair != apart),
    ):
        return within_reach(dist.group.WORLD, torch.device("cuda", rank))


@pytest.mark.parametrize(
    ("hosts", "apart", "reached"),
    [(["a", "a", "a"], (0, 0), True), (["a", "a", "b"], (0, 0), False), (["a", "a", "a"], (2, 0), False)],
)
def test_all_must_see_each_other(ranks: Ranks, hosts: list[str], apart: tuple[int, int], reached: bool) -> None:
    assert ranks.run(3, asked, hosts, apart) == [reached] * 3
