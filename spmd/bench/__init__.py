"""Measurements anyone can repeat: a synthetic workload, ratios on this machine, the host's share of a tick."""
