"""What a replica's outlet does with answers: append each to the replica's part the moment it is there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from spmd.journal.format import Entry, Header, write_entry, write_header
from spmd.journal.locked_file import OpenFile
from spmd.journal.paths import Paths
from spmd.messages import Mistake, cannot_write

CHECK_EVERY = 1.0  # seconds; on a network file system a look at a file waits until all of it is written


class PartWriter:
    """Appends the answers of one replica, each by one write that is seen at once; a killed run tears the last at most.

    The outlet of the replica's leader alone writes its part, from one thread, and has it locked. Rank 0 reads it: in
    this run after `close` in every outlet, which a collective orders; in the next one once it has the part's lock.

    A part that is deleted under way is noticed within a second, or when it is closed, and written anew.

    Raises:
        Mistake: from any call, if the part can't be written or another run writes it. Answers that were written
            before stay in it, as whole lines.
    """

    def __init__(self, output: str, dp_rank: int, header: Header) -> None:
        """`header` tells later starts what the answers depend on, see `spmd.journal.format`."""
        self.path = Paths.of(output).part(dp_rank)
        self.written = 0
        self.last_check = time.monotonic()
        with self._reporting():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = OpenFile(self.path, lock=True)
            self.file.append(write_header(header))

    def write(self, index: int, answer: str, key: int | None = None, failed: bool = False) -> None:
        """Append the answer line (without newline) of row `index`.

        `key`: of the row's content, None if later attempts shall not pass over it; `failed`: the answer is an error.
        """
        with self._reporting():
            self.file.append(write_entry(Entry(index, time.time_ns(), key, failed, answer.encode())))
            self.written += 1
            if (now := time.monotonic()) - self.last_check > CHECK_EVERY:
                self.last_check = now
                self.file.restore()

    def close(self) -> None:
        """Close it before rank 0 merges: on a network file system only then the last rows are sure to be seen."""
        with self, self._reporting():
            self.file.restore()
            self.file.sync()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise Mistake(f"{self.path} is written by another run: end it, or choose another output") from error
        except OSError as error:
            why = cannot_write(str(self.path), self.path.parent, error)
            raise Mistake(
                f"{why}; the {self.written:,} answers that it got in this run are safe: mend that, then start again "
                f"with the same output to go on"
            ) from error
