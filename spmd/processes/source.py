"""One rank's end of the rows' way in: a `Source` of rows that were built elsewhere."""

from pathlib import Path
from time import perf_counter

from spmd.api.reader import Reader
from spmd.api.rows import BadRow, Job
from spmd.api.source import NOT_YET, NotYet, Skipped, skipped
from spmd.processes.folder import Folder
from spmd.processes.packed import unpack


class PreparedRows:
    """A `Source` that waits where a row isn't built yet, so that all ranks get the same rows at the same ticks."""

    def __init__(self, path: Path, rank: int, ranks: int, reader: Reader) -> None:
        """
        Args:
            path: the feeder's folder.
            rank: of `ranks` of this node.
            reader: of the same rows, which it isn't asked for; its keys are set as rows are met.
        """
        self.folder = Folder(path, ranks)
        self.rank = rank
        self.size, self.shards, self.done = reader.size, reader.shards, reader.done
        self.rows = self.consumed = 0  # of the input so far, of all replicas and shards; bytes
        self.prioritized = 0  # rows with a priority so far
        self.begun_twice = 0  # prompts so far, see `RowParser.begun_twice`
        self.waited = 0.0  # seconds
        self._batch: list[tuple[int, bytes]] = []
        self._next = 0
        self._last = False

    def next_row(self, own: bool) -> Job | BadRow | Skipped | NotYet | None:
        """Go on to the next row that is to be answered. NOT_YET behind many rows that were done before."""
        if self._next == len(self._batch):
            if self._last:
                return None
            self._receive()
            if not self._batch:
                return None if self._last else NOT_YET
        requests, packed = self._batch[self._next]
        self._next += 1
        return unpack(packed) if own else skipped(requests)

    def _receive(self) -> None:
        started = perf_counter()
        batch = self.folder.receive(self.rank)
        self.waited += perf_counter() - started
        self._batch, self._next, self._last = batch.rows, 0, batch.last
        self.rows, self.consumed, self.prioritized = batch.num_rows, batch.consumed, batch.prioritized
        self.begun_twice += batch.begun_twice
        for place, index in batch.met:
            self.done.put(place, index)
