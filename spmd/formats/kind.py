"""What an input holds, told by its first bytes and lines, before any weight is loaded."""

import json
from enum import Enum
from typing import IO

from spmd.messages import Mistake

MAX_LINE_BYTES = 16 * 2**20  # a prompt of a million token ids takes about half of this
WANTED = "the input is JSON, one object a line or an array of objects, or a table (Parquet, Arrow)"
ZIP = b"PK\x03\x04"
BINARY = {b"FEA1": "Feather of its first version", b"SQLite format 3": "SQLite", b"\x80\x04\x95": "a pickle"}


class Kind(Enum):
    LINES = "one JSON object a line"
    ARRAY = "a JSON array"


def check_magic(path: str, start: bytes) -> None:
    """Raises: Mistake: a file with such a beginning is no text, and what it is instead."""
    if start.startswith(ZIP):
        raise Mistake(f"input={path} is a zip archive: unzip -p {path} | launch/local.sh input=- … reads what is in it")
    for magic, kind in BINARY.items():
        if start.startswith(magic):
            raise Mistake(f"input={path} is {kind}; {WANTED}")


def kind_of(path: str, stream: IO[bytes]) -> tuple[Kind, bytes]:
    """What a stream of UTF-8 holds, by its first two lines that aren't blank; and what was read of it to tell.

    A single bad row at the beginning doesn't make it another kind: that row alone fails.

    Raises:
        Mistake: JSON objects that go over several lines.
    """
    head: list[bytes] = []
    first, second = _next_line(stream, head), _next_line(stream, head)
    kind = Kind.LINES
    if first.startswith(b"["):
        if first == b"[" or not (_json(first) or _is_object(second)) or (not second and _is_rows(first)):
            kind = Kind.ARRAY
    elif first.startswith(b"{") and second and not (_json(first) or _is_object(second) or second.startswith(b"{")):
        raise Mistake(f"input={path} has JSON over several lines: jq -c . {path} > in.jsonl makes an input of it")
    return kind, b"".join(head)


def _next_line(stream: IO[bytes], head: list[bytes]) -> bytes:
    """The next line that isn't blank, stripped, or the beginning of a long one; empty: there is none."""
    while line := stream.readline(MAX_LINE_BYTES):
        head.append(line)
        if text := line.removeprefix(b"\xef\xbb\xbf").strip():
            return text
    return b""


def _json(line: bytes) -> object:
    """What a line holds; None if that isn't JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_object(line: bytes) -> bool:
    return isinstance(_json(line), dict)


def _is_rows(line: bytes) -> bool:
    found = _json(line)
    return isinstance(found, list) and any(isinstance(element, dict) for element in found)
