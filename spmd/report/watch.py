"""Several onlookers of one loop: what is called with the engine after every tick."""

from collections.abc import Callable
from typing import Any

Watch = Callable[[Any], None]  # an Engine, which stands above this package


def all_of(*watches: Watch | None) -> Watch | None:
    """One that calls those given, in order; None if there are none, so that a tick pays nothing."""
    present = [watch for watch in watches if watch]
    if len(present) < 2:
        return present[0] if present else None

    def watch(engine: Any) -> None:
        for each in present:
            each(engine)

    return watch
