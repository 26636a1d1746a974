"""The places that `input` names, in order: files, patterns of names, saved datasets, standard input."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from io import BufferedReader

from spmd.formats.saved_dataset import HUB, files_of_folder, files_of_hub
from spmd.messages import Mistake, first_line

STDIN = "-"
STDIN_TOO = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
PIPE_IT = "pipe rows into it: zcat in.jsonl.gz | launch/local.sh input=- …"


@dataclass(frozen=True)
class Source:
    """One of them, which was there when it was looked for."""

    path: str  # as it was given, or as a pattern found it; "-" is standard input
    streamed: bool = False  # it is read once, from its beginning to its end, and only by one process
    size: int = 0  # bytes of a file
    modified: int = 0  # nanoseconds

    def open(self) -> BufferedReader:
        """Its bytes. Raises: OSError."""
        return open(0, "rb", closefd=False) if self.path == STDIN else open(self.path, "rb")

    @property
    def is_terminal(self) -> bool:
        """Whether it is standard input, to which nobody sends anything."""
        return self.path == STDIN and os.isatty(0)

    @property
    def identity(self) -> list[str | int]:
        """What tells a file from what it was before; of a stream only how it is called."""
        return [self.path if self.streamed else os.path.realpath(self.path), self.size, self.modified]


def find_sources(given: str | Sequence[str]) -> list[Source]:
    """Every file that is meant; those of a pattern in the order of their names.

    Raises:
        Mistake: nothing is there, a folder is, one is named twice, or a stream isn't alone.
    """
    texts = [given] if isinstance(given, str) else list(given)
    found = [_source(path) for text in texts for path in _paths(text)]
    if not found:
        raise Mistake("input=[] names no file")
    seen: set[str] = set()
    for source in found:
        if source.streamed and len(found) > 1:
            raise Mistake(f"input: {source.path} is no file and must stand alone, not among {len(found)} inputs")
        if (path := os.path.realpath(source.path)) in seen:
            raise Mistake(f"input names {source.path} twice: its rows would be answered twice")
        seen.add(path)
    return found


def _paths(text: str) -> Iterator[str]:
    if text in STDIN_TOO:
        yield STDIN
    elif text.startswith(HUB):
        yield from files_of_hub(text)
    elif os.path.isdir(text) and (files := files_of_folder(text)) is not None:
        yield from files
    elif os.path.exists(text) or not has_magic(text):
        yield text
    elif found := sorted(glob(text, recursive=True)):
        yield from found
    else:
        raise Mistake(f"input={text} is the name of no file, and as a pattern fits none")


def _source(path: str) -> Source:
    if path == STDIN:
        return Source(path, streamed=True)
    try:
        found = os.stat(path)
    except OSError as error:
        raise Mistake(f"input={path} can't be read: {error.strerror or first_line(error)}{_hint(path)}") from error
    if stat.S_ISDIR(found.st_mode):
        raise Mistake(f"input={path} is a directory; its files are meant by a pattern, as in input='{path}/*.jsonl'")
    if stat.S_ISREG(found.st_mode):
        return Source(path, False, found.st_size, found.st_mtime_ns)
    if stat.S_ISFIFO(found.st_mode):
        return Source(path, streamed=True)
    raise Mistake(f"input={path} is a terminal or device, not a file")


def _hint(path: str) -> str:
    if path.startswith(("/dev/fd/", "/proc/self/fd/")):
        return f"; of what a shell opens, only standard input reaches the ranks: {PIPE_IT}"
    return f"; several files are written as input=[{path}]" if "," in path else ""
