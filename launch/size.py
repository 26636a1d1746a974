"""Prints how many processes a run needs: dp * pp * tp of the composed config, which it checks on the way.

Imports no torch, so that a mistake shows in a second, once, and before any rank starts.
"""

import sys

from spmd.config_checks import check
from spmd.runtime.compose import compose, tell
from spmd.signals import USAGE

if __name__ == "__main__":
    try:
        config = compose()
        size = config.topology.dp * config.topology.pp * config.topology.tp
        check(config, size)
    except ValueError as error:
        tell(error)
        sys.exit(USAGE)
    print(size)
