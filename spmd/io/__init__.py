"""Batch files: rows in, answers out."""
