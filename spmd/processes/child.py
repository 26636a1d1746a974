"""A process forked from a rank to work beside it, which ends when that rank does."""

import os
import signal
from collections.abc import Callable

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # the rank heeds them
MOST_FILES = 2**20  # file descriptors


def fork(work: Callable[[], None], channel: int) -> int:
    """Start a child that does `work`, and returns its process id. To be called before there are threads or a GPU.

    Args:
        channel: the file descriptor through which the child hears of its rank. It holds no other one of this process,
            so a peer of any of these sees its end as if there were no child.
    """
    if pid := os.fork():
        return pid
    try:
        os.closerange(3, channel)
        os.closerange(channel + 1, MOST_FILES)
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        work()
    finally:
        os._exit(0)
