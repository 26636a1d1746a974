"""How ranks of a replica tell that they are still alike: running digests of all that they have planned and committed.

Each plan bears the digests as they stand after it, one for each thing that can differ, so that two ranks that have
drifted apart can say at which tick and in what. They are chained: a difference never goes away again.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from zlib import crc32

from spmd.schedule.plan import Plan

FIELDS = ("tokens", "requests", "positions", "blocks")  # in the order in which a tick comes to them
WHAT = {
    "tokens": "the sampled tokens and ends that were committed before",
    "requests": "which requests run, in which seats",
    "positions": "how many tokens of each request run",
    "blocks": "which KV blocks they get",
}
Digests = tuple[int, ...]  # a digest for each of FIELDS
NO_DIGESTS: Digests = (0,) * len(FIELDS)  # where nobody compares


class Diverged(RuntimeError):
    """This rank has planned or committed something else than a peer."""


class DigestChain:
    """The digests of one rank."""

    def __init__(self, keep: Callable[[int, Digests], None] | None = None) -> None:
        """`keep(tick, digests)` is called with every plan's."""
        self.keep = keep
        self.requests = self.positions = self.blocks = self.tokens = 0

    def compare(self, plan: Plan, theirs: Digests) -> None:
        """Compare those of a plan with the leader's.

        Raises:
            Diverged: they differ.
        """
        if difference := first_difference(plan.digests, theirs):
            raise Diverged(f"tick {plan.tick}: {difference} differ from the leader's")

    def commit(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Tokens, and whether they end their requests, as they are committed."""
        if tokens:
            self.tokens = _chained(self.tokens, chain(tokens, finished))

    def plan(self, plan: Plan) -> Digests:
        """The digests of a plan that was just made; an empty one differs from another in its tick alone."""
        if plan.requests:
            who = (number for request in plan.requests for number in (request.index, request.choice, request.seat))
            self.requests = _chained(self.requests, chain((plan.tick, plan.padded_decodes), who))
            self.positions = _chained(self.positions, chain(plan.starts, plan.counts))
        if plan.new_blocks:
            self.blocks = _chained(self.blocks, chain.from_iterable(plan.new_blocks))
        digests = self.tokens, self.requests, self.positions, self.blocks
        if self.keep:
            self.keep(plan.tick, digests)
        return digests


class Undigested:
    """In place of a DigestChain where there is no rank to compare with, or nobody asks."""

    def plan(self, plan: Plan) -> Digests:
        return NO_DIGESTS

    def compare(self, plan: Plan, theirs: Digests) -> None: ...

    def commit(self, tokens: Sequence[int], finished: Sequence[bool]) -> None: ...


def first_difference(ours: Digests, theirs: Digests) -> str | None:
    """The first of FIELDS in which two ranks differ."""
    return next((name for name, a, b in zip(FIELDS, ours, theirs, strict=True) if a != b), None)


def _chained(before: int, numbers: Iterable[int]) -> int:
    return crc32(array("q", numbers), before)
