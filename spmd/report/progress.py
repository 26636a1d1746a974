"""What a person sees while a run works: a tqdm bar on a terminal, a line now and then in a log."""

import sys
from typing import TextIO

from tqdm import tqdm

BAR_EVERY, LINE_EVERY = 0.25, 30.0  # seconds
SMOOTHING = 0.3  # weight of the newest interval in tokens/s


def estimate_rows(rows_read: int, bytes_read: int, bytes_in_all: int) -> int | None:
    """Rows of an input that is still being read, from the mean length of those that were; None before the first."""
    return round(rows_read * bytes_in_all / bytes_read) if bytes_read else None


class Progress:
    """Made on rank 0 alone. Counts are cumulative and of the whole run; `now` is in seconds, of any steady clock."""

    def __init__(self, now: float, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.stderr
        self.bar = None
        if enabled and self.stream.isatty():
            self.bar = tqdm(unit=" rows", file=self.stream, dynamic_ncols=True)
        self.every = LINE_EVERY if self.bar is None else BAR_EVERY
        self.started = self.shown = now
        self.tokens = 0  # when last shown
        self.rate: float | None = None  # smoothed tokens/s

    def update(self, now: float, rows: int, total: int | None, tokens: int, running: int, waiting: int) -> None:
        """Show how far the run is, unless that was shown a moment ago: cheap enough for every tick.

        `total` is the number of rows, exact or estimated; None if nothing is known. `tokens` are output tokens.
        """
        if not self.enabled or now - self.shown < self.every:
            return
        rate = (tokens - self.tokens) / (now - self.shown)
        self.rate = rate if self.rate is None else self.rate + SMOOTHING * (rate - self.rate)
        self.shown, self.tokens = now, tokens
        self._show(now, rows, total, f"{self.rate:,.0f} tok/s, running {running:,}, waiting {waiting:,}")

    def finish(self, now: float, rows: int, tokens: int) -> None:
        """Show the end of the run, with its mean rate, and let go of the terminal."""
        if self.enabled:
            self._show(now, rows, rows, f"{tokens / max(now - self.started, 1e-9):,.0f} tok/s")
        if self.bar is not None:
            self.bar.close()

    def _show(self, now: float, rows: int, total: int | None, state: str) -> None:
        if self.bar is not None:
            self.bar.n, self.bar.total = rows, total
            self.bar.set_postfix_str(state)
        else:
            of = "" if total is None else f" of {total:,}"
            print(f"{now - self.started:,.0f} s: {rows:,}{of} rows, {state}", file=self.stream, flush=True)
