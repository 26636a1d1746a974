"""Memory in which the GPUs of one host leave rows for each other: for the experts that replicas share.

A decode tick exchanges about 100 tensors of a few hundred kilobytes. Each of NCCL's collectives takes a launch that
can't start early, and a protocol of its own; here the kernel that makes a row stores it where it is wanted, and the one
that needs the rows waits for a count (`spmd.backend.cuda.expert_kernels`). Of few rows the sums travel in words of
eight bytes, two numbers and the exchange's, as in NCCL's protocol LL: a word with that number has arrived, without
fence or count.

A rank overwrites nothing that another still reads: before it sends the next rows it has the sums of the last, for which
all others have read the rows, and the other way round. Where the number of rows changes, their place may have been that
of another rank's own, which it still sums up; but then a tick has ended, and head and attention lie between.

For tensor parallelism a buffer at the same place on all ranks takes all-reduces of small tensors: a decode tick sums
two tensors a layer, each of about a megabyte, and NCCL's latency would be a fifth of the tick. PyTorch's symmetric
memory needs a barrier and one kernel instead. NVLink multicast isn't used.
"""

import math
import socket
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.distributed as dist
from torch import Tensor

from spmd.integers import round_up

ALIGNED = 256  # bytes
FEW = 256  # rows of all ranks, as decode batches have: steps take the time, and experts' weights, not rows' bytes


@dataclass(frozen=True)
class PeerMemory:
    """The memory of each rank as this one sees it. It begins with two counts a rank: of rows, and of sums, from it."""

    rank: int
    capacity: int  # rows of all ranks together
    columns: int  # of a row, in two bytes each
    width: int  # of a sum, likewise
    memories: list[Tensor]  # of each rank: uint8, see `size_of`
    expected: Tensor  # int64 [2]: rows that each rank has sent so far, with those of this exchange; counts of sums

    @property
    def size(self) -> int:
        return len(self.memories)

    def rows(self, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of each rank `[count, columns]`, where all ranks leave their rows."""
        return self._views(round_up(16 * self.size, ALIGNED), (count, self.columns), dtype)

    def sums(self, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of each rank `[count, width]`, where all ranks leave what they add to the sums of its rows."""
        at = round_up(16 * self.size, ALIGNED) + round_up(2 * self.capacity * self.columns, ALIGNED)
        return self._views(at, (count, self.width), dtype)

    def words(self, count: int) -> tuple[Tensor, ...]:
        """Of each rank int64 `[count, width / 2]`, for `sums` of at most FEW rows; nothing else ever stands there."""
        at = size_of(self.size, self.capacity, self.columns, self.width) - round_up(4 * FEW * self.width, ALIGNED)
        return self._views(at, (count, self.width // 2), torch.int64)

    def arrived(self) -> tuple[Tensor, ...]:
        """Of each rank `[2 * ranks]`, int64: how many rows, and then sums, came from each."""
        return self._views(0, (2 * self.size,), torch.int64)

    def _views(self, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        end = at + math.prod(shape) * dtype.itemsize
        return tuple(memory[at:end].view(dtype).view(shape) for memory in self.memories)


@dataclass(frozen=True)
class PendingSums:
    """Sums `[rows, hidden]` on their way from all ranks. To be taken once, before the next exchange.

    Who takes the first of them (`spmd.backend.cuda.exchange_kernels`) waits for all, also for those that are
    padding: then the other ranks are done with what this one overwrites next.
    """

    peers: PeerMemory
    rows: int
    dtype: torch.dtype


def size_of(ranks: int, capacity: int, columns: int, width: int) -> int:
    """Bytes of each rank's memory, see `PeerMemory`."""
    plain = round_up(2 * capacity * columns, ALIGNED) + round_up(2 * capacity * width, ALIGNED)
    return round_up(16 * ranks, ALIGNED) + plain + round_up(4 * FEW * width, ALIGNED)


def within_reach(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the GPUs of a group's ranks, this one's is `device`, see each other's memory; equal on all of them."""
    places: list[tuple[str, int]] = [("", 0)] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=group)
    hosts, gpus = zip(*places, strict=True)
    return len(set(hosts)) == 1 and all(torch.cuda.can_device_access_peer(*pair) for pair in permutations(gpus, 2))


def share(group: dist.ProcessGroup, capacity: int, columns: int, width: int, device: torch.device) -> PeerMemory:
    """Make it, where ranks are `within_reach`; all of the group must call this."""
    import torch.distributed._symmetric_memory as symmetric

    size, ranks = size_of(group.size(), capacity, columns, width), range(group.size())
    memory = symmetric.empty(size, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize(device)
    handle = symmetric.rendezvous(memory, group)  # when it returns, all have zeroed theirs
    memories = [memory if rank == group.rank() else handle.get_buffer(rank, (size,), torch.uint8) for rank in ranks]
    expected = torch.zeros(2, dtype=torch.int64, device=device)
    return PeerMemory(group.rank(), capacity, columns, width, memories, expected)


MAX_BYTES = 4 * 2**20  # above it NCCL's bandwidth matters more than its latency


class SymmetricBuffer:
    """Room for one tensor at the same place on all ranks of a group. PendingSums are written where the parts were."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        """Joins the group's ranks, which must all call it and be `spmd.parallel.peer_memory.within_reach`."""
        import torch.distributed._symmetric_memory as symmetric

        self.memory = symmetric.empty(MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric.rendezvous(self.memory, group)
        self.group_name = group.group_name

    def room(self, rows: int, columns: int) -> Tensor | None:
        """Memory for a tensor `[rows, columns]` that is to be summed, until the next call; None if it is too large."""
        if rows * columns > len(self.memory):
            return None
        return self.memory[: rows * columns].view(rows, columns)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum what lies in the room, in place."""
        return torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group_name)
