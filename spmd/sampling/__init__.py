"""Choosing tokens, on the leader of a replica alone."""
