"""The receivers as fixtures. A test module asks for them with `pytest_plugins =
["tests.receivers.fixtures"]`.

What takes long to start is started once per process of the tests and emptied before each test that uses it. A
receiver module is imported only by the fixture that needs it, as the SDKs take their time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.receivers.datadog import DatadogAgent, StatsdSocket
    from tests.receivers.otlp import OtlpReceiver
    from tests.receivers.prometheus import SharedPrometheus
    from tests.receivers.sentry import RecordedSentry, SentryServer


@pytest.fixture
def otlp() -> Iterator[OtlpReceiver]:
    """A receiver of OTLP over HTTP."""
    from tests.receivers.otlp import OtlpReceiver

    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def prometheus() -> Iterator[SharedPrometheus]:
    """A Prometheus server: `prometheus.exposing(registry)`, then `scraped()` and `value(...)`."""
    from tests.receivers.prometheus import SharedPrometheus

    server = SharedPrometheus()
    yield server
    server.close()


@pytest.fixture(scope="session")
def _datadog_process() -> Iterator[DatadogAgent]:
    from tests.receivers.datadog import DatadogAgent

    with DatadogAgent() as agent:
        yield agent


@pytest.fixture
def datadog_agent(_datadog_process: DatadogAgent) -> DatadogAgent:
    """Datadog's test agent, empty."""
    _datadog_process.clear()
    return _datadog_process


@pytest.fixture
def statsd() -> Iterator[StatsdSocket]:
    """A UDP socket for DogStatsD."""
    from tests.receivers.datadog import StatsdSocket

    with StatsdSocket() as socket:
        yield socket


@pytest.fixture
def sentry() -> Iterator[RecordedSentry]:
    """A Sentry client that keeps what it would have sent."""
    from tests.receivers.sentry import RecordedSentry

    with RecordedSentry() as recorded:
        yield recorded


@pytest.fixture
def sentry_server() -> Iterator[SentryServer]:
    """A Sentry server, for the SDK in a child process."""
    from tests.receivers.sentry import SentryServer

    with SentryServer() as server:
        yield server
