"""How a product of few rows is cut up for the kernel in product.cu: which thread block has which weight rows."""

from dataclasses import dataclass

MOST = 128  # rows
OUTS = (64, 128, 192)  # weight rows that a thread block may own
FEWEST = 60  # thread blocks that still draw nearly the full bandwidth
SHARED_BYTES = 227 * 1024 - 1024 - 512  # a block's shared memory for copies in flight: less alignment and barriers
COLUMN_BYTES = 128  # of a row in one copy: 64 columns, the width at which the matrix unit reads without bank conflicts


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up; see product.cu for what the blocks do.

    Attributes:
        rows: of x, rounded up to a multiple of 8.
        outs: weight rows of a block.
        parts: blocks that share these, each with its part of the columns.
        deep: copies of 64 columns a step; a second one halves the steps' overhead where there is room for many.
    """

    rows: int
    outs: int
    parts: int
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


def tiling(rows: int, size: int, columns: int, processors: int) -> Tiling | None:
    """The one with most blocks in one wave, for a weight `[size, columns]`; None if cuBLAS is the better choice."""
    fitting = [
        (size // outs * parts, -outs, parts)
        for outs in OUTS
        for parts in (1, 2)  # four would leave a tenth of the multiprocessors idle
        if size % outs == 0 and FEWEST <= size // outs * parts <= processors
    ]
    if not fitting or rows > MOST or columns % 256 or columns < 512:  # the same parts of K however many rows there are
        return None
    _, outs, parts = max(fitting)
    box = -(-rows // 8) * 8
    return Tiling(box, -outs, parts, 2 if box <= 64 else 1)
