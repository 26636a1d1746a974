"""Tasks of the engine's tests: written and solved once a session."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.support.oracle import Task, make_task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Task]:
    """The task of a name in MODELS."""
    folder = tmp_path_factory.mktemp("tasks")
    return cache(lambda name: make_task(name, folder))
