"""The demo's task: `347+218=` is answered by `565`, for operands of 0 to 999.

A digest of the unordered pair holds out 2 % of the sums, so that neither order of a held-out pair is ever trained on.
"""

from hashlib import blake2b

LIMIT = 1000  # operands lie in [0, LIMIT)


def digest(a: int, b: int) -> int:
    """64 bits of the unordered pair, equal on every machine."""
    return int.from_bytes(blake2b(f"{min(a, b)}+{max(a, b)}".encode(), digest_size=8).digest(), "big")


def is_held_out(a: int, b: int) -> bool:
    return digest(a, b) % 50 == 0


def held_out() -> list[tuple[int, int]]:
    """Every held-out pair (a, b), in the order of its digest: any slice is an even sample."""
    found = [(a, b) for a in range(LIMIT) for b in range(LIMIT) if is_held_out(a, b)]
    return sorted(found, key=lambda pair: (digest(*pair), pair))


def prompt(a: int, b: int) -> str:
    return f"{a}+{b}="
