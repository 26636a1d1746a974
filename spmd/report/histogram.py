"""A histogram of durations whose memory does not grow: logarithmic bins half a percent wide, and exact sums.

Durations are whole nanoseconds inside, so that adding histograms of several ranks gives what one would have counted.
"""

import math
from dataclasses import dataclass, field

BINS_PER_E = 200  # a bin spans a factor of exp(1/200): from a microsecond up its middle is at most 0.3 % off
NANOSECONDS = 1e9


@dataclass(slots=True)
class Histogram:
    """Durations in seconds. `bins` maps floor(BINS_PER_E * ln(nanoseconds)) to a count; at most some 9,000 of them."""

    bins: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total_ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration, as often as it occurred; what is under a nanosecond counts as one."""
        ns = max(int(seconds * NANOSECONDS), 1)
        at = int(math.log(ns) * BINS_PER_E)
        self.bins[at] = self.bins.get(at, 0) + count
        self.count += count
        self.total_ns += ns * count

    def merge(self, other: "Histogram") -> None:
        for at, count in other.bins.items():
            self.bins[at] = self.bins.get(at, 0) + count
        self.count += other.count
        self.total_ns += other.total_ns

    @property
    def mean(self) -> float:
        """Seconds; 0 if nothing was counted."""
        return self.total_ns / NANOSECONDS / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Seconds, interpolated between neighbours as `numpy.percentile` does; 0 if nothing was counted."""
        if not self.count:
            return 0.0
        place = (self.count - 1) * percent / 100
        below, above = self._at(math.floor(place)), self._at(math.ceil(place))
        return below + (above - below) * (place % 1)

    def _at(self, place: int) -> float:
        """The duration, in seconds, that stands at `place` in ascending order, counted from 0."""
        for at in sorted(self.bins):
            place -= self.bins[at]
            if place < 0:
                return math.exp((at + 0.5) / BINS_PER_E) / NANOSECONDS
        raise AssertionError("place lies beyond the last duration")
