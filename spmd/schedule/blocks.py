"""The pool of KV-cache blocks of one replica: who holds which block, which are free, which hold a known prefix.

A block is `block_size` tokens of keys and values on every stage. Block 0 is the null block: padding rows point at it,
nobody owns it. A full block is registered under the hash of all tokens up to its end, so an equal prefix finds it
again; freed blocks keep their content until they are reused, least recently freed first. The order of the free list
is the only clock.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

NULL_BLOCK = 0
HASH_BYTES = 16


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Content hash of a full block: HASH_BYTES over its tokens and the hash of the block before (b"" for the first)."""
    return blake2b(array("q", tokens).tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def hash_blocks(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Those of all full blocks of a request that begins with these tokens."""
    hashes, parent = [], b""
    for end in range(block_size, len(tokens) + 1, block_size):
        hashes.append(parent := hash_block(parent, tokens[end - block_size : end]))
    return hashes


class BlockPool:
    """Reference-counted blocks `1 .. num_blocks - 1`; prefix sharing means a block may have several holders."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._unclean: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pop(self, clean: bool = False) -> int:
        """A free block, forgetting the prefix it held. The caller has checked `num_free`.

        `clean`: it must not hold anything any more; see `take_unclean`.
        """
        block, _ = self._free.popitem(last=False)
        self._holders[block] = 1
        self._forget(block)
        if clean:
            self._unclean.append(block)
        return block

    def take_unclean(self) -> list[int]:
        """Blocks that have to be filled with zeros by the next plan before it runs, since these were asked for last."""
        unclean, self._unclean = self._unclean, []
        return unclean

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a chain of block hashes; not yet held by the caller.

        It takes no more hashes than it needs.
        """
        found = []
        for digest in hashes:
            if (block := self._block_of.get(digest)) is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: sharing them uses up as many free blocks."""
        return sum(block in self._free for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks returned by `find`."""
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)

    def register(self, block: int, digest: bytes) -> None:
        """Remember a full block's content. The first block with this content stays the known one."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def _forget(self, block: int) -> None:
        """Let nobody find this block any more, whoever holds it."""
        if (known := self._hash_of.pop(block, None)) is not None:
            del self._block_of[known]

    def release(self, blocks: Sequence[int], spoilt: bool = False) -> None:
        """Give up one hold on each block of a request.

        The end of a chain is reused before its start (a prefix is worth more than what follows it), and blocks that
        nobody can find again before all others.

        `spoilt`: let nobody find them, and clear those that nobody holds.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if spoilt:
                self._forget(block)
            if self._holders[block] == 0:
                if spoilt:
                    self._unclean.append(block)
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the pool is intact, given the block lists of all requests."""
        holders = [0] * self.num_blocks
        for blocks in held:
            assert len(set(blocks)) == len(blocks), "a request holds a block twice"
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders, "holders differ from the requests' blocks"
        assert holders[NULL_BLOCK] == 0 and NULL_BLOCK not in self._free, "the null block is in use"
        assert set(self._free) == {block for block in range(1, self.num_blocks) if not holders[block]}, "leaked blocks"
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of, "prefix index is torn"
