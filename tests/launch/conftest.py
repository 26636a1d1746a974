"""A stand-in for Python that prints how the launcher would start the ranks, instead of starting them."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder like a ready venv, whose python runs scripts, but prints the arguments of torchrun and of `-m`."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
case $1 in
  -m | */launch/torchrun.py)
    printf '%s\\n' "$@" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "OMP_WAIT_POLICY=$OMP_WAIT_POLICY" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    (tmp_path / "venv" / ".ready").touch()
    return tmp_path / "venv"
