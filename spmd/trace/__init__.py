"""Where the time of a run goes: the phases of a tick, the seconds of each, and a record of every tick."""
