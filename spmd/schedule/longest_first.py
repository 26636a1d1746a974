"""The order in which rows are dealt out: of those in a window, the one that may run longest comes first.

Replicas fill their seats until the list ends. What starts last then decides how long some seats run while others are
empty, so it had better be short: longest processing time first (Graham 1969). How long a row runs is known by its
max_tokens alone. Where that is the same for all, they come as they are; where it differs, a window of the rows that
come next is kept, from which the longest is taken. It grows as rows are taken, so that the first ones needn't wait for
all of it to be read. The order is a function of the list, equal on all ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from typing import TypeVar

Row = TypeVar("Row")
SEATS_AHEAD = 4  # a window has so many rows for each seat of all replicas
MOST_BYTES = 2**26  # and no more than these, but for one row


def longest_first(
    rows: Iterable[Row], length: Callable[[Row], int | None], size: Callable[[Row], int], seats: int
) -> Iterator[Row]:
    """All rows.

    Args:
        length: most tokens that a row may be given; None: it goes on at once, there is nothing to generate.
        size: its bytes in the window.
        seats: of all replicas; 0: rows come as they are.
    """
    window: list[tuple[int, int, Row]] = []
    first, differ, taken, held = None, False, 0, 0
    for place, row in enumerate(rows):
        tokens = length(row)
        if tokens is None:
            yield row
            continue
        first = tokens if first is None else first
        differ = differ or (tokens != first and seats > 0)
        heappush(window, (-tokens, place, row))
        held += size(row)
        most = min(SEATS_AHEAD * seats, seats + taken) if differ else 0
        while len(window) > most or (held > MOST_BYTES and len(window) > 1):
            row = heappop(window)[2]
            held -= size(row)
            taken += 1
            yield row
    while window:
        yield heappop(window)[2]
