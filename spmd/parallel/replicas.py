"""What replicas have to do with one another, as the engine sees it: whose the next row is, and when the run is over.

The rules are in `spmd.schedule.balance`; here they meet the wire. A replica that is alone has none: it makes no
collective, takes every row and admits at once.
"""

from collections.abc import Sequence
from typing import Protocol

from spmd.schedule.balance import Balance, Load, Rules


class Exchange(Protocol):
    """How loads travel: `spmd.parallel.load`, or a simulation."""

    count: int  # launched
    seconds: float  # spent with them

    def launch(self, load: Sequence[int]) -> None: ...

    def receive(self) -> Sequence[Sequence[int]] | None: ...

    def drain(self) -> None: ...


class Alone:
    """The only replica."""

    frozen_ticks = mixed_ticks = exchanges = 0
    exchange_seconds = 0.0

    def __init__(self, rules: Rules) -> None:
        self.wanted = rules.wanted
        self.loads: Sequence[Load] = ()
        self.tokens = 0
        self.stopped = 0
        self.over = False

    def listen(self) -> None: ...

    def next_row(self, held: int) -> bool | None:
        return True if held < self.wanted else None

    def took(self, requests: int) -> None: ...

    def admits(self, tick: int, running: int, waiting: int) -> bool:
        return True

    def report(self, load: Load) -> int | None:
        self.loads = (load,)
        self.tokens += load.tokens
        self.stopped = load.stop
        self.over = load.stop > 0 or load.done
        return None

    def drain(self) -> None: ...


class Exchanging(Balance):
    """One of several replicas, each of which runs at its own pace, at most the exchange's lag apart."""

    def __init__(self, rules: Rules, exchange: Exchange) -> None:
        super().__init__(rules)
        self.exchange = exchange

    def listen(self) -> None:
        self.see(self._receive())

    def report(self, load: Load) -> int | None:
        self.exchange.launch(load)
        return None

    def drain(self) -> None:
        self.exchange.drain()

    @property
    def frozen_ticks(self) -> int:
        return self.gate.frozen_ticks

    @property
    def exchanges(self) -> int:
        return self.exchange.count

    @property
    def exchange_seconds(self) -> float:
        return self.exchange.seconds

    def _receive(self) -> list[Load] | None:
        loads = self.exchange.receive()
        return [Load(*load) for load in loads] if loads else None


class InLockstep(Exchanging):
    """Replicas that share experts: in each tick they agree on the rows of a forward before it.

    The exchange has no lag: a tick's loads are received where they are reported, and seen when the next tick begins.
    """

    def __init__(self, rules: Rules, exchange: Exchange) -> None:
        super().__init__(rules, exchange)
        self.reported: list[Load] | None = None  # in the last tick

    def listen(self) -> None:
        self.see(self.reported)

    def report(self, load: Load) -> int | None:
        self.exchange.launch(load)
        self.reported = self._receive()
        return max(load.rows for load in self.reported or ())
