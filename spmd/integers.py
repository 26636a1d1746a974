"""Whole numbers that many rooms need: division that rounds up, and digests of 64 bits."""

from hashlib import blake2b


def ceil_div(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`: the quotient, rounded up."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return ceil_div(count, multiple) * multiple


def digest64(content: bytes, key: bytes = b"") -> int:
    """A digest in [0, 2**64): 8 bytes of BLAKE2b, the first byte the lowest; `key` as BLAKE2b takes one."""
    return int.from_bytes(blake2b(content, digest_size=8, key=key).digest(), "little")
