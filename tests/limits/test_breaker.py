"""Breakers: when a provider is left alone, when it is tried again, and whose failures count."""

import asyncio
import copy
import math
import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import requests
from tests.kit import NEVER, failing_with, node, noting
from tests.limits.budget_helper import State
from tests.providers.server import Answer, Server

from stroma import (
    AsyncInMemoryStore,
    Breaker,
    BudgetExceeded,
    CircuitOpen,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    Limit,
    NodeHooks,
    NotDone,
    Pipeline,
    RunConfig,
    RunStatus,
    StromaRunner,
    Unknown,
    stroma_node,
)
from stroma.failures import NodeContext
from stroma.failures.failure import diagnose
from stroma.limits.breaker import host_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def breaker(**options: Any) -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(**{"min_calls": 4, "open_seconds": 30, **options}, _clock=clock), clock


def call(breaker: Breaker, well: bool | None, key: str = "host") -> Any:
    """A call that may be made; what the circuit came to by it."""
    entry = breaker.enter(key)
    assert entry.wait_seconds is None
    return breaker.leave(key, well, probe=entry.probe)


@pytest.mark.core
def test_it_opens_at_the_rate() -> None:
    """Of at least min_calls calls the share of failure_rate must have failed, the last one too."""
    broken, _ = breaker(failure_rate=0.5)
    assert [call(broken, well) for well in (False, False, True)] == [None, None, None]
    assert call(broken, True) is None
    assert call(broken, False) == "open"
    assert broken.states() == {"host": "open"}
    fine, _ = breaker(failure_rate=0.5)
    assert [call(fine, well) for well in (True, True, True, False, True, False)] == [None] * 6
    few, _ = breaker(min_calls=4, failure_rate=1)
    assert [call(few, False) for _ in range(4)] == [None, None, None, "open"]


@pytest.mark.core
def test_only_the_window_counts() -> None:
    """Failures that are older than window_seconds are forgotten."""
    broken, clock = breaker(window_seconds=10)
    for _ in range(3):
        assert call(broken, False) is None
    clock.now += 10
    assert [call(broken, False) for _ in range(4)] == [None, None, None, "open"]


@pytest.mark.core
def test_an_open_circuit_lets_nobody_pass() -> None:
    """For open_seconds all wait; then one call finds out, and the others wait for what it comes to."""
    broken, clock = breaker()
    for _ in range(4):
        call(broken, False)
    assert broken.enter("host").wait_seconds == 30
    clock.now += 29
    assert broken.enter("host").wait_seconds == 1
    assert broken.enter("other").wait_seconds is None
    clock.now += 1
    probe = broken.enter("host")
    assert (probe.wait_seconds, probe.probe, probe.changed) == (None, True, "half_open")
    assert broken.enter("host").wait_seconds == 0
    assert broken.leave("host", True, probe=True) == "closed"
    assert [call(broken, False) for _ in range(4)] == [None, None, None, "open"]


def test_a_probe_that_fails() -> None:
    """The circuit is open once more, for as long again."""
    broken, clock = breaker()
    for _ in range(4):
        call(broken, False)
    clock.now += 30
    assert call(broken, False) == "open"
    assert broken.enter("host").wait_seconds == 30


@pytest.mark.core
def test_a_probe_that_says_nothing() -> None:
    """One that was cancelled, or failed by itself, leaves finding out to the next one."""
    broken, clock = breaker()
    for _ in range(4):
        call(broken, False)
    clock.now += 30
    assert call(broken, None) is None
    probe = broken.enter("host")
    assert (probe.probe, probe.changed) == (True, None)
    assert broken.leave("host", True, probe=True) == "closed"


def test_calls_that_began_before_it_opened() -> None:
    """They neither close nor keep open what is open, nor stand in for the one that finds out."""
    broken, clock = breaker()
    for _ in range(4):
        call(broken, False)
    assert broken.leave("host", True, probe=False) is None
    clock.now += 30
    broken.enter("host")
    assert broken.leave("host", False, probe=False) is None
    assert broken.states() == {"host": "half_open"}


def _request() -> httpx.Request:
    return httpx.Request("GET", "https://API.example.com:8443/v1")


