"""An SPMD batch-inference engine for large language models: every rank runs the same loop."""

import os
from time import perf_counter

STARTED = perf_counter()  # before torch is imported: as early as code of ours can tell

# Threads of GNU OpenMP, which torch computes with on CPUs, spin for milliseconds while they wait for each other. On
# cores that others use too that leaves a fifth of the speed; with so short a spin half of it, and alone no less. It is
# read when torch is loaded, which comes later.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
