"""Fixtures of more than one folder."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for up to four gloo ranks, started when first used."""
    with Ranks() as pool:
        yield pool