@pytest.mark.core
@pytest.mark.parametrize(
    ("error", "well"),
    [
        (httpx.ConnectError("no", request=_request()), False),
        (httpx.ReadTimeout("no", request=_request()), False),
        *((status, False) for status in (500, 502, 503, 504, 529, 408)),
        *((status, True) for status in (400, 401, 403, 404, 413, 422, 429, 409)),
        (TimeoutError("node 'call' did not end"), False),
        (ValueError("of the node's own"), None),
        (BudgetExceeded("cost", 1, 2, "call"), None),
        (ContractViolation("call", "output", {}, []), True),
        (ContractViolation("call", "input", {}, []), None),
    ],
)
def test_what_counts_as_a_failure(error: Any, well: bool | None) -> None:
    """Not reached, too late, overloaded, broken: a failure. A refused request shows a healthy provider."""
    if isinstance(error, int):
        response = httpx.Response(error, request=_request())
        error = httpx.HTTPStatusError("no", request=_request(), response=response)
    assert Breaker.verdict(diagnose(error, NodeContext("call", 1, "run"))) is well


class Wrapper(Exception):
    pass


def test_the_host_is_read_off_the_exception() -> None:
    """By shape, from clients of all kinds and from what they are wrapped in; None where nothing tells it."""
    error = httpx.ConnectError("no", request=_request())
    assert host_of(error) == "api.example.com"
    wrapped = Wrapper("x")
    wrapped.__cause__ = error
    assert host_of(wrapped) == "api.example.com"
    response = requests.Response()
    response.url = "https://other.example.com/v1"
    assert host_of(requests.HTTPError("no", response=response)) == "other.example.com"
    assert host_of(urllib.error.HTTPError("http://a.example.com/x", 500, "no", None, None)) == "a.example.com"
    shaped = Wrapper("x")
    shaped.request_info = SimpleNamespace(real_url=SimpleNamespace(host="b.example.com"))
    assert host_of(shaped) == "b.example.com"
    endpoint = Wrapper("x")
    endpoint.kwargs = {"endpoint_url": "https://bedrock.example.com/"}
    assert host_of(endpoint) == "bedrock.example.com"
    for nothing in (ValueError("x"), httpx.ConnectError("no"), Wrapper()):
        assert host_of(nothing) is None


class Hostile(Exception):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.parametrize("url", ["", "http://[", 5, object(), b"x", {"host": 5}])
def test_a_host_that_makes_no_sense(url: Any) -> None:
    """Whatever stands in its place is no host, and no error."""
    error = Wrapper("x")
    error.url = url
    assert host_of(error) is None
    assert host_of(Hostile()) is None


class Answering:
    """A provider that answers with whatever status is set."""

    def __init__(self, provider: Server) -> None:
        self._provider, self.url = provider, provider.url(Answer())

    def answer(self, status: int) -> None:
        self._provider.answers[self.url.rpartition("/")[2]] = (Answer(status),)

    @property
    def seen(self) -> int:
        return self._provider.calls_of(self.url)


@pytest.fixture
def server(provider: Server) -> Answering:
    return Answering(provider)


@pytest.fixture
async def client() -> Any:
    async with httpx.AsyncClient() as client:
        yield client


def asking(server: Answering, client: httpx.AsyncClient, node_id: str = "call") -> Any:
    @stroma_node(node_id, input=State, output=State)
    async def ask(state: State) -> Any:
        (await client.get(server.url)).raise_for_status()
        return {"n": state.n + 1}

    return ask


def watching(changes: list[Any], waits: list[Any]) -> NodeHooks:
    return NodeHooks(
        on_circuit_change=noting(changes, lambda *arguments: arguments),
        on_node_wait=noting(waits, lambda *arguments: arguments),
    )


