"""Token packets between real ranks, and the leader that is alone."""

import random
import time

import torch
import torch.distributed as dist

from spmd.parallel.groups import connect
from spmd.parallel.packet import Packet, PacketQueue, PacketWire
from spmd.topology import Topology
from tests.support.ranks import Ranks

MOST = 5
SENT = [
    Packet([], []),
    Packet([7], [True], digests=(1, 2, 3, 2**32 - 1)),
    Packet([], [], stop=77),
    Packet([2**31, 0, 3, 4, 5], [False, True, False, False, True]),
    Packet([9, 9], [False, False], 78, (4, 5, 6, 7)),
]


def wire(rank: int, size: int) -> PacketWire:
    """A replica of `size` stages, whose leader is its last rank."""
    topology = Topology(pp=size, rank=rank)
    groups = connect(topology, torch.device("cpu"))
    assert groups.packets is not None
    return PacketWire(groups.packets, topology.leader, MOST)


def in_flight(rank: int, depth: int) -> list[Packet]:
    """What this rank gets when each packet is received `depth` ticks after it was posted, at a pace of its own."""
    packets, received, rng = wire(rank, 3), [], random.Random(rank)
    for tick, packet in enumerate(SENT):
        if tick >= depth:
            received.append(packets.receive())
        packets.post(packet if rank == 2 else None)
        time.sleep(rng.random() / 100)
    received += [packets.receive() for _ in range(min(depth, len(SENT)))]
    return received


def late_leader(rank: int) -> bool:
    """Whether posting went on without waiting for the leader, which waits until all others have posted."""
    packets = wire(rank, 2)
    if rank == 1:
        dist.recv(torch.zeros(1), 0)
        for packet in SENT:
            packets.post(packet)
    else:
        for _ in SENT:
            packets.post()
        dist.send(torch.zeros(1), 1)
    return [packets.receive() for _ in SENT] == SENT


def test_every_rank_receives_what_the_leader_posted_in_order(ranks: Ranks) -> None:
    for depth in (1, 2, 4):
        assert ranks.run(3, in_flight, depth) == [SENT] * 3


def test_posting_waits_for_nobody(ranks: Ranks) -> None:
    assert ranks.run(2, late_leader) == [True, True]


def test_a_leader_alone_needs_no_group() -> None:
    packets = PacketQueue()
    for packet in SENT:
        packets.post(packet)
    assert [packets.receive() for _ in SENT] == SENT
