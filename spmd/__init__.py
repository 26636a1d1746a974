"""An SPMD batch-inference engine for large language models: every rank runs the same loop."""

from time import perf_counter

STARTED = perf_counter()  # before torch is imported: as early as code of ours can tell
