"""One rank's share of a tick, and what it takes of its device."""
