"""Fixtures of more than one folder."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.support.oracle import Task, make_task
from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for up to four gloo ranks, started when first used."""
    with Ranks() as pool:
        yield pool


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Task]:
    """The engine's task of a name in MODELS, written and solved once a session."""
    folder = tmp_path_factory.mktemp("tasks")
    return cache(lambda name: make_task(name, folder))
