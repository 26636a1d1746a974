"""The elements of a JSON array, each as a line, however long the array is and however it is laid out."""

import codecs
import json
import re
from collections.abc import Iterator

from spmd.formats.kind import MAX_LINE_BYTES
from spmd.messages import Mistake, first_line

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
NEWLINES = str.maketrans("\r\n", "  ")
LONGEST = 2 * MAX_LINE_BYTES  # characters of an element, laid out with spaces and newlines


class _Window:
    """A part of the text, from `at` on. Bytes that are no UTF-8 come out as they went in, so only their row fails."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text = ""
        self.at = 0
        self.ended = False

    def grow(self, least: int) -> None:
        """Hold at least so many characters from `at` on, if there are."""
        self.text, self.at = self.text[self.at :], 0
        parts, size = [self.text], len(self.text)
        while size < least and not self.ended:
            block = next(self._blocks, b"")
            self.ended = not block
            parts.append(self._decode(block, self.ended))
            size += len(parts[-1])
        self.text = "".join(parts)

    def next_character(self) -> str:
        """Go on behind the next character that is no space, and return it; empty: the end."""
        self.at = self._behind_space(self.at)
        while self.at == len(self.text) and not self.ended:
            self.grow(1)
            self.at = self._behind_space(self.at)
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def next_value(self) -> str:
        """The text of the JSON value at `at`.

        Raises:
            ValueError, RecursionError: it is none, or more of it must be seen: a number may go on.
        """
        start = self._behind_space(self.at)
        _, end = DECODER.raw_decode(self.text, start)
        if (following := self._behind_space(end)) == len(self.text):
            raise ValueError("the file ends behind it")
        if (sign := self.text[following]) not in ",]":
            raise ValueError(f"{sign!r} stands behind it")
        self.at = end
        return self.text[start:end]

    def _behind_space(self, at: int) -> int:
        found = SPACE.match(self.text, at)
        assert found
        return found.end()


def array_lines(path: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """A line for each element, its text as it stands, but for newlines between its parts.

    Raises:
        Mistake: the array isn't JSON from some element on, which is named: nothing tells where the next one begins.
    """
    window = _Window(blocks)
    opening = window.next_character()
    if opening == "\ufeff":
        opening = window.next_character()
    assert opening == "["
    number, sign = 0, window.next_character()
    while sign != "]":
        if number == 0:
            window.at -= 1  # what was seen is the beginning of the first element
        number += 1
        yield _next_element(path, number, window)
        sign = window.next_character()
    if rest := window.next_character():
        raise Mistake(f"input={path} has {rest!r} behind its JSON array, of {number:,} elements: leave that out")


def _next_element(path: str, number: int, window: _Window) -> bytes:
    while True:
        held = len(window.text) - window.at
        try:
            return window.next_value().translate(NEWLINES).encode("utf-8", "surrogateescape") + b"\n"
        except (ValueError, RecursionError) as error:
            if window.ended or held > LONGEST:
                why = first_line(error)
                raise Mistake(
                    f"input={path} is a broken JSON array: element {number:,} can't be read: {why}"
                ) from error
        window.grow(2 * held + 1)
