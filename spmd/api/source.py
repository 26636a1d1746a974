"""Where an engine's rows come from: one list, which every rank goes through in the same order."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from spmd.api.rows import BadRow, Job


@dataclass(frozen=True)
class Skipped:
    """In place of a row that another replica answers."""

    num_requests: int


class NotYet:
    """In place of a row that isn't there yet."""


SKIPPED, NOT_YET = Skipped(1), NotYet()


def num_requests(row: Job | BadRow | Skipped | NotYet) -> int:
    """How much there is to do for a row; a bad one counts, too. 0: it isn't there yet."""
    if isinstance(row, Job):
        return len(row.requests)
    return row.num_requests if isinstance(row, Skipped) else int(isinstance(row, BadRow))


def skipped(requests: int) -> Skipped:
    """In place of a row of so many requests."""
    return SKIPPED if requests == 1 else Skipped(requests)


class Source(Protocol):
    waited: float  # seconds in which a row wasn't there yet

    def next_row(self, own: bool) -> Job | BadRow | Skipped | NotYet | None:
        """Go on to the next row. It is built if it is one's `own`, else skipped for less.

        None: there are no more. NOT_YET: there may be more, but none now; the engine asks again in its next tick. The
        row that comes then is the next one still, and may be another replica's. Ranks of a replica must get the same
        answers at the same ticks, and so must all replicas where they share rows by demand: what depends on a clock or
        on arrivals has to reach all of them by a message first.
        """


class Listed:
    """A source of rows that are at hand."""

    waited = 0.0

    def __init__(self, rows: Iterable[Job | BadRow]) -> None:
        self._rows = iter(rows)

    def next_row(self, own: bool) -> Job | BadRow | Skipped | None:
        row = next(self._rows, None)
        return row if own or row is None else skipped(num_requests(row))
