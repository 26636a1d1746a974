"""An account of a rank's time that adds up: every nanosecond of a run belongs to one part, so the parts make 100 %.

A rank's time is that of its device, which on a CPU is the loop's thread. What a device does is known by its phases
(`spmd.trace.phases`); a forward is shared out further:

- A forward in which no row is a token of a request is a dummy: replicas that share experts run one where they have
  nothing, as the others wait for it.
- Of every other forward, padding has the share that padding rows have of its rows. That is an upper bound of what
  padding costs: where a batch of decodes is bound by reading weights, rows come cheaper than their share.

What a rank does after its replica's last token is committed is its idle tail, until the end of the run; dummy forwards
are counted as such there, too.
"""

from dataclasses import dataclass, field

from spmd.trace.phases import NUM_PHASES, Phase

PARTS = {  # in the order of the table
    "forward": (),  # useful rows; see `Ledger.forward`
    "sample": (Phase.SAMPLE,),
    "padding": (),
    "dummy": (),
    "hidden_wait": (Phase.HIDDEN,),
    "token_wait": (Phase.PACKET, Phase.FEEDBACK, Phase.SAMPLES),
    "row_wait": (Phase.ROWS,),
    "exchange": (Phase.LOADS, Phase.EXCHANGE),
    "host": (
        *(Phase.WATCH, Phase.COMMIT, Phase.LISTEN, Phase.FEED, Phase.SCHEDULE),
        *(Phase.REPORT, Phase.INPUTS, Phase.SEND, Phase.RETURN),
    ),
    "idle_tail": (),
}
BUSY = ("forward", "sample", "padding", "dummy")


@dataclass
class Account:
    """Seconds of each part, summed over as many ranks as were added."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, other: "Account") -> None:
        for part, seconds in other.seconds.items():
            self.seconds[part] += seconds

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def busy(self) -> float:
        """In forwards and sampling, whatever they were good for."""
        return sum(self.seconds[part] for part in BUSY)

    def percent(self) -> dict[str, float]:
        """Of the wall time; all 0 if there was none."""
        wall = self.wall
        return {part: 100 * seconds / wall if wall else 0.0 for part, seconds in self.seconds.items()}


class Ledger:
    """Nanoseconds of each phase of one rank, as they come in."""

    def __init__(self) -> None:
        self.ns = [0] * NUM_PHASES
        self.padding_ns = self.dummy_ns = 0  # of those of FORWARD
        self._settled = [0] * NUM_PHASES

    def forward(self, ns: int, rows: int, useful: int) -> None:
        """A forward of so many rows, of which some were tokens of requests."""
        self.ns[Phase.FORWARD] += ns
        if not useful:
            self.dummy_ns += ns
        elif useful < rows:
            self.padding_ns += ns * (rows - useful) // rows

    def settle(self) -> None:
        """Tokens were committed: all until now was before the replica's last one."""
        self._settled = self.ns.copy()

    def account(self, wall: float) -> Account:
        """Of a run of `wall` seconds; what isn't in any phase came after the loop."""
        account = Account()
        for part, phases in PARTS.items():
            account.seconds[part] = sum(self._settled[phase] for phase in phases) / 1e9
        forward, sample = self.ns[Phase.FORWARD], self.ns[Phase.SAMPLE]
        busy = {"padding": self.padding_ns, "dummy": self.dummy_ns, "sample": sample}
        busy["forward"] = forward - self.padding_ns - self.dummy_ns
        account.seconds |= {part: ns / 1e9 for part, ns in busy.items()}
        account.seconds["idle_tail"] = max(0.0, wall - account.wall)
        return account
