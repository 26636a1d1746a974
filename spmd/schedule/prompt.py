"""A prompt, which all requests that were asked of it have in common."""

from array import array
from collections.abc import Iterable


class Prompt:
    """Token ids, and the content hashes of their blocks: there once, however many choices a row asks for."""

    __slots__ = ("hashes", "tokens")

    def __init__(self, token_ids: "Iterable[int] | array[int]") -> None:
        """An array (of type "i") is kept as it is."""
        self.tokens = token_ids if isinstance(token_ids, array) else array("i", token_ids)  # nobody writes these
        self.hashes: list[bytes] = []  # of its first full blocks: those that were asked for, or computed ahead

    def __len__(self) -> int:
        return len(self.tokens)
