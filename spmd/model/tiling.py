"""How a product of few rows is cut up for the kernel in product.cu: which thread block has which weight rows."""

from dataclasses import dataclass

SMALL = 8 * 2**20  # numbers in a weight; reading it takes no longer than starting
MOST, MOST_IF_SMALL = 128, 256  # rows; with more, arithmetic counts and cuBLAS is as fast
OUTS = (64, 128, 192)  # weight rows that a thread block may own
FEWEST, FEWEST_IF_SMALL = 60, 30  # thread blocks that still draw nearly the full bandwidth
PART = 1024  # columns that are worth a thread block of their own
SHARED_BYTES = 227 * 1024 - 1024 - 512  # a block's shared memory for copies in flight: less alignment and barriers
COLUMN_BYTES = 128  # of a row in one copy: 64 columns, the width at which the matrix unit reads without bank conflicts


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up; see product.cu for what the blocks do.

    Attributes:
        rows: of x in a block, a multiple of 8.
        outs: weight rows of a block.
        parts: blocks that share these, each with its part of the columns.
        halves: 2 where the weight holds gate and up and the product ends in silu(gate) * up; else 1.
        deep: copies of 64 columns a step; a second one halves the steps' overhead where there is room for many.
    """

    rows: int
    outs: int
    parts: int
    halves: int
    deep: int

    @property
    def slots(self) -> int:
        """Steps in flight."""
        return SHARED_BYTES // self._step_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the steps', then in the same place the sums'."""
        return max(self.slots * self._step_bytes, self.rows * (self.outs + 4) * 4) + 1024

    @property
    def _step_bytes(self) -> int:
        return self.deep * (self.outs + self.rows) * COLUMN_BYTES


def tiling(rows: int, size: int, columns: int, halves: int, processors: int) -> Tiling | None:
    """The one with most blocks in one wave, for a weight `[size, columns]`; None if cuBLAS is the better choice.

    In how many parts the columns are summed depends on the weight alone: a row's sums are the same in any batch.
    """
    small = size * columns <= SMALL
    fewest, most = (FEWEST_IF_SMALL, MOST_IF_SMALL) if small else (FEWEST, MOST)
    parts = _parts(size, columns, processors)
    if rows > most or columns % 256 or columns < 512 or size // OUTS[0] * parts < fewest:
        return None
    at_once = MOST if size // OUTS[0] * parts >= FEWEST else MOST // 2  # where there are few, let them share the rows
    groups = -(-rows // at_once)
    box = -(-rows // (8 * groups)) * 8
    for outs in OUTS:
        blocks = size // outs * parts
        if size % outs == 0 and fewest <= blocks and blocks * groups <= processors:
            return Tiling(box, outs, parts, halves, 2 if box <= 64 else 1)
    return None


def _parts(size: int, columns: int, processors: int) -> int:
    """As many as two, where there is nothing else for half of the multiprocessors; four would leave some idle."""
    blocks = max((size // outs for outs in OUTS if size % outs == 0 and size // outs <= processors), default=0)
    return 2 if blocks * 2 <= processors and columns >= 2 * PART else 1
