"""Texts in UTF-16 and UTF-32, as some editors and databases write them, on their way to UTF-8."""

import io
from typing import IO, Any

MARKS = {  # the longer ones first: one begins with another
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
CHARACTERS = 2**18  # at a time


def encoding_of(start: bytes) -> str | None:
    """That of a text with such a beginning, of at least four bytes; None for UTF-8.

    JSON begins with two characters of ASCII, of which UTF-16 makes a zero each.
    """
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    zeros = [at for at, byte in enumerate(start[:4]) if not byte]
    return "utf-16-le" if zeros == [1, 3] else "utf-16-be" if zeros == [0, 2] else None


class AsUtf8(io.RawIOBase):
    """A stream in another encoding. Halves of surrogate pairs become bytes that are no UTF-8, so only their rows fail.

    Raises:
        UnicodeDecodeError: from `readinto`: it ends within a character.
    """

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding, "surrogatepass", newline="")
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(self._text.read(CHARACTERS).encode("utf-8", "surrogatepass"))
        size = min(len(buffer), len(self._block))
        buffer[:size] = self._block[:size]
        self._block = self._block[size:]
        return size
