"""Hidden states between real ranks: order, shapes, and buffers that outlive their isend."""

import gc
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from spmd.parallel.groups import connect
from spmd.parallel.hidden import HiddenChannel
from spmd.topology import Topology
from tests.support.ranks import Ranks

HIDDEN = 512
LARGE = 4096  # rows of 8 MB: more than the sockets between two ranks take in before the receiver asks


def channel(topology: Topology, slots: int) -> HiddenChannel:
    device = torch.device("cpu")
    groups = connect(topology, device)
    return HiddenChannel(topology, groups.hidden, HIDDEN, torch.float32, device, slots)


def payload(rows: int, number: int) -> Tensor:
    return (torch.arange(rows * HIDDEN, dtype=torch.float32).view(rows, HIDDEN) % 1000) + number


def passed_on(rank: int, pp: int, tp: int, rows: Sequence[int], slots: int) -> bool:
    """Each stage adds its number to what came; whether the last stage got its own tensor rank's sums."""
    topology = Topology(pp=pp, tp=tp, rank=rank)
    wire, intact = channel(topology, slots), True
    for number, count in enumerate(rows):
        mine = payload(count, number + topology.tp_rank)
        hidden = mine if topology.is_first_stage else wire.receive(count)
        if topology.is_last_stage:
            intact &= torch.equal(hidden, mine + sum(range(pp - 1)))
        else:
            wire.send(hidden + topology.pp_rank)
    wire.drain()
    return intact


def poisoned(rank: int, slots: int, count: int) -> bool:
    """The sender forgets what it sent and fills memory with NaN; the receiver comes late."""
    topology = Topology(pp=2, rank=rank)
    wire = channel(topology, slots)
    if topology.is_first_stage:
        for number in range(count):
            hidden = payload(LARGE, number)
            wire.send(hidden)
            del hidden
            gc.collect()
            poison = [torch.full((LARGE, HIDDEN), float("nan")) for _ in range(3)]
            del poison
        wire.drain()
        return True
    time.sleep(0.3)
    return all(torch.equal(wire.receive(LARGE), payload(LARGE, number)) for number in range(count))


def kept(rank: int, slots: int) -> int:
    """Most buffers the sender held; one that was never waited for would be held for ever."""
    topology = Topology(pp=2, rank=rank)
    wire, most = channel(topology, slots), 0
    for number in range(20):
        if topology.is_first_stage:
            wire.send(payload(3, number))
            most = max(most, len(wire._sending))
        else:
            wire.receive(3)
    wire.drain()
    assert not wire._sending
    return most


def test_shapes_come_from_the_plan_and_order_is_kept(ranks: Ranks) -> None:
    assert all(ranks.run(3, passed_on, 3, 1, (1, 7, 64, 1, 3, 200), 3))


def test_each_tensor_rank_talks_to_its_own_peer(ranks: Ranks) -> None:
    assert all(ranks.run(4, passed_on, 2, 2, (4, 1, 9, 9, 2), 2))


def test_buffers_outlive_their_isend(ranks: Ranks) -> None:
    for slots in (1, 2, 4):
        assert all(ranks.run(2, poisoned, slots, 5))


def test_no_more_buffers_are_kept_than_are_in_flight(ranks: Ranks) -> None:
    assert ranks.run(2, kept, 2) == [2, 0]
