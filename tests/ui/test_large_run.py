"""The page of a run of 1,000 nodes and 2,000 attempts."""

import asyncio
import gzip
from typing import Any

import pytest
from tests.ui.conftest import Site, State, node

from stroma import FailurePolicy, Pipeline, SQLiteStore, StromaRunner, current_node

NODES = 1000


async def _twice(state: Any) -> Any:
    at = current_node()
    if at.attempt == 1:
        raise TimeoutError(f"the provider took too long for {at.node_id}")
    return {"n": state.n + 1, "text": "x"}, 120, 20, "gpt-4o-mini"


def make_large_run(store: SQLiteStore) -> None:
    pipeline = Pipeline("flows", [node(f"step-{number}", _twice) for number in range(NODES)])
    again = {"RECOVERABLE": FailurePolicy(max_retries=1, backoff_seconds=0.0)}
    runner = StromaRunner.quick(store=store, policy_map=again)
    asyncio.run(runner.run(pipeline, State(text="x"), run_id="large"))


@pytest.fixture
def large(store: SQLiteStore, serve: Any) -> Site:
    make_large_run(store)
    site: Site = serve(store)
    return site


def test_its_size(large: Site) -> None:
    """It is one page with every attempt, and takes less than 100 kB on the wire if it is compressed."""
    plain = large.get("/run", id="large")
    packed = large.ask("GET", "/run?id=large", accept_encoding="br, gzip;q=0.8")
    assert "content-encoding" not in plain.headers
    assert plain.text.count("<tr data-row>") == 2 * NODES
    assert plain.text.count('<rect class="b-success"') == plain.text.count('<rect class="b-failure"') == NODES
    assert 'rel="next"' not in plain.text
    assert packed.headers["content-encoding"] == "gzip"
    assert len(packed.body) < 100_000
    assert int(packed.headers["content-length"]) == len(packed.body)
    # All but the keys of its forms, which are of the moment.
    assert len(gzip.decompress(packed.body)) == len(plain.body)