async def test_a_provider_that_fails_is_left_alone(server: Answering, client: httpx.AsyncClient) -> None:
    """It is called until the circuit opens, then by nobody; after open_seconds one call probes it."""
    changes: list[Any] = []
    waits: list[Any] = []
    broken, clock = breaker(max_wait_seconds=0)
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER, hooks=watching(changes, waits))
    ask = asking(server, client)
    server.answer(503)
    for n in range(4):
        result = await runner.run([ask], State(), run_id=str(n))
        assert result.failure.reason == "overloaded"
    assert [mark.kind for mark in result.trace.marks] == ["circuit_open"]
    assert result.trace.marks[0].reason == "127.0.0.1"
    refused = await runner.run([ask], State(), run_id="refused")
    assert (refused.status, server.seen, len(refused.trace)) == (RunStatus.PARTIAL, 4, 0)
    assert isinstance(refused.failure.exception, CircuitOpen)
    assert refused.failure.failure_class == FailureClass.RECOVERABLE
    assert refused.failure.reason == "circuit_open"
    assert "127.0.0.1 failed too often and is not called for another 30.0 s" in refused.failure.message
    clock.now += 30
    server.answer(200)
    well = await runner.run([ask], State(), run_id="refused", resume=True)
    assert (well.status, server.seen) == (RunStatus.RESUMED, 5)
    assert [mark.kind for mark in well.trace.marks] == ["circuit_half_open", "circuit_closed"]
    assert changes == [
        ("3", "127.0.0.1", "open"),
        ("refused", "127.0.0.1", "half_open"),
        ("refused", "127.0.0.1", "closed"),
    ]
    assert waits == []


async def test_attempts_wait_for_an_open_circuit(server: Answering, client: httpx.AsyncClient) -> None:
    """They wait until it is closed, which uses up none of their retries; one of them finds out."""
    changes: list[Any] = []
    waits: list[Any] = []
    broken = Breaker(min_calls=2, open_seconds=0.2)
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER, hooks=watching(changes, waits))
    ask = asking(server, client)
    server.answer(500)
    for _ in range(2):
        await runner.run([ask], State())
    server.answer(200)
    results = await asyncio.gather(*(runner.run([ask], State()) for _ in range(5)))
    assert {result.status for result in results} == {RunStatus.COMPLETED}
    assert {result.trace.marks[0].reason for result in results} == {"circuit 127.0.0.1"}
    assert [state for _, _, state in changes] == ["open", "half_open", "closed"]
    assert [(node, reason) for _, node, reason, _ in waits] == [("call", "circuit 127.0.0.1")] * 5
    assert all(0 < seconds <= 0.2 for *_, seconds in waits)
    assert server.seen == 7


@pytest.mark.core
async def test_requests_that_are_refused_open_nothing(server: Answering, client: httpx.AsyncClient) -> None:
    """However many calls end with 400, or 429, the provider is well."""
    broken, _ = breaker()
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER)
    ask = asking(server, client)
    for status in (400, 429) * 5:
        server.answer(status)
        await runner.run([ask], State())
    assert (server.seen, broken.states()) == (10, {"127.0.0.1": "closed"})


@pytest.mark.parametrize(("node_id", "pipeline"), [("other", "p"), ("call", "other")])
async def test_other_hosts_are_called_all_the_same(
    server: Answering, provider: Server, client: httpx.AsyncClient, node_id: str, pipeline: str
) -> None:
    """A node that calls a healthy provider is not held up by another host, of a node or of its namesake."""
    broken, _ = breaker(max_wait_seconds=0)
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER)
    server.answer(500)
    for _ in range(5):
        await runner.run(Pipeline("p", [asking(server, client)]), State())
    other = Answering(provider)
    other.url = other.url.replace("127.0.0.1", "localhost")
    result = await runner.run(Pipeline(pipeline, [asking(other, client, node_id)]), State())
    assert result.status is RunStatus.COMPLETED
    assert (server.seen, broken.states()) == (4, {"127.0.0.1": "open"})


async def test_a_provider_that_cannot_be_reached(client: httpx.AsyncClient, provider: Server) -> None:
    """Connection errors open the circuit of the host that they name."""
    broken, _ = breaker(max_wait_seconds=0)
    gone = Answering(provider)
    gone.url = provider.url(Answer(fault="refuse"))
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER)
    results = [await runner.run([asking(gone, client)], State()) for _ in range(5)]
    assert [result.failure and result.failure.reason for result in results] == ["connection"] * 4 + [
        "circuit_open"
    ]


async def test_failures_without_a_host_count_for_the_limit() -> None:
    """Where no exception tells a host, one limit is one circuit; a node without a limit has none."""
    fail = node("call", failing_with(ConnectionError, "no"), State, State)
    broken, _ = breaker(max_wait_seconds=0)
    limits = {"llm": Limit(concurrent=5, store=AsyncInMemoryStore())}
    limited = StromaRunner.quick(breaker=broken, policy_map=NEVER, limits=limits, node_limits={"call": "llm"})
    results = [await limited.run([fail], State()) for _ in range(5)]
    reasons = [result.failure and result.failure.reason for result in results]
    assert reasons[3:] == ["connection", "circuit_open"]
    assert broken.states() == {"limit 'llm'": "open"}
    free = StromaRunner.quick(breaker=broken, policy_map=NEVER)
    result = await free.run([fail], State())
    assert result.failure.reason == "connection"


