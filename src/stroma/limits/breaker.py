"""Circuit breaker: stop calling a failing provider for a while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from stroma._utils.access import causes_of, safe_get
from stroma._utils.forks import process_lock
from stroma.cost.usage import shown
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure
from stroma.limits.gate import check_max_wait, positive_int, positive_number

CircuitState = Literal["closed", "open", "half_open"]

#: Reasons of failures of a provider. A rate limit (429) is none: limits= and Retry-After are for those.
_PROVIDER_REASONS: Final = frozenset({"connection", "timeout", "server_error", "overloaded"})
#: Reasons that say nothing about the provider, since they arise locally.
_LOCAL_REASONS: Final = frozenset({"budget", "usage", "not_serialisable", "store"})

# One lock for all breakers: it is held for microseconds.
_lock = process_lock()


class Entry(NamedTuple):
    """Answer to a request to make a call.

    Attributes:
        wait_seconds: time until the next request; None: the call may be made.
        probe: the call is the one that tests if the provider has recovered.
        changed: the new state of the circuit, if it changed.
    """

    wait_seconds: float | None = None
    probe: bool = False
    changed: CircuitState | None = None


@dataclass
class _Circuit:
    state: CircuitState = "closed"
    opened: float = 0.0
    probing: bool = False
    #: (time, success) of the calls in the window; ``failed`` counts those without success.
    calls: deque[tuple[float, bool]] = field(default_factory=deque)
    failed: int = 0


def _now() -> float:
    return time.monotonic()


class Breaker:
    """A circuit breaker for each provider, shared by all runs of this process that use this object.

    The name of a circuit is the provider's host, taken from the exception of the last failed call of the
    node in its pipeline; before that, it is the limit of the node (``limit 'llm'``). A circuit is closed
    until a share of ``failure_rate`` of at least ``min_calls`` calls in the last ``window_seconds`` has
    failed: then it opens, and no call is made for ``open_seconds``. After that one call probes the provider
    (half-open): the circuit closes if it succeeds, and opens again otherwise. A node that calls several
    hosts has one circuit.

    A provider that cannot be reached, times out, is overloaded or has an internal error (5xx) counts as a
    failure. A refused request (400, 401 ...) and a rate limit (429) count as successes, since the provider
    works. An attempt waits while the circuit is open; this uses none of its retries.

    Attributes:
        failure_rate: share of failed calls that opens a circuit, above 0, at most 1.
        min_calls: number of calls in the window below which a circuit stays closed.
        window_seconds: time in which calls count.
        open_seconds: time without calls, until one call probes the provider.
        max_wait_seconds: maximum wait of an attempt; then its run ends as PARTIAL. 0: no wait. None: no
            maximum.

    Raises ValueError for an invalid value.
    """

    def __init__(
        self,
        *,
        failure_rate: float = 0.5,
        min_calls: int = 10,
        window_seconds: float = 60.0,
        open_seconds: float = 30.0,
        max_wait_seconds: float | None = 60.0,
        _clock: Callable[[], float] | None = None,
    ) -> None:
        self.failure_rate = positive_number("failure_rate", failure_rate, "a share")
        if self.failure_rate > 1:
            raise ValueError(f"failure_rate must be above 0 and at most 1, got {shown(failure_rate)}")
        self.min_calls = positive_int("min_calls", min_calls)
        self.window_seconds = positive_number("window_seconds", window_seconds, "seconds")
        self.open_seconds = positive_number("open_seconds", open_seconds, "seconds")
        self.max_wait_seconds = check_max_wait(max_wait_seconds)
        self._clock = _clock or _now
        self._circuits: dict[str, _Circuit] = {}
        #: The host of the last failed call, by pipeline and node.
        self._hosts: dict[tuple[str, str], str] = {}

    def __copy__(self) -> Breaker:
        return self  # Runs share it, so copies of a config do too.

    def __deepcopy__(self, memo: object) -> Breaker:
        return self

    @staticmethod
    def verdict(failure: Failure) -> bool | None:
        """Return True if a failed attempt shows that the provider works, False if not, else None."""
        if failure.reason in _PROVIDER_REASONS and failure.failure_class is not FailureClass.TERMINAL:
            return False
        if failure.reason is None or failure.reason in _LOCAL_REASONS:
            return None
        if failure.reason == "contract":  # It has answered, unless the input was rejected locally.
            return True if safe_get(failure.exception, "direction") == "output" else None
        return True

    def states(self) -> dict[str, CircuitState]:
        """Return the state of each circuit with a counted call, by host or limit."""
        return {key: circuit.state for key, circuit in list(self._circuits.items())}

    def key_of(self, node: tuple[str, str], limit: str | None) -> str | None:
        """Return the circuit of a call of a node (pipeline, node id); None while it is unknown."""
        return self._hosts.get(node, limit)

    def enter(self, key: str) -> Entry:
        """Request to make a call. A caller that may make it reports its outcome with leave()."""
        with _lock:
            circuit = self._circuits.get(key)
            if circuit is None or circuit.state == "closed":
                return Entry()
            wait_seconds = circuit.opened + self.open_seconds - self._clock()
            if circuit.state == "open" and wait_seconds > 0:
                return Entry(wait_seconds)
            if circuit.probing:
                return Entry(0.0)
            changed: CircuitState | None = "half_open" if circuit.state == "open" else None
            circuit.state, circuit.probing = "half_open", True
            return Entry(probe=True, changed=changed)

    def leave(self, key: str | None, succeeded: bool | None, *, probe: bool) -> CircuitState | None:
        """Count a call (None: no verdict on the provider). Return the circuit's new state, if it changed."""
        if key is None:
            return None
        with _lock:
            circuit = self._circuits.setdefault(key, _Circuit())
            now = self._clock()
            if probe:
                circuit.probing = False
                if succeeded is None or circuit.state != "half_open":
                    return None
                circuit.calls.clear()
                circuit.failed = 0
                circuit.state, circuit.opened = ("closed", 0.0) if succeeded else ("open", now)
                return circuit.state
            if succeeded is None or circuit.state != "closed":  # It began before the circuit opened.
                return None
            circuit.calls.append((now, succeeded))
            circuit.failed += not succeeded
            while circuit.calls[0][0] <= now - self.window_seconds:
                circuit.failed -= not circuit.calls.popleft()[1]
            if (
                succeeded
                or len(circuit.calls) < self.min_calls
                or circuit.failed < self.failure_rate * len(circuit.calls)
            ):
                return None
            circuit.state, circuit.opened = "open", now
            return "open"

    def learn(self, node: tuple[str, str], failure: Failure, key: str | None) -> str | None:
        """Return the circuit of a failed call: that of the host in the exception, else ``key``."""
        host = host_of(failure.exception)
        if host is None:
            return key
        self._hosts[node] = host
        return host


