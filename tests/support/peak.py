"""Runs the main job in this process and prints, as the last word, its peak memory in bytes."""

import resource

from spmd.generate import generate
from spmd.runtime.main import main

if __name__ == "__main__":
    main(generate)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
