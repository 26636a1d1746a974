"""The rows' way in, off the loop: read, checked, rendered and tokenized ahead of it, once a node."""