def check_breaker(value: object) -> Breaker:
    """Return the breaker. Raises ValueError for any other object."""
    if not isinstance(value, Breaker):
        raise ValueError(f"breaker must be a Breaker, got {shown(value)}")
    return value


# ---------------------------------------------------------------------- host of a failure


def host_of(error: BaseException) -> str | None:
    """Return the host of a failed call from the attributes of an exception; None if it has none.

    Reads its causes too: SDKs wrap the exceptions of their HTTP client.
    """
    candidates = (one for cause in causes_of(error, 4) for one in _host_candidates(cause))
    return next((host for one in candidates if (host := _host(one)) is not None), None)


def _host_candidates(error: BaseException) -> Iterator[Any]:
    request = safe_get(error, "request")  # httpx, openai, anthropic, requests
    yield safe_get(request, "url")
    response = safe_get(error, "response")
    yield safe_get(response, "url")
    yield safe_get(safe_get(response, "request"), "url")
    info = safe_get(error, "request_info")  # aiohttp
    yield safe_get(info, "real_url") or safe_get(info, "url")
    yield safe_get(safe_get(error, "kwargs"), "endpoint_url")  # botocore
    yield safe_get(error, "url")  # urllib
    connection = safe_get(error, "host")  # aiohttp, if no connection was made
    if isinstance(connection, str) and connection:
        yield f"//{connection}"


def _host(url: Any) -> str | None:
    if url is None:
        return None
    host = safe_get(url, "host")
    if isinstance(host, str) and host:
        return host.lower()
    try:
        text = url if isinstance(url, str) else str(url)
        return urlsplit(text).hostname if "//" in text else None
    except Exception:
        return None
