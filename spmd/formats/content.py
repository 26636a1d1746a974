"""From a source of any kind to blocks of bytes that are one JSON object a line."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any

from spmd.formats.compressed import BROKEN, decompressed, is_compressed
from spmd.formats.encodings import AsUtf8, encoding_of
from spmd.formats.json_array import array_lines
from spmd.formats.kind import Kind, check_magic, kind_of
from spmd.formats.sources import Source
from spmd.formats.table_rows import Columns, Roles, roles_of, table_lines
from spmd.formats.tables import Table, is_table
from spmd.messages import Mistake, first_line

BLOCK = 2**20  # bytes
START = 16  # bytes that tell what a file is


class _Joined(io.RawIOBase):
    """A stream from its beginning on, of which `start` was read already."""

    def __init__(self, start: bytes, rest: Any) -> None:
        self._start = start
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._start[: len(buffer)] or self._rest.read1(len(buffer))
        self._start = self._start[len(block) :]
        buffer[: len(block)] = block
        return len(block)


def is_plain(source: Source) -> bool:
    """Whether a source is a file that can be read as it is, one JSON object a line.

    Raises:
        Mistake: it is of a kind that isn't read, or can't be read at all.
    """
    if source.streamed:
        return False
    with _reading(source.path), source.open() as file:
        start = file.read(START)
        if is_table(start) or is_compressed(start) or encoding_of(start):
            return False
        check_magic(source.path, start)
        file.seek(0)
        kind, _ = kind_of(source.path, file)
        return kind is Kind.LINES


def is_table_file(source: Source) -> bool:
    """Whether a source is a table. Raises: Mistake: it can't be read."""
    if source.streamed:
        return False
    with _reading(source.path), source.open() as file:
        return is_table(file.read(START))


def roles_in(sources: Sequence[Source], columns: Columns) -> list[Roles]:
    """What the columns are of those sources that are tables.

    Raises:
        Mistake: one of them can't be read, or its prompts aren't found; none is a table, but a column is named.
    """
    found = []
    for source in sources:
        if is_table_file(source):
            with _reading(source.path):
                found.append(roles_of(source.path, Table(source.path).schema, columns))
    if columns.prompt is not None and not found:
        raise Mistake(f"input_column={columns.prompt} is for tables, and input={sources[0].path} is none")
    return found


def blocks_of(source: Source, columns: Columns) -> Iterator[bytes]:
    """All its rows, each ended by a newline, in blocks of any size. `columns` is for tables.

    Raises:
        Mistake: it can't be read to its end, or is of a kind that isn't read.
    """
    with _reading(source.path), source.open() as file:
        if is_table_file(source):
            yield from table_lines(source.path, columns)
            return
        end = b"\n"
        for block in _blocks(source.path, _text(source.path, file)):
            yield block
            end = block[-1:]
        if end != b"\n":
            yield b"\n"


def _text(path: str, file: IO[bytes]) -> IO[bytes]:
    """The content of a file in UTF-8."""
    start = file.read(START)
    content: IO[bytes] = io.BufferedReader(_Joined(start, file))
    if is_compressed(start):
        content = decompressed(path, content, start)
        start = content.read(START)
        content = io.BufferedReader(_Joined(start, content))
    if is_table(start):
        raise Mistake(
            f"input={path} is a table, which can be read from a plain file alone: neither compressed nor sent"
        )
    check_magic(path, start)
    encoding = encoding_of(start)
    return io.BufferedReader(AsUtf8(content, encoding), BLOCK) if encoding else content


def _blocks(path: str, text: IO[bytes]) -> Iterator[bytes]:
    kind, head = kind_of(path, text)
    blocks = chain([head] if head else [], iter(lambda: text.read(BLOCK), b""))
    return array_lines(path, blocks) if kind is Kind.ARRAY else blocks


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (*BROKEN, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise Mistake(
            f"input={path} can't be read: {reason}; if it is cut off or damaged, get it once more, or leave it out"
        ) from error
