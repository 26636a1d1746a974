"""A set of 64-bit keys that travels to all ranks and stays small: 16 bytes a key, where a dict would take 150."""

from array import array
from bisect import bisect_left

import numpy as np


class KeyTable:
    """A number for each key, -1 until it is set.

    Args:
        keys: what `pack` made.
    """

    def __init__(self, keys: bytes = b"") -> None:
        self.keys = array("Q", keys)  # ascending
        self.values = array("q", [-1]) * len(self.keys)
        self.num_set = 0

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: int | None) -> int:
        """Position of a key in `keys` and `values`; -1 if it isn't there."""
        if key is None:
            return -1
        place = bisect_left(self.keys, key)
        return place if place < len(self.keys) and self.keys[place] == key else -1

    def set(self, key: int, value: int) -> bool:
        """Set a key's number, 0 or above; returns whether the key is there."""
        place = self.find(key)
        if place >= 0:
            self.put(place, value)
        return place >= 0

    def put(self, place: int, value: int) -> None:
        """Set the number of the key at a place."""
        self.num_set += self.values[place] < 0
        self.values[place] = value


def pack(keys: "array[int]") -> bytes:
    """Keys, in any order and perhaps twice, as a KeyTable takes them and as they travel: uint64, ascending."""
    return np.unique(np.frombuffer(keys, np.uint64)).tobytes()
