"""Who runs when: pure Python, never imports torch, equal on every rank of a replica."""