@pytest.mark.core
@pytest.mark.parametrize("stated", [Unknown(), NotDone(), State(n=1)], ids=["unknown", "not done", "done"])
async def test_effects_with_an_unknown_outcome_count(stated: Any) -> None:
    """A failed call of an effect counts, whatever is stated: circuits open, Retry-After closes the limit."""
    calls: list[int] = []

    @stroma_node("pay", effect=True, reconcile=lambda state, key: stated)
    async def pay(state: State) -> State:
        calls.append(state.n)
        request = httpx.Request("POST", "https://pay.example")
        answer = httpx.Response(503, request=request, headers={"retry-after": "7"} if state.n else {})
        raise httpx.HTTPStatusError("down", request=request, response=answer)

    broken, _ = breaker(min_calls=2, max_wait_seconds=0)
    options = {"policy_map": NEVER, "limits": {"pay": Limit(concurrent=9)}}
    runner = StromaRunner.quick(breaker=broken, **options)
    results = [await runner.run([pay], State()) for _ in range(3)]
    assert (calls, broken.states()) == ([0, 0], {"pay.example": "open"})
    assert isinstance(results[-1].failure and results[-1].failure.exception, CircuitOpen)
    closed: list[float] = []

    on_cooldown = noting(closed, lambda run_id, limit, seconds: seconds)
    await StromaRunner.quick(hooks=NodeHooks(on_limit_cooldown=on_cooldown), **options).run([pay], State(n=1))
    assert [round(seconds) for seconds in closed] == [7]


async def test_a_wait_for_a_circuit_ends_with_the_budget(
    server: Answering, client: httpx.AsyncClient
) -> None:
    """Who has less time left than the circuit stays open is told at once."""
    broken, _ = breaker(max_wait_seconds=None)
    budget = ExecutionBudget(max_latency_ms=20_000)
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER, budget=budget)
    server.answer(500)
    for _ in range(4):
        await runner.run([asking(server, client)], State())
    result = await runner.run([asking(server, client)], State())
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert (result.status, result.failure.exception.dimension) == (RunStatus.PARTIAL, "latency")


async def test_who_may_not_wait_does_not_wait_for_probes(
    server: Answering, client: httpx.AsyncClient
) -> None:
    """With max_wait_seconds=0 an attempt beside the one that finds out is refused at once."""
    waits: list[Any] = []
    broken, clock = breaker(max_wait_seconds=0)
    runner = StromaRunner.quick(breaker=broken, policy_map=NEVER, hooks=watching([], waits))
    server.answer(500)
    for _ in range(4):
        await runner.run([asking(server, client)], State())
    clock.now += 30
    assert broken.enter("127.0.0.1").probe
    result = await runner.run([asking(server, client)], State())
    assert result.failure.reason == "circuit_open"
    assert (waits, server.seen) == ([], 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"failure_rate": bad}, "failure_rate must be") for bad in (0, -0.1, 1.1, math.nan, True, "x")),
        *(({"min_calls": bad}, "min_calls must be an integer") for bad in (0, -1, 1.5, True)),
        *(({"window_seconds": bad}, "window_seconds must be seconds") for bad in (0, -1, math.inf)),
        *(({"open_seconds": bad}, "open_seconds must be seconds") for bad in (0, -1, math.nan)),
        ({"max_wait_seconds": -1}, "max_wait_seconds must be seconds"),
    ],
)
def test_a_wrong_figure(options: dict[str, Any], says: str) -> None:
    """Each is a ValueError that says what to give instead."""
    with pytest.raises(ValueError, match=says):
        Breaker(**options)


def test_copies_of_a_config_share_the_breaker() -> None:
    """It is what runs share."""
    config = RunConfig(breaker=Breaker())
    assert copy.deepcopy(config).breaker is copy.copy(config).breaker is config.breaker
    with pytest.raises(ValueError, match="breaker"):
        RunConfig(breaker=True)
