"""The load exchange between real ranks, at paces of their own."""

import random
import time

import pytest
import torch
import torch.distributed as dist

from spmd.parallel.groups import connect
from spmd.parallel.load import LoadExchange
from spmd.topology import Topology
from tests.support.ranks import Ranks

TICKS = 12


def reported(dp_rank: int, tick: int) -> list[int]:
    return [dp_rank, tick, 2**31 - 1, 0, -1]


def exchange(rank: int, lag: int, dp: int, pp: int = 1) -> tuple[list[list[list[int]] | None], int]:
    """What this rank received before each launch and after the last one, and how often it launched."""
    topology, rng = Topology(dp, pp, rank=rank), random.Random(rank)
    groups = connect(topology, torch.device("cpu"))
    assert groups.load is not None
    wire, received = LoadExchange(groups.load, dp, lag), []
    for tick in range(TICKS):
        received.append(wire.receive())
        wire.launch(reported(topology.dp_rank, tick))
        time.sleep(rng.random() / 200)
    received.append(wire.receive())
    wire.drain()
    assert wire.receive() is None
    assert wire.seconds > 0
    return received, wire.count


def ahead(rank: int, lag: int) -> bool:
    """Whether a rank can be `lag` ticks ahead of another, which launches nothing before it is asked to."""
    groups = connect(Topology(2, rank=rank), torch.device("cpu"))
    assert groups.load is not None
    wire = LoadExchange(groups.load, 2, lag)
    if rank == 1:
        dist.recv(torch.zeros(1), 0)
    for tick in range(lag):
        assert wire.receive() is None
        wire.launch(reported(rank, tick))
    if rank == 0:
        dist.send(torch.zeros(1), 1)
    wire.launch(reported(rank, lag))
    received = wire.receive()
    wire.drain()
    return received == [reported(0, 0), reported(1, 0)]


@pytest.mark.parametrize(("dp", "pp"), [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("lag", [0, 1, 4])
def test_every_rank_receives_the_same_loads_of_lag_ticks_ago(ranks: Ranks, dp: int, pp: int, lag: int) -> None:
    expected = [None] * (lag + 1) + [[reported(replica, tick) for replica in range(dp)] for tick in range(TICKS - lag)]
    assert ranks.run(dp * pp, exchange, lag, dp, pp) == [(expected, TICKS)] * (dp * pp)


def test_launching_waits_for_nobody(ranks: Ranks) -> None:
    assert ranks.run(2, ahead, 3) == [True, True]


def groups_of(rank: int, dp: int, pp: int, tp: int) -> list[int] | None:
    group = connect(Topology(dp, pp, tp, rank), torch.device("cpu")).load
    return None if group is None else dist.get_process_group_ranks(group)


def test_ranks_of_equal_place_in_their_replicas_exchange(ranks: Ranks) -> None:
    assert ranks.run(4, groups_of, 2, 1, 2) == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert ranks.run(3, groups_of, 3, 1, 1) == [[0, 1, 2]] * 3


def test_one_replica_has_no_group(ranks: Ranks) -> None:
    assert ranks.run(2, groups_of, 1, 2, 1) == [None, None]
    assert ranks.run(1, groups_of, 1, 1, 1) == [None]
