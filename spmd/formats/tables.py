"""Tables on disk, a few rows at a time: Parquet, Arrow files (Feather) and Arrow streams (saved datasets)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spmd.messages import Mistake, first_line

MAGIC = {b"PAR1": "Parquet", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream"}
ROWS = 1000  # at a time
BUFFER = 2**20  # bytes of a column; without a buffer all of a row group is held, which may be the whole file


def is_table(start: bytes) -> bool:
    """Whether a file that begins like this is one."""
    return start.startswith(tuple(MAGIC))


def pyarrow(what: str) -> Any:
    """The package that reads and writes tables. Raises: Mistake: it is missing; `what` needs it."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        how = f"{sys.executable} -m pip install pyarrow"
        raise Mistake(f"{what} is a table, which the package pyarrow handles: {how}") from error
    return pyarrow


class Table:
    """One file.

    Raises:
        Mistake: pyarrow is missing.
        OSError: from any call, it can't be read, is cut off or damaged.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._arrow = pyarrow(f"input={path}")
        with self._reading(), open(path, "rb") as file:
            start = file.read(8)
            self._is_parquet, self._is_stream = start.startswith(b"PAR1"), start.startswith(b"\xff\xff\xff\xff")
            self.schema: Any = self._open().schema_arrow if self._is_parquet else self._open().schema

    def batches(self) -> Iterator[Any]:
        """All rows in order, as record batches of no more than ROWS."""
        with self._reading():
            file = self._open()
            if self._is_parquet:
                yield from file.iter_batches(batch_size=ROWS)
                return
            batches = file if self._is_stream else map(file.get_batch, range(file.num_record_batches))
            for batch in batches:
                yield from (batch.slice(at, ROWS) for at in range(0, batch.num_rows, ROWS))

    def _open(self) -> Any:
        if self._is_parquet:
            return self._arrow.parquet.ParquetFile(self._path, buffer_size=BUFFER, pre_buffer=False)
        open_it = self._arrow.ipc.open_stream if self._is_stream else self._arrow.ipc.open_file
        return open_it(self._arrow.memory_map(self._path))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except self._arrow.ArrowException as error:
            raise OSError(first_line(error)) from error
