"""The demo: a tiny model of ours that adds two numbers, how it was trained, and prompts it has never seen."""
