"""Kinds of files that are no input: told in one line by their first bytes, before any weight is loaded."""

import json
import stat
from typing import IO

from spmd.api.rows import MAX_LINE_BYTES

WANTED = "the input is a file of one JSON object a line, in UTF-8"
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "zcat"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstdcat"),
    b"BZh": ("bzip2", "bzcat"),
    b"\xfd7zXZ\x00": ("xz", "xzcat"),
    b"PK\x03\x04": ("a zip archive", "unzip -p"),
}
BINARY = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"SQLite format 3": "SQLite", b"\x80\x04\x95": "a pickle"}


def check_kind(path: str, mode: int) -> None:
    """Return if a file may be rows, one a line; `mode` is its stat's.

    A single bad row at the beginning doesn't make it another kind: that row alone fails.

    Raises:
        ValueError: names what it is and, if that is simple, how to make an input of it.
        OSError: it can't be read.
    """
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a terminal or device" if stat.S_ISCHR(mode) else "no file"
        raise ValueError(f"input={path} is {what}: every rank reads the input, so write it to a file first")
    with open(path, "rb") as file:
        start = file.read(16)
        _check_magic(path, start)
        file.seek(0)
        _check_lines(path, file)


def _check_magic(path: str, start: bytes) -> None:
    for magic, (kind, tool) in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"input={path} is compressed ({kind}): {tool} {path} > in.jsonl makes an input of it")
    for magic, kind in BINARY.items():
        if start.startswith(magic):
            raise ValueError(f"input={path} is {kind}; {WANTED}")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or start[:4].count(0) == 2:
        raise ValueError(f"input={path} is UTF-16: iconv -f UTF-16 -t UTF-8 {path} > in.jsonl makes an input of it")


def _check_lines(path: str, file: IO[bytes]) -> None:
    """Tell JSON that goes over several lines by the first two lines that aren't blank."""
    first, second = _next_line(file), _next_line(file)
    if first.startswith(b"["):
        if first == b"[" or not (_json(first) or _is_object(second)) or (not second and _is_rows(first)):
            raise ValueError(f"input={path} is a JSON array: jq -c '.[]' {path} > in.jsonl makes an input of it")
    elif first.startswith(b"{") and second and not (_json(first) or _is_object(second) or second.startswith(b"{")):
        raise ValueError(f"input={path} has JSON over several lines: jq -c . {path} > in.jsonl makes an input of it")


def _next_line(file: IO[bytes]) -> bytes:
    """The next line that isn't blank, stripped, or the beginning of a long one; empty: there is none."""
    while line := file.readline(MAX_LINE_BYTES):
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
