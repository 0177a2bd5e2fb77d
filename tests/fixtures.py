"""Fixtures of stores and servers that tests of many subjects share.

tests/conftest.py imports those of places and servers; a module makes its own fixture ``store`` of the kinds
that it is about.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from tests.shared_stores import SHARED, place, store_of


def store_fixture(*kinds: str) -> Any:
    """Return a fixture ``store``: an empty store of each kind in turn; see tests/shared_stores.py."""

    @pytest.fixture(params=kinds)
    def store(request: pytest.FixtureRequest) -> Iterator[Any]:
        with store_of(request.param) as instance:
            yield instance

    return store


@pytest.fixture(params=SHARED)
def journal(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The kind and the place of a store that processes can share, one kind after the other."""
    with place(request.param) as where:
        yield request.param, where


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The time of waits and of due runs, which a test moves."""
    from tests.flows.steps import Clock

    return Clock(monkeypatch)


@pytest.fixture(scope="session")
def provider() -> Iterator[Any]:
    """A provider of models on localhost that a test controls; see tests/providers/server.py."""
    from tests.providers.server import serving

    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def temporal_server() -> Iterator[Any]:
    """A Temporal server that nobody kills.

    It starts in 0.4 s of a core, and takes 3.5 % of one while it is idle: too much for a whole session.
    """
    from tests.servers_temporal import TemporalServer

    instance = TemporalServer()
    yield instance
    instance.kill()
