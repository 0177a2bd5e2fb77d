"""A few rounds of the faults of a Temporal cluster: `./dev chaos --fault temporal-worker --rounds 200` has many.

Each round has one or two runs of 20 nodes in groups, with two attempts that fail.
"""

import pytest
from tests.chaos.cluster_worker import COMMITS, NODES
from tests.chaos.test_faults import strike


@pytest.mark.nightly
def test_workers_that_are_killed_at_random() -> None:
    """No attempt is called after its end is kept, each place has one output, the cost is exact, every run ends."""
    assert len(NODES) == 20
    figures = strike("temporal-worker", 10)
    assert figures["kills"] >= 8
    assert figures["commits"] == COMMITS * figures["runs"]


@pytest.mark.nightly
def test_a_server_that_is_killed_at_random() -> None:
    """The same with a server that comes back with what its file has."""
    figures = strike("temporal-server", 2)
    assert figures["server kills"] >= 2
    assert figures["commits"] == COMMITS * figures["runs"]


@pytest.mark.nightly
def test_a_worker_that_is_stopped_and_continued_is_fenced() -> None:
    """What it ends after others have done its work changes nothing: no output, no cost, no state."""
    figures = strike("temporal-stop", 2)
    assert figures["fenced"] >= 2
    assert figures["commits"] == COMMITS * figures["runs"]
