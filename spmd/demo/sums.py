"""The demo's task: `347+218=` is answered by `565`, for operands of 0 to 999.

A digest of the unordered pair holds out 2 % of the sums, so that neither order of a held-out pair is ever trained on.
"""

from hashlib import blake2b

LIMIT = 1000  # operands lie in [0, LIMIT)


def prompt(a: int, b: int) -> str:
    return f"{a}+{b}="


def is_held_out(a: int, b: int) -> bool:
    return _digest(f"{min(a, b)}+{max(a, b)}") % 50 == 0


def held_out() -> list[tuple[int, int]]:
    """Every held-out pair (a, b), shuffled by a digest: any slice is an even sample, the same on every machine."""
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT) if is_held_out(a, b)]
    return sorted(pairs, key=lambda pair: _digest(prompt(*pair)))


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
