"""Output that nobody may be there to read: a terminal that was closed, a pipe whose reader has ended, a full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Lasting:
    """A text stream that swallows what can't be written, once and for all: what it says is no reason to end a run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """What is written from now on, and what is still buffered, succeeds, at the interpreter's end too."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and error last, whoever goes away."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(streams[0]), Lasting(streams[1])
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
