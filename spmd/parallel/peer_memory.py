"""Memory of one host's GPUs that other GPUs' kernels write to: for experts that replicas share, and for tensor ranks.

**`PeerMemory`: rows and sums of experts.** A decode tick exchanges about 100 tensors of a few hundred kilobytes. Each
of NCCL's collectives takes a launch that can't start early, and a protocol of its own; here the kernel that makes a row
stores it where it is wanted. An exchange is one layer with experts. In it each rank

1. stores its rows, and where they go, in the memory of every rank, then adds their number to a count there;
2. waits until the counts in its own memory say that all ranks' rows are there, and computes its experts' share;
3. stores for each rank, in that one's memory, its share of the sums of that one's rows;
4. waits for the shares of all ranks in its own memory, and adds them up.

(`spmd.backend.cuda.expert_kernels`.) In step 3 the shares of many rows are followed by a count, as in step 1. Those of
few rows (`MAX_DECODE_ROWS`) need none: they travel in words of eight bytes, two numbers and the number of the exchange,
as in NCCL's protocol LL. GPUs store eight bytes at once, so a word that bears the exchange's number has arrived
(`spmd.backend.cuda.exchange_kernels`).

Nothing is overwritten that is still read, though no rank says that it is done:

- A rank's *rows* lie in each memory at a place of their own. It stores the next ones there (step 1) only after it has
  had all shares of the last ones (step 4), padding's included; each of the other ranks sent its shares after reading
  those rows.
- *Shares* for a rank lie in its memory. Others store the next ones there (step 3) only after they have had its next
  rows (step 2), which it sent after adding up the last shares: each of its kernels waits for those in front of it.
- Where the number of rows changes, places move: a rank's new place in a memory may be where another's rows lay. It has
  had its own last shares from there, but the kernel that sent them may still be making those of the other rows, for
  which it reads their weights. Nothing signals the end of that. But the number of rows changes between ticks only, so
  the one that writes has the rest of the last tick (final norm and head, or the next stage) and the next one's first
  attention before it; the one that reads, the last microseconds of a kernel that is running.

**`SymmetricBuffer`: sums over tensor ranks.** A buffer at the same place on all ranks takes all-reduces of small
tensors: a decode tick sums two tensors a layer, each of about a megabyte, and NCCL's latency would be a fifth of the
tick. PyTorch's symmetric memory needs a barrier and one kernel instead. NVLink multicast isn't used.
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
MAX_DECODE_ROWS = 256  # of all ranks: up to here launches and experts' weights take the time, not rows' bytes
MAX_SUM_BYTES = 4 * 2**20  # of a symmetric buffer; above it NCCL's bandwidth matters more than its latency


@dataclass(frozen=True)
class PeerMemory:
    """The memory of each rank as this one sees it.

    A memory holds, one after the other: `arrived`, `rows`, `sums`, `words`; each is given here as the tuple of all
    ranks' own.
    """

    rank: int
    capacity: int  # rows of all ranks together
    columns: int  # numbers of a row, of two bytes each
    width: int  # numbers of a sum, likewise
    memories: list[Tensor]  # of each rank: uint8 [size_of(...)]
    expected: Tensor  # int64 [2], this rank's alone: what each of its own counts of rows, of sums, comes to next

    @property
    def size(self) -> int:
        return len(self.memories)

    def rows(self, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`[count, columns]`: rows of all ranks, those of rank 0 first."""
        return self._views(round_up(16 * self.size, ALIGNED), (count, self.columns), dtype)

    def sums(self, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`[count, width]`: the shares of all ranks in the sums of this memory's own rows, those by rank 0 first."""
        at = round_up(16 * self.size, ALIGNED) + round_up(2 * self.capacity * self.columns, ALIGNED)
        return self._views(at, (count, self.width), dtype)

    def words(self, count: int) -> tuple[Tensor, ...]:
        """int64 `[count, width / 2]`: as `sums`, of MAX_DECODE_ROWS at most, each word with its exchange's number.

        Nothing else is ever stored there, so what has the number is what it seems.
        """
        size = round_up(4 * MAX_DECODE_ROWS * self.width, ALIGNED)
        at = size_of(self.size, self.capacity, self.columns, self.width) - size
        return self._views(at, (count, self.width // 2), torch.int64)

    def arrived(self) -> tuple[Tensor, ...]:
        """int64 `[2 * ranks]`: how many rows have come from each rank so far, then how many parts of sums."""
        return self._views(0, (2 * self.size,), torch.int64)

    def _views(self, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        end = at + math.prod(shape) * dtype.itemsize
        return tuple(memory[at:end].view(dtype).view(shape) for memory in self.memories)


def size_of(ranks: int, capacity: int, columns: int, width: int) -> int:
    """Bytes of each rank's memory, see `PeerMemory`."""
    plain = round_up(2 * capacity * columns, ALIGNED) + round_up(2 * capacity * width, ALIGNED)
    return round_up(16 * ranks, ALIGNED) + plain + round_up(4 * MAX_DECODE_ROWS * width, ALIGNED)


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


class SymmetricBuffer:
    """Memory for one tensor at the same place on all ranks of a group, summed where the parts were written."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        """Joins the group's ranks, which must all call it and be `within_reach`."""
        import torch.distributed._symmetric_memory as symmetric

        self.memory = symmetric.empty(MAX_SUM_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric.rendezvous(self.memory, group)
        self.group_name = group.group_name

    def view(self, rows: int, columns: int) -> Tensor | None:
        """Memory for a tensor `[rows, columns]` that is to be summed, until the next call; None if it is too large."""
        if rows * columns > len(self.memory):
            return None
        return self.memory[: rows * columns].view(rows, columns)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum what lies in the `view`, in place."""
        summed: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group_name)
        return summed


def symmetric_buffer(
    group: dist.ProcessGroup | None, dtype: torch.dtype, device: torch.device
) -> SymmetricBuffer | None:
    """A buffer in which the GPUs of a tensor group sum, if there is a group and they see each other's memory."""
    if group is None or device.type != "cuda" or not within_reach(group, device):
        return None
    return SymmetricBuffer(group, dtype, device)
