"""Data-parallel balance: whose the next row is, when new requests may be admitted, and when all work is done.

Replicas report one `Load` a tick to each other. What tick t knows is what all replicas reported at tick `t - 1 - lag`,
on every rank the same, so all ranks come to the same decisions at the same tick and nobody has to announce one.
Replicas are at most `lag` ticks apart. How loads travel, and what a replica alone does: `spmd.parallel.replicas`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spmd.integers import ceil_div
from spmd.schedule.digests import Diverged

EXHAUSTED = 1  # flag: the list has no more rows, and nobody stands aside
RESERVE = 8  # seats to one row that waits for one


class Load(NamedTuple):
    """What a replica reports in a tick, once its plan is made; int32 each. All its ranks report the same."""

    running: int  # seated requests
    waiting: int  # in the line for a seat
    free_blocks: int
    prompt_tokens: int  # of this tick's plan
    decode_rows: int  # of this tick's plan
    rows: int  # of this tick's forward, padding included
    claimed: int  # own rows taken from the list so far
    flags: int
    stop: int  # who asked the run to stop (`spmd.signals`), as all ranks of the replica learned; 0: nobody
    passed: int  # rows of the list gone through so far, for any replica
    tokens: int  # output tokens committed in this tick

    @property
    def done(self) -> bool:
        """Whether the replica has nothing left to do."""
        return bool(self.flags & EXHAUSTED) and not self.running + self.waiting


@dataclass(frozen=True)
class Rules:
    """See `spmd.config.BalanceConfig` for the keys."""

    max_num_seqs: int
    by_priority: bool = False
    dp: int = 1
    dp_rank: int = 0
    share: str = "dynamic"
    gate: str = "off"
    interval: int = 2
    patience: int = 64
    lag: int = 4

    @property
    def wanted(self) -> int:
        """Requests that a replica should have so that no seat is empty; by priority it looks at as many again."""
        return self.max_num_seqs * (2 if self.by_priority else 1)


class Turns:
    """share=static: row i is replica `i % dp`'s. Each reads on, past the others' rows, when it has room itself."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.turn = -1

    def see(self, loads: Sequence[Load] | None) -> None:
        """Which replica has how much to do makes no difference."""

    def next(self, held: int) -> bool | None:
        """Whether the next row is this replica's, which has `held` requests; None: leave it for a later tick."""
        if held >= self.rules.wanted:
            return None
        self.turn += 1
        return self.turn % self.rules.dp == self.rules.dp_rank

    def took(self, requests: int) -> None:
        """The row has so many requests; 0: it isn't there yet, and the turn is the same when it comes."""
        self.turn -= requests == 0


class Demand:
    """share=dynamic: the next row is the replica's that lacks most, as far as is known to all.

    A replica should have a request for every seat and a few that wait, so that seats which become free are filled at
    once although the others learn of it `1 + lag` ticks late: a seat in RESERVE refills all if requests have some
    `8 * (1 + lag)` tokens or more. More would wait in vain at one replica while another runs dry at the end.
    Rows allotted since the loads were reported count as the requests that they have.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.wanted = rules.wanted if rules.by_priority else rules.wanted + ceil_div(rules.max_num_seqs, RESERVE)
        self.neediest = 0  # who got the last row
        self.lacks = [self.wanted] * rules.dp
        self.free_blocks = [0] * rules.dp
        self.allotted = [0] * rules.dp  # requests, in this tick
        self.recent: deque[list[int]] = deque(maxlen=rules.lag)  # in ticks that the loads don't show

    def see(self, loads: Sequence[Load] | None) -> None:
        """A tick begins, with the latest loads; None: there are none yet, so the replicas are empty."""
        self.recent.append(self.allotted)
        self.allotted = [0] * self.rules.dp
        for replica in range(self.rules.dp):
            has = sum(allotted[replica] for allotted in self.recent)
            if loads:
                has += loads[replica].running + loads[replica].waiting
                self.free_blocks[replica] = loads[replica].free_blocks
            self.lacks[replica] = self.wanted - has

    def next(self, held: int) -> bool | None:
        """Whether the next row is this replica's; None: nobody needs it yet. Every rank must ask until then."""
        lacks, free = self.lacks, self.free_blocks
        replica = max(range(self.rules.dp), key=lambda replica: (lacks[replica], free[replica], -replica))
        if lacks[replica] <= 0:
            return None
        self._allot(replica, 1)
        self.neediest = replica
        return replica == self.rules.dp_rank

    def took(self, requests: int) -> None:
        """The row has so many requests; 0: it isn't there yet, so nobody has got it."""
        self._allot(self.neediest, requests - 1)

    def _allot(self, replica: int, requests: int) -> None:
        self.lacks[replica] -= requests
        self.allotted[replica] += requests


class Gate:
    """Holds back requests that could be seated, so that replicas fill their seats at the same ticks.

    Never a replica with nobody running: it would stand still. And none for more than `patience` ticks on end: one
    that runs long requests on all its seats would stop the others for as long.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.full = rules.max_num_seqs - (rules.gate == "near")
        self.held = 0  # ticks for which somebody has been held back
        self.frozen_ticks = 0  # such ticks in all

    def open(self, loads: Sequence[Load], tick: int, running: int, waiting: int) -> bool:
        """Whether this replica may admit in this tick, given its own requests."""
        if not self._closed(loads, tick):
            self.held = 0
            return True
        if not waiting or running == self.rules.max_num_seqs:
            self.held = 0
            return False
        if not running or self.held == self.rules.patience:
            self.held = 0
            return True
        self.held += 1
        self.frozen_ticks += 1
        return False

    def _closed(self, loads: Sequence[Load], tick: int) -> bool:
        if self.rules.gate == "off":
            return False
        if self.rules.gate == "interval":
            return tick % self.rules.interval != 0
        return any(load.running >= self.full for load in loads)


class Balance:
    """One replica's part in the balance of several; equal on all its ranks. See `spmd.engine.Replicas`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.deal = Demand(rules) if rules.share == "dynamic" else Turns(rules)
        self.gate = Gate(rules)
        self.loads: Sequence[Load] = ()
        self.over = False  # no replica has or gets any more work, or all stop
        self.stopped = 0
        self.mixed_ticks = 0
        self.tokens = 0

    def see(self, loads: Sequence[Load] | None) -> None:
        """A tick begins, with what all replicas reported `1 + lag` ticks ago; None: that was before the first tick.

        Raises:
            Diverged: replicas share one list and yet aren't at the same place in it.
        """
        self.deal.see(loads)
        if loads is None:
            return
        self.loads = loads
        self.stopped = max(load.stop for load in loads)
        self.over = self.stopped > 0 or all(load.done for load in loads)
        self._check(loads)
        self.tokens += sum(load.tokens for load in loads)
        self.mixed_ticks += _mixed(loads)

    def _check(self, loads: Sequence[Load]) -> None:
        """Rows shared by demand are gone through in step."""
        passed = [load.passed for load in loads]
        if isinstance(self.deal, Demand) and len(set(passed)) > 1:
            raise Diverged(f"replicas have gone through different numbers of rows at the same tick: {passed}")

    def next_row(self, held: int) -> bool | None:
        return self.deal.next(held)

    def took(self, requests: int) -> None:
        self.deal.took(requests)

    def admits(self, tick: int, running: int, waiting: int) -> bool:
        return self.gate.open(self.loads, tick, running, waiting)


def _mixed(loads: Sequence[Load]) -> bool:
    prompts = any(load.prompt_tokens for load in loads)
    return prompts and any(load.decode_rows and not load.prompt_tokens for load in loads)
