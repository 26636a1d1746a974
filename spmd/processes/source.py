"""One rank's end of the rows' way in: a `Source` of rows that were built elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from spmd.api.reader import Reader
from spmd.api.rows import BadRow, Job
from spmd.api.source import NOT_YET, NotYet, Skipped, skipped
from spmd.processes.folder import Batch, Built, Folder
from spmd.processes.packed import unpack
from spmd.schedule.longest_first import longest_first

NOTHING = Built(0, None, b"")


class PreparedRows:
    """A `Source` that waits where a row isn't built yet, so that all ranks get the same rows at the same ticks."""

    def __init__(self, path: Path, rank: int, ranks: int, reader: Reader, seats: int = 0) -> None:
        """
        Args:
            path: the feeder's folder.
            rank: of `ranks` of this node.
            reader: of the same rows, which it isn't asked for; its keys are set as rows are met.
            seats: see `longest_first`.
        """
        self.folder = Folder(path, ranks)
        self.rank = rank
        self.size, self.shards, self.done = reader.size, reader.shards, reader.done
        self.rows = self.consumed = 0  # of the input so far, of all replicas and shards; bytes
        self.prioritized = 0  # rows with a priority so far
        self.begun_twice = 0  # prompts so far, see `RowParser.begun_twice`
        self.waited = 0.0  # seconds
        self._rows = longest_first(self._received(), lambda row: row.tokens, lambda row: len(row.packed), seats)

    def next_row(self, own: bool) -> Job | BadRow | Skipped | NotYet | None:
        """Go on to the next row that is to be answered. NOT_YET behind many rows that were done before."""
        row = next(self._rows, None)
        if row is None:
            return None
        if row is NOTHING:
            return NOT_YET
        return unpack(row.packed) if own else skipped(row.num_requests)

    def _received(self) -> Iterator[Built]:
        """The rows as the folder has them; NOTHING where a batch has none, but isn't the last."""
        last = False
        while not last:
            batch = self._receive()
            last = batch.last
            yield from batch.rows if batch.rows or last else [NOTHING]

    def _receive(self) -> Batch:
        started = perf_counter()
        batch = self.folder.receive(self.rank)
        self.waited += perf_counter() - started
        self.rows, self.consumed, self.prioritized = batch.num_rows, batch.consumed, batch.prioritized
        self.begun_twice += batch.begun_twice
        for place, index in batch.met:
            self.done.put(place, index)
        return batch
