"""The phases that a rank's tick is cut into. They follow one another without a gap, in this order.

A phase that may wait is split in two: the wait stands before it, and is drawn there, wherever in it the waiting was.
"""

from enum import IntEnum


class Phase(IntEnum):
    """What a rank does; each member's number is its place in the tick."""

    WATCH = 0  # between two ticks: progress, journal, this trace
    PACKET = 1  # wait: for the token packet of the oldest plan in flight; on the leader for its samples, too
    COMMIT = 2
    LOADS = 3  # wait: for what the other replicas reported some ticks ago
    LISTEN = 4
    ROWS = 5  # wait: for rows that aren't read yet
    FEED = 6
    SCHEDULE = 7
    EXCHANGE = 8  # launching the exchange of loads; in lockstep also the wait for it
    REPORT = 9
    FEEDBACK = 10  # wait: of the first stage, for tokens from the leader's device
    INPUTS = 11
    HIDDEN = 12  # wait: for hidden states of the previous stage
    FORWARD = 13
    SAMPLE = 14
    SEND = 15  # hidden states to the next stage, tokens to the first one
    SAMPLES = 16  # wait: of the leader, for samples to come from its device
    RETURN = 17  # judging them, and starting the token packet


NUM_PHASES = len(Phase)
