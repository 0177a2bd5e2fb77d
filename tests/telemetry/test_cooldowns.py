"""Cooldowns of limits in every exporter that has metrics, in the logs, and listed from a store."""

import logging
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.limits.budget_helper import State
from tests.limits.test_cooldown import NAMES, NO_RETRY, Refused, node_of
from tests.shared_stores import STORES
from tests.telemetry.test_labels import Systems

from stroma import Limit, StromaRunner
from stroma.limits.rate_limit import read_cooldowns, read_limit
from stroma.telemetry import log_hooks

pytest_plugins = ["tests.receivers.fixtures"]

store = store_fixture(*STORES)


async def close_limit(name: str, hooks: Any = None, store: Any = None, seconds: str = "20") -> None:
    """Run a node whose call closes a limit."""

    async def function(n: int) -> None:
        raise Refused(429, retry_after=seconds)

    limits = {name: Limit(requests_per_minute=100, store=store)}
    runner = StromaRunner.quick(
        limits=limits, node_limits={"call": name}, policy_map=NO_RETRY, hooks=hooks, pipeline="letters"
    )
    await runner.run([node_of(function)], State(n=1))


async def test_all_systems_count_cooldowns() -> None:
    """Each system counts the cooldowns that calls of a pipeline have begun, by limit."""
    systems, name = Systems(), next(NAMES)
    await close_limit(name, systems.hooks())
    names = ("stroma.limit.cooldowns", "stroma_limit_cooldowns_total", "stroma.limit.cooldowns")
    assert systems.counts(*names) == [{tuple(sorted(("letters", name))): 1}] * 3


async def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Both log_hooks and the engine write a warning."""
    name = next(NAMES)
    with caplog.at_level(logging.INFO):
        await close_limit(name, log_hooks())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(
        line.endswith(f": limit '{name}' is closed for 20 s because the provider asked to wait")
        for line in warnings
    )
    assert any(
        line.startswith("limit cooldown:") and f"limit={name} delay_s=20.0" in line for line in warnings
    )


async def test_closed_limits_are_found_in_a_store(store: Any) -> None:
    """The limits of a store that are closed can be listed, those that are open again not."""
    first, second = next(NAMES), next(NAMES)
    await close_limit(first, store=store)
    await close_limit(second, store=store, seconds="60")
    await store.change_cell("cooldowns", lambda data, now: (None, None))  # After what was posted before.
    closed = read_cooldowns(store)
    assert sorted(closed) == [first, second]
    assert 55_000 < closed[second] <= 60_000
    state = read_limit(store, first)
    assert (state.requests, state.tokens, state.calls) == (1, 0, 0)
    assert read_limit(store, "other") is None
