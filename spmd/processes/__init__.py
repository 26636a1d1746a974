"""Beside the loop: rows are read, checked, rendered and tokenized ahead of it, answers made and written behind it."""
