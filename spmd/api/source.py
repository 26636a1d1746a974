"""Where an engine's rows come from: one list, which every rank goes through in the same order."""

from collections.abc import Iterable
from typing import Protocol

from spmd.api.rows import BadRow, Job


class Skipped:
    """In place of a row that another replica answers."""


SKIPPED = Skipped()


class Source(Protocol):
    def take(self, own: bool) -> Job | BadRow | Skipped | None:
        """Go on to the next row. It is built if it is one's `own`, else skipped for less; None: there are no more."""


class Listed:
    """A source of rows that are at hand."""

    def __init__(self, rows: Iterable[Job | BadRow]) -> None:
        self._rows = iter(rows)

    def take(self, own: bool) -> Job | BadRow | Skipped | None:
        row = next(self._rows, None)
        return row if own or row is None else SKIPPED
