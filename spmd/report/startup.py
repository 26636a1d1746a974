"""The phases of start-up, and how long they took."""

from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Phases:
    """Phases follow one another without a gap; `seconds` has them by name, in order."""

    since: float  # when the running phase began, on perf_counter's clock
    seconds: dict[str, float] = field(default_factory=dict)

    def end(self, name: str) -> None:
        """The running phase ends and is called `name`; a name used before gets the sum."""
        now = perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
