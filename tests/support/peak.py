"""Runs the main job in this process and prints, as the last word, its peak memory in bytes."""

import resource

from spmd.runtime.main import main
from tests.support.jobs import generate_here

if __name__ == "__main__":
    main(generate_here)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
