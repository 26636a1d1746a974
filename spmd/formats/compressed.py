"""Compressed streams, told by their first bytes and not by their names."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import IO, Any

from spmd.messages import Mistake, first_line

PIECE = 2**13  # compressed bytes that are taken at a time, which may become many thousand times as many
# What reading a file raises that is cut off, damaged, or gone.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


class ZstdReader(io.RawIOBase):
    """The content of all frames of a Zstandard stream, by the package zstandard.

    Its own reader takes a file that is cut off for one that ends there.

    Raises:
        EOFError, OSError: from `readinto`: the file is cut off, or damaged.
    """

    def __init__(self, stream: IO[bytes], zstandard: Any) -> None:
        self._stream = stream
        self._zstandard = zstandard
        self._frame: Any = None  # that is being read
        self._input = self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (piece := self._next_piece()):
                return 0
            self._input = self._input or memoryview(piece)
            self._output = memoryview(self._decompress())
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _next_piece(self) -> bytes:
        piece = self._stream.read(PIECE)
        if not piece and self._frame:
            raise EOFError("it ends within a frame")
        return piece

    def _decompress(self) -> bytes:
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            content: bytes = self._frame.decompress(self._input)
        except self._zstandard.ZstdError as error:
            raise OSError(first_line(error)) from error
        self._input = memoryview(self._frame.unused_data) if self._frame.eof else memoryview(b"")
        if self._frame.eof:
            self._frame = None
        return content


def _open_zstd(stream: IO[bytes]) -> Any:
    """Raises: ImportError: nothing here reads it."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(stream)
    import zstandard

    return ZstdReader(stream, zstandard)


OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def is_compressed(start: bytes) -> bool:
    """Whether a stream that begins like this is, in a way that is read here."""
    return start.startswith(tuple(OPENERS))


def decompressed(path: str, stream: IO[bytes], start: bytes) -> IO[bytes]:
    """The content of a stream that begins with `start`; the stream itself if that isn't compressed.

    Raises:
        Mistake: a package is missing.
    """
    for magic, opener in OPENERS.items():
        if start.startswith(magic):
            try:
                return io.BufferedReader(opener(stream))
            except ImportError as error:
                raise Mistake(
                    f"input={path} is compressed by Zstandard, which the package zstandard reads: "
                    f"{sys.executable} -m pip install zstandard, or zstdcat {path} | launch/local.sh input=- …"
                ) from error
    return stream
