"""What providers' errors mean: the real SDKs and HTTP clients, asked against a real server on loopback.

`CASES` is also what `docs/providers.md` is made of; after a change here run `./dev run python
docs/generate.py`.
"""

import asyncio
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import httpx2
import openai
import pytest
from tests.kit import Note, ended, start_python
from tests.providers.cases import PROVIDER_CASES, TOO_LONG, A, Case, R, T, by_anthropic, by_openai
from tests.providers.cases_more import GRPC_CASES, MORE_CASES
from tests.providers.clients import (
    ASK,
    ASK_ASYNC,
    SDKS,
    ask_anthropic,
    ask_openai,
    ask_openai_async,
    aws_client,
    options,
)
from tests.providers.grpc_server import GrpcServer, serving_grpc
from tests.providers.server import Answer, Server
from tests.providers.waits import NOW, RETRY_AFTER

from stroma import (
    BudgetExceeded,
    ContractViolation,
    FailureClass,
    FailurePolicy,
    NodeContext,
    RunStatus,
    StromaRunner,
    classify,
    parallel,
)
from stroma.failures.failure import diagnose
from stroma.failures.provider_verdicts import ProviderVerdict as Verdict
from stroma.failures.providers import read_provider_error, retry_after_seconds

CASES = [*PROVIDER_CASES, *MORE_CASES]
HERE = NodeContext("ask", 1, "run")


def again(reason: str, seconds: float | None = None) -> Verdict:
    """Return the verdict that another attempt may succeed."""
    return Verdict("RECOVERABLE", reason, seconds)


def lasting(reason: str) -> Verdict:
    """Return the verdict that every attempt will fail."""
    return Verdict("TERMINAL", reason)


def error_of(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def _without_key(client: str) -> Any:
    """Make a client without a key, and call it where it asks for the key only then."""
    if client == "openai":
        return openai.OpenAI()
    if client == "azure":
        return openai.AzureOpenAI(azure_endpoint="http://localhost:1", api_version="1")
    if client == "google":
        from google import genai

        return genai.Client()
    if client == "cohere":
        import cohere

        return cohere.ClientV2()
    import anthropic

    message: Any = {"role": "user", "content": "hello"}
    return anthropic.Anthropic(base_url="http://localhost:1").messages.create(
        model="any", max_tokens=1, messages=[message]
    )


@pytest.mark.core
@pytest.mark.parametrize("client", ["openai", "azure", "anthropic", "google", "cohere"])
def test_a_missing_key_is_terminal(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """A client without an API key fails at once, and likewise when raised from another exception."""
    for name in [name for name in os.environ if "KEY" in name or "TOKEN" in name or "GOOGLE" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nowhere")
    error = error_of(lambda: _without_key(client))
    failure = diagnose(error, HERE)
    assert (failure.failure_class, failure.reason) == (FailureClass.TERMINAL, "auth"), error
    wrapped = RuntimeError("no client")
    wrapped.__cause__ = error
    assert diagnose(wrapped, HERE).reason == "auth"


def test_own_words_about_keys_are_not_a_clients() -> None:
    """The same words in an exception of the user's own code say nothing of a provider."""

    def fails(error: Exception) -> None:
        raise error

    for own in (TypeError("api_key is None"), ValueError("No API key"), RuntimeError("missing credentials")):
        assert diagnose(error_of(lambda own=own: fails(own)), HERE).failure_class is FailureClass.AMBIGUOUS
    assert diagnose(ValueError("api_key"), HERE).failure_class is FailureClass.AMBIGUOUS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_providers_error_means(case: Case, provider: Server) -> None:
    """The SDK's own exception for the server's answer has its class and reason, and so has what it causes."""
    url = provider.url(case.answer)
    error = error_of(lambda: ASK[case.sdk](url, case.answer))
    assert type(error).__module__.partition(".")[0] in SDKS[case.sdk].packages
    assert type(error).__name__ == case.raised
    assert classify(error, HERE) is case.failure_class
    for failure in (diagnose(error, HERE), diagnose(caused(RuntimeError("no search"), error), HERE)):
        assert (failure.failure_class, failure.reason) == (case.failure_class, case.reason)
        assert failure.retry_after_seconds == case.delay


def test_every_reason_and_class_of_the_statuses_is_held() -> None:
    """The cases have each SDK at each status that the design names."""
    statuses = {400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529}
    for sdk in ASK:
        assert statuses <= {case.answer.status for case in CASES if case.sdk == sdk}


# ---------------------------------------------------------------------- end to end


def runner_of(**config: Any) -> tuple[StromaRunner, Callable[[Callable[..., Any]], Any]]:
    runner = StromaRunner.quick(**config)
    return runner, runner.node("ask", input=Note, output=Note)


def asking(url: str, ask: Callable[[str], Any] = ask_openai_async) -> Callable[[Note], Any]:
    """Return the function of a node that asks a server."""

    async def asks(state: Note) -> dict[str, Any]:
        await ask(url)
        return {}

    return asks


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not waited."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("stroma.engine.loop.sleep", sleep)
    return waited


#: The first case of each SDK and class; what the others mean is asked of the plain clients.
FIRST_CASES = {(case.sdk, case.failure_class): case for case in reversed(CASES)}.values()


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
async def test_a_run_deals_with_a_providers_error(case: Case, provider: Server, delays: list[float]) -> None:
    """A node around the async SDK: RECOVERABLE is tried again, TERMINAL is not; the trace has both."""
    runner, node = runner_of(policy_map={R: FailurePolicy(max_retries=1), A: FailurePolicy(max_retries=0)})
    url = provider.url(case.answer)
    calls = 0

    @node
    async def ask(state: Note) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        await ASK_ASYNC[case.sdk](url, case.answer)
        return {}

    result = await runner.run([ask], Note())
    attempts = 2 if case.failure_class is R else 1
    assert calls == attempts == len(delays) + 1
    # Google's async client, where aiohttp is there, asks once more by itself after a lost connection.
    each = 2 if (case.sdk, case.answer.fault) == ("google-genai", "drop") else 1
    assert provider.calls_of(url) == (0 if case.answer.fault == "refuse" else attempts * each)
    assert result.status is (RunStatus.FAILED if case.failure_class is T else RunStatus.PARTIAL)
    assert [(e.node_id, e.attempt, e.failure, e.reason) for e in result.trace] == [
        ("ask", number + 1, case.failure_class, case.reason) for number in range(attempts)
    ]
    assert (result.failure.failure_class, result.failure.reason) == (case.failure_class, case.reason)
    with pytest.raises(type(result.failure.exception)):
        result.raise_for_status()


@pytest.mark.parametrize("sdk", ASK)
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "7"}, 7), ({"retry-after-ms": "2500"}, 2.5), ({"Retry-After": "120"}, 120)],
    ids=str,
)
async def test_the_delay_is_at_least_what_the_server_says(
    sdk: str, headers: dict[str, str], seconds: float, provider: Server, delays: list[float]
) -> None:
    """G3: The delay before the next attempt is at least the one in Retry-After."""
    runner, node = runner_of()
    urls = [provider.url(Answer(429, {"error": {"type": "rate_limit_error"}}, headers))]

    @node
    async def ask(state: Note) -> dict[str, Any]:
        if urls:
            await ASK_ASYNC[sdk](urls.pop())
        return {"text": "done"}

    result = await runner.run([ask], Note())
    assert result.status is RunStatus.COMPLETED
    assert delays == [seconds]  # The drawn delay is below 1 s.
    assert [(e.outcome, e.reason) for e in result.trace] == [("failure", "rate_limit"), ("success", None)]


@pytest.mark.parametrize("sdk", ASK)
@pytest.mark.parametrize("inside", ["alone", "group"])
async def test_a_server_that_asks_for_too_long_stops_the_run(
    sdk: str, inside: str, provider: Server, delays: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """G3: A Retry-After beyond `max_retry_after_seconds` ends the run as PARTIAL, with the time to resume."""
    caplog.set_level(logging.INFO, logger="stroma")
    runner, node = runner_of()
    url = provider.url(Answer(429, {"error": {"type": "rate_limit_error"}}, {"retry-after": "3600"}))

    ask = node(asking(url, ASK_ASYNC[sdk]))
    result = await runner.run([ask if inside == "alone" else parallel(ask)], Note())
    assert (result.status, provider.calls_of(url), delays) == (RunStatus.PARTIAL, 1, [])
    assert (result.failure.reason, result.failure.retry_after_seconds) == ("rate_limit", 3600)
    lines = [r for r in caplog.records if "come back in 3600 s" in r.getMessage()]
    assert lines
    assert lines[0].run_id == result.run_id


async def test_max_retry_after_seconds_is_the_users(provider: Server, delays: list[float]) -> None:
    """max_retry_after_seconds is a limit of the policy: exactly at it is waited for."""
    runner, node = runner_of(policy_map={R: FailurePolicy(max_retries=1, max_retry_after_seconds=3600)})
    url = provider.url(Answer(429, {}, {"retry-after": "3600"}))
    ask = node(asking(url))
    result = await runner.run([ask], Note())
    assert (result.status, provider.calls_of(url), delays) == (RunStatus.PARTIAL, 2, [3600])


# ---------------------------------------------------------------------- Retry-After


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stroma.failures.providers.time", SimpleNamespace(time=lambda: NOW))


@pytest.mark.parametrize("sdk", ASK)
@pytest.mark.parametrize(("headers", "seconds"), RETRY_AFTER, ids=lambda v: str(v)[:60])
def test_retry_after_in_all_its_forms(
    sdk: str, headers: dict[str, str], seconds: float | None, provider: Server, frozen: None
) -> None:
    """Seconds, fractions, milliseconds and HTTP dates are read; what makes no sense is no wish."""
    error = error_of(lambda: ASK[sdk](provider.url(Answer(429, {}, headers))))
    assert read_provider_error(error) == again("rate_limit", seconds)


def test_a_date_without_zone_is_gmt_everywhere(monkeypatch: pytest.MonkeyPatch, frozen: None) -> None:
    """The machine's own time zone does not shift a server's date."""
    import time

    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert retry_after_seconds({"retry-after": "Fri Jan 15 08:01:30 2027"}) == 90
        assert retry_after_seconds({"retry-after": "Fri, 15 Jan 2027 08:01:30 -0000"}) == 90
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("status", [503, 529, 500, 400])
def test_retry_after_counts_at_every_status(status: int, provider: Server) -> None:
    """Not only a rate limit can ask to wait."""
    error = error_of(lambda: ask_anthropic(provider.url(Answer(status, {}, {"retry-after": "4"}))))
    verdict = read_provider_error(error)
    assert verdict.retry_after == 4


@pytest.mark.parametrize("seconds", ["1e300", "1" * 30])
async def test_a_huge_wish_stops_the_run(seconds: str, provider: Server, delays: list[float]) -> None:
    """However long a server asks to wait, the answer is PARTIAL, never an endless sleep."""
    runner, node = runner_of()
    url = provider.url(Answer(429, {}, {"retry-after": seconds}))
    ask = node(asking(url))
    assert ((await runner.run([ask], Note())).status, delays) == (RunStatus.PARTIAL, [])


# ---------------------------------------------------------------------- x-should-retry


_WISHES = [
    (500, "", "false", lasting("server_error")),
    (429, "", "false", lasting("rate_limit")),
    (400, "", "false", lasting("bad_request")),
    (418, "", "false", lasting("bad_request")),
    (400, "", "true", again("bad_request")),
    (404, "", "true", again("not_found")),
    (418, "", "true", again("server_error")),
    (500, "", "true", again("server_error")),
    (400, "", "perhaps", lasting("bad_request")),
    (500, "", "perhaps", again("server_error")),
    # No number of tries mends these, whatever the server's frame says.
    (401, "", "true", lasting("auth")),
    (429, "insufficient_quota", "true", lasting("quota")),
]


@pytest.mark.parametrize(
    ("sdk", "status", "code", "wish", "expected"),
    # aiohttp and botocore keep no body of that shape, and so no code of it.
    [(sdk, *row) for row in _WISHES for sdk in ASK if not (row[1] and sdk in ("aiohttp", "botocore"))],
)
def test_x_should_retry_is_obeyed(
    sdk: str, status: int, code: str, wish: str, expected: Verdict, provider: Server
) -> None:
    """x-should-retry overrules the status both ways, but not an exhausted quota or a wrong key."""
    headers = {"X-Should-Retry": wish, "retry-after": "3"}
    error = error_of(lambda: ASK[sdk](provider.url(Answer(status, {"error": {"type": code}}, headers))))
    assert read_provider_error(error) == expected._replace(retry_after=3)


def test_a_status_that_says_nothing_is_ambiguous(provider: Server) -> None:
    """A status that nobody knows, without a wish of the server, is AMBIGUOUS."""
    error = error_of(lambda: ask_openai(provider.url(by_openai(418))))
    failure = diagnose(error, HERE)
    assert (failure.failure_class, failure.reason) == (A, None)


# ---------------------------------------------------------------------- httpx, httpx2

HTTPX = [httpx, httpx2]


@pytest.mark.parametrize("client", HTTPX, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(400, {}), lasting("bad_request")),
        (Answer(401, {}), lasting("auth")),
        (Answer(403, {}), lasting("permission")),
        (Answer(404, {}), lasting("not_found")),
        (Answer(408, {}), again("timeout")),
        (Answer(409, {}), again("conflict")),
        (Answer(413, {}), lasting("too_large")),
        (Answer(422, {}), lasting("bad_request")),
        (Answer(429, {}), again("rate_limit")),
        (Answer(429, {}, {"Retry-After": "5"}), again("rate_limit", 5)),
        (Answer(500, {}), again("server_error")),
        (Answer(503, {}, {"retry-after-ms": "5"}), again("overloaded", 0.005)),
        (Answer(599, {}), again("server_error")),
        (by_openai(429, "insufficient_quota"), lasting("quota")),
        (by_openai(400, "context_length_exceeded"), lasting("context_length")),
        (by_anthropic(400, "invalid_request_error", TOO_LONG), lasting("context_length")),
        (by_anthropic(500, "overloaded_error"), again("overloaded")),
        (Answer(400, "no json"), lasting("bad_request")),
        (Answer(500, ["a", 1]), again("server_error")),
        (Answer(429, {"error": "insufficient_quota"}), again("rate_limit")),
    ],
    ids=str,
)
def test_what_an_http_error_means(client: Any, answer: Answer, expected: Verdict, provider: Server) -> None:
    """A bare HTTP client's status error is read from its response: status, headers and body."""
    error = error_of(lambda: client.post(provider.url(answer)).raise_for_status())
    assert type(error).__name__ == "HTTPStatusError"
    assert read_provider_error(error) == expected


@pytest.mark.parametrize("client", HTTPX, ids=lambda module: module.__name__)
def test_a_body_that_was_not_read_stays_unread(client: Any, provider: Server) -> None:
    """The body of a streamed response is not fetched to classify an error; its status decides."""
    with client.stream("POST", provider.url(by_openai(429, "insufficient_quota"))) as response:
        error = error_of(response.raise_for_status)
        assert read_provider_error(error) == again("rate_limit")
        assert not response.is_stream_consumed


@pytest.mark.parametrize("client", HTTPX, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("url", "raised", "expected"),
    [
        (Answer(fault="refuse"), {"ConnectError"}, again("connection")),
        (Answer(fault="drop"), {"ReadError", "RemoteProtocolError"}, again("connection")),
        (Answer(body={}, fault="cut"), {"RemoteProtocolError"}, again("connection")),
        (Answer(fault="hang"), {"ReadTimeout"}, again("timeout")),
        ("ftp://127.0.0.1/", {"UnsupportedProtocol"}, lasting("bad_request")),
        ("http://127.0.0.1:port/", {"InvalidURL"}, lasting("bad_request")),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_a_transport_error_means(
    client: Any, url: Answer | str, raised: set[str], expected: Verdict, provider: Server
) -> None:
    """Lost connections and read timeouts are RECOVERABLE; an address that cannot be meant so is not."""
    where = url if isinstance(url, str) else provider.url(url)
    error = error_of(
        lambda: client.post(where, timeout=options(url)["timeout"] if isinstance(url, Answer) else None)
    )
    assert type(error).__name__ in raised
    assert read_provider_error(error) == expected


@pytest.mark.parametrize("client", HTTPX, ids=lambda module: module.__name__)
def test_every_timeout_and_connection_error_is_recoverable(client: Any) -> None:
    """Every subclass of a transport error is RECOVERABLE, but for those that a second try cannot mend."""
    lasting = {"UnsupportedProtocol", "LocalProtocolError"}
    classes = [
        result
        for result in vars(client).values()
        if isinstance(result, type) and issubclass(result, client.TransportError)
    ]
    assert len(classes) > 10
    for result in classes:
        verdict = read_provider_error(result("gone"))
        wanted = "TERMINAL" if result.__name__ in lasting else "RECOVERABLE"
        assert verdict.failure_class == wanted, result
        assert (verdict.reason == "timeout") == issubclass(result, client.TimeoutException), result


# ---------------------------------------------------------------------- without a server's answer


def test_what_botocore_refuses_by_itself(monkeypatch: pytest.MonkeyPatch, provider: Server) -> None:
    """No key, no region and a wrong argument are TERMINAL before anything is sent."""
    import botocore.session

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    url = provider.url(Answer(200, {}))
    session = botocore.session.Session()
    unsigned = session.create_client("bedrock-runtime", region_name="us-east-1", endpoint_url=url)
    findings = [
        error_of(lambda: unsigned.converse(modelId="m", messages=[])),
        error_of(lambda: aws_client(url).converse(modelId=7)),
        error_of(lambda: session.create_client("bedrock-runtime")),
    ]
    verdicts = [(type(error).__name__, read_provider_error(error)) for error in findings]
    assert verdicts == [
        ("NoCredentialsError", lasting("auth")),
        ("ParamValidationError", lasting("bad_request")),
        ("NoRegionError", lasting("bad_request")),
    ]
    assert provider.calls_of(url) == 0


# ---------------------------------------------------------------------- gRPC


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[GrpcServer]:
    with serving_grpc() as running:
        yield running


@pytest.mark.core
@pytest.mark.parametrize(("what", "means", "reason"), GRPC_CASES)
def test_what_a_grpc_error_means(
    what: str, means: FailureClass, reason: str | None, grpc_server: GrpcServer
) -> None:
    """gRPC's own exception, from a real server, has its class and reason, as has what is raised from it."""
    error = error_of(lambda: grpc_server.ask(what))
    assert isinstance(error, grpc.RpcError)
    for failure in (diagnose(error, HERE), diagnose(caused(RuntimeError("no search"), error), HERE)):
        assert (failure.failure_class, failure.reason) == (means, reason)
        assert failure.retry_after_seconds is None


@pytest.mark.parametrize(("what", "means", "reason"), GRPC_CASES)
async def test_a_run_deals_with_a_grpc_error(
    what: str, means: FailureClass, reason: str | None, grpc_server: GrpcServer, delays: list[float]
) -> None:
    """A node around grpc.aio: RECOVERABLE is tried again, the rest is not; the trace has class and reason."""
    runner, node = runner_of(policy_map={R: FailurePolicy(max_retries=1), A: FailurePolicy(max_retries=0)})

    ask = node(asking(what, grpc_server.ask_async))
    result = await runner.run([ask], Note())
    assert [(e.failure, e.reason) for e in result.trace] == [(means, reason)] * (2 if means is R else 1)
    assert result.status is (RunStatus.FAILED if means is T else RunStatus.PARTIAL)


@pytest.mark.core
@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"grpc-retry-pushback-ms": "7000"}, again("overloaded", 7)),
        ({"grpc-retry-pushback-ms": "-1"}, lasting("overloaded")),
        ({"retry-after": "8"}, again("overloaded", 8)),
        # What makes no sense is -1 for gRPC's own client.
        ({"grpc-retry-pushback-ms": "soon"}, lasting("overloaded")),
    ],
    ids=str,
)
async def test_the_wait_that_a_grpc_server_asks_for(
    metadata: dict[str, str], expected: Verdict, grpc_server: GrpcServer
) -> None:
    """A server's pushback is a wait in its trailing metadata; a negative one means do not try again."""
    assert read_provider_error(error_of(lambda: grpc_server.ask("UNAVAILABLE", metadata))) == expected
    with pytest.raises(grpc.RpcError) as caught:
        await grpc_server.ask_async("UNAVAILABLE", metadata)
    assert read_provider_error(caught.value) == expected


# ---------------------------------------------------------------------- what an exception was raised from


def test_one_cause_down_is_read(provider: Server) -> None:
    """A wrapper that says nothing means what it was raised from, one level down and no further."""
    limited = error_of(lambda: ask_openai(provider.url(Answer(429, {}, {"retry-after": "6"}))))

    def wrap(error: BaseException) -> Exception:
        try:
            raise RuntimeError("the search failed") from error
        except RuntimeError as wrapper:
            return wrapper

    once = wrap(limited)
    failure = diagnose(once, HERE)
    assert failure.exception is once
    assert failure.message == "the search failed"
    assert (failure.failure_class, failure.reason, failure.retry_after_seconds) == (R, "rate_limit", 6)
    assert diagnose(wrap(once), HERE).failure_class is A


def test_only_a_deliberate_cause_counts(provider: Server) -> None:
    """An error that merely happened while another was handled says nothing of it."""
    refused = error_of(lambda: ask_openai(provider.url(by_openai(401))))

    def stumble() -> None:
        try:
            raise refused
        except openai.AuthenticationError:
            raise RuntimeError("fallback failed")  # noqa: B904

    error = error_of(stumble)
    assert error.__context__ is refused
    assert classify(error, HERE) is A


def test_an_exceptions_own_shape_wins_over_its_cause(provider: Server) -> None:
    """What an exception says itself comes before what it was raised from."""
    error = shaped(status_code=401)
    error.__cause__ = error_of(lambda: ask_openai(provider.url(by_openai(503))))
    assert classify(error, HERE) is T


@pytest.mark.core
def test_our_own_errors_keep_their_class_over_a_cause(provider: Server) -> None:
    """A broken contract or budget stays what it is, whatever it was raised from."""
    cause = error_of(lambda: ask_openai(provider.url(by_openai(401))))
    budget = BudgetExceeded("tokens", 1, 2, "a")
    violation = ContractViolation("a", "output", {}, [])
    budget.__cause__ = cause
    assert classify(budget, HERE) is R
    violation.__cause__ = error_of(lambda: ask_openai(provider.url(by_openai(503))))
    assert classify(violation, HERE) is T


# ---------------------------------------------------------------------- exception groups


def limited(seconds: str) -> Exception:
    return shaped(status_code=429, headers={"retry-after": seconds})


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("several", errors)


@pytest.mark.core
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: group(limited("8")), again("rate_limit", 8)),
        (lambda: group(limited("2"), limited("8"), shaped(status_code=503)), again("rate_limit", 8)),
        (lambda: group(limited("8"), shaped(status_code=401)), lasting("auth")),
        (lambda: group(ValueError("?"), shaped(status_code=401)), lasting("auth")),
        (lambda: group(limited("8"), ValueError("?")), Verdict("AMBIGUOUS", None, 8)),
        (lambda: group(limited("2"), group(limited("8"), ValueError("?"))), Verdict("AMBIGUOUS", None, 8)),
        (lambda: group(KeyError("?"), ValueError("?")), None),
        (lambda: caused(ValueError("?"), TimeoutError("late")), again("timeout")),
        (lambda: group(TimeoutError("late"), ConnectionResetError("gone")), again("timeout")),
        (lambda: group(group(limited("8")), group(group(limited("9")))), again("rate_limit", 9)),
        (lambda: caused(ValueError("?"), group(limited("8"))), again("rate_limit", 8)),
        (lambda: group(caused(ValueError("?"), limited("8"))), again("rate_limit", 8)),
    ],
    ids=range(12),
)
def test_a_group_is_its_worst_member(error: Callable[[], Exception], expected: Verdict | None) -> None:
    """Calls in a node's own TaskGroup fail together: the worst decides, and the longest wait is waited."""
    assert read_provider_error(error()) == expected
    assert diagnose(error(), HERE).retry_after_seconds == (expected and expected.retry_after)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_chains_that_bite_their_tail_come_to_an_end() -> None:
    """G2: Circular exception chains terminate."""
    lonely = ValueError("?")
    assert read_provider_error(caused(lonely, lonely)) is None
    members = [ValueError(str(number)) for number in range(40)]
    ring = group(*members)
    for member in members:
        member.__cause__ = ring
    assert read_provider_error(ring) is None
    assert classify(ring, HERE) is A


async def test_a_taskgroup_in_a_node_waits_as_the_server_says(provider: Server, delays: list[float]) -> None:
    """G3: Retry-After is obeyed where the real SDK's error comes in the group of a node's own TaskGroup."""
    runner, node = runner_of()
    urls = [provider.url(Answer(429, {}, {"retry-after": "7"}))]

    @node
    async def ask(state: Note) -> dict[str, Any]:
        async with asyncio.TaskGroup() as tasks:
            if urls:
                tasks.create_task(ask_openai_async(urls.pop()))
        return {"text": "done"}

    result = await runner.run([ask], Note())
    assert (result.status, delays) == (RunStatus.COMPLETED, [7])


# ---------------------------------------------------------------------- shapes


def shaped(
    name: str = "Odd", package: str = "somewhere", bases: tuple[type, ...] = (Exception,), **attributes: Any
) -> Exception:
    """An exception of that shape, as a package that is not installed here would raise it."""
    cls = type(name, bases, {"__module__": f"{package}.errors"})
    error: Exception = cls("no")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


def coded(code: str) -> Any:
    return lambda: SimpleNamespace(name=code)


def aws(status: int, code: str, message: str = "no", **headers: str) -> dict[str, Any]:
    shown = {key.replace("_", "-"): value for key, value in headers.items()}
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": shown}
    return {"Error": {"Code": code, "Message": message}, "ResponseMetadata": metadata}


TOO_LARGE_FOR_A_MINUTE = (
    "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 41000. "
    "The input or output tokens must be reduced in order to run successfully."
)
MAIL = Message()
MAIL["Retry-After"] = "8"

SHAPES: list[tuple[Exception, Verdict | None]] = [
    # requests and aiohttp
    (
        shaped(package="requests", response=SimpleNamespace(status_code=429, headers={"Retry-After": "8"})),
        again("rate_limit", 8),
    ),
    (shaped("ConnectionError", "requests"), again("connection")),
    (shaped("ChunkedEncodingError", "requests"), again("connection")),
    (shaped("Timeout", "requests"), again("timeout")),
    (shaped("ReadTimeout", "requests"), again("timeout")),
    (shaped("ConnectTimeout", "requests"), again("timeout")),
    (shaped("MissingSchema", "requests", (ValueError,)), lasting("bad_request")),
    (shaped("InvalidSchema", "requests", (ValueError,)), lasting("bad_request")),
    (shaped(package="aiohttp", status=503, headers={"Retry-After": "8"}), again("overloaded", 8)),
    (shaped("ClientConnectionError", "aiohttp"), again("connection")),
    (shaped("ClientPayloadError", "aiohttp"), again("connection")),
    (shaped("ServerTimeoutError", "aiohttp"), again("timeout")),
    # urllib3, httpcore
    (shaped("ReadTimeoutError", "urllib3"), again("timeout")),
    (shaped("NetworkError", "httpcore"), again("connection")),
    (shaped("RemoteProtocolError", "httpcore2"), again("connection")),
    (shaped("LocalProtocolError", "httpcore"), lasting("bad_request")),
    # the SDKs, without a cause to ask, and after the answer came
    (shaped("APIConnectionError", "openai"), again("connection")),
    (shaped("APIConnectionError", "anthropic"), again("connection")),
    (shaped("APITimeoutError", "openai"), again("timeout")),
    (shaped("APITimeoutError", "anthropic"), again("timeout")),
    (openai.ContentFilterFinishReasonError(), lasting("content_policy")),
    # google
    (
        shaped(
            package="google",
            code=429,
            status="RESOURCE_EXHAUSTED",
            response=SimpleNamespace(headers={"retry-after": "8"}),
        ),
        again("rate_limit", 8),
    ),
    (shaped(package="google", code=http.HTTPStatus.FORBIDDEN), lasting("permission")),
    (
        shaped(
            package="google",
            code=400,
            message="The input token count (2) exceeds the maximum number of tokens allowed (1).",
        ),
        lasting("context_length"),
    ),
    # botocore
    (
        shaped(package="botocore", response=aws(429, "ThrottlingException", retry_after="8")),
        again("rate_limit", 8),
    ),
    (shaped(package="botocore", response=aws(400, "ThrottlingException")), again("rate_limit")),
    (shaped(package="botocore", response=aws(400, "Throttling")), again("rate_limit")),
    (shaped(package="botocore", response=aws(400, "TooManyRequestsException")), again("rate_limit")),
    (shaped(package="botocore", response=aws(400, "ServiceQuotaExceededException")), lasting("quota")),
    (
        shaped(
            package="botocore",
            response=aws(400, "ValidationException", "Input is too long for requested model."),
        ),
        lasting("context_length"),
    ),
    (shaped(package="botocore", response=aws(403, "AccessDeniedException")), lasting("permission")),
    (shaped("ConnectionClosedError", "botocore"), again("connection")),
    (shaped("ConnectTimeoutError", "botocore"), again("timeout")),
    (
        shaped("EventStreamError", "botocore", response={"Error": {"Code": "modelTimeoutException"}}),
        again("timeout"),
    ),
    (shaped("IncompleteReadError", "botocore"), again("connection")),
    (shaped("ResponseStreamingError", "botocore"), again("connection")),
    # other clients' exceptions before there is an answer
    (shaped("NoResponseError", "mistralai"), again("connection")),
    (shaped("DefaultCredentialsError", "google"), lasting("auth")),
    (shaped(status_code=498), None),
    # grpc
    (shaped(package="grpc", code=lambda: 1 / 0), None),
    # the standard library
    (ConnectionRefusedError("no"), again("connection")),
    (http.client.RemoteDisconnected("no"), again("connection")),
    (urllib.error.HTTPError("http://x", 429, "no", MAIL, None), again("rate_limit", 8)),
    # bodies
    (shaped(status_code=402), lasting("quota")),
    (
        shaped(
            status_code=429,
            body={"error": {"details": {"error_code": "linked_organization_spend_limit_reached"}}},
        ),
        lasting("quota"),
    ),
    (shaped(status_code=429, code="linked_organization_spend_limit_reached"), lasting("quota")),
    (shaped(status_code=400, body={"message": "over the context window"}), lasting("context_length")),
    (
        shaped(status_code=400, body={"message": "over Azure's Content Management Policy"}),
        lasting("content_policy"),
    ),
    (shaped(status_code=400, body={"message": "against our content policy"}), lasting("content_policy")),
    (shaped(status_code=429, body='{"error": {"code": "insufficient_quota"}}'), lasting("quota")),
    (shaped(status_code=429, body='[{"error": {"code": "insufficient_quota"}}]'), lasting("quota")),
    (shaped(status_code=429, body="insufficient_quota"), again("rate_limit")),
    (shaped(status_code=429, code=["insufficient_quota"]), again("rate_limit")),
    (shaped(response=SimpleNamespace(status=503)), again("overloaded")),
    # OpenAI's limit of a minute that one request is more than
    (
        shaped(
            status_code=429,
            body={"error": {"code": "rate_limit_exceeded", "message": TOO_LARGE_FOR_A_MINUTE}},
        ),
        lasting("too_large"),
    ),
    # only a bad request's prose is read
    (
        shaped(status_code=429, body={"message": "tokens beyond your context window per minute"}),
        again("rate_limit"),
    ),
    # what is no status hides nothing
    (shaped("ConnectionError", "requests", status_code=0), again("connection")),
    (shaped("ConnectionError", "requests", status_code=True), again("connection")),
    # what looks alike and is not
    (shaped(code=coded("UNAVAILABLE")), None),
    (shaped("Timeout"), None),
    (shaped("ConnectionError"), None),
    (shaped("HTTPError", "requests"), None),
    (shaped(code=404), None),
    (shaped(status_code=True), None),
    (shaped(status_code="429"), None),
    (shaped(status_code=42), None),
    (shaped(status_code=1006), None),
    (shaped(status_code=600), None),
    (shaped(status_code=302), None),
    (shaped(headers={"retry-after": "5"}), None),
    (shaped(code=["insufficient_quota"]), None),
    (ValueError("status 429"), None),
]


@pytest.mark.core
@pytest.mark.parametrize(("error", "expected"), SHAPES, ids=lambda v: "")
def test_what_a_shape_means(error: Exception, expected: Verdict | None) -> None:
    """Clients that are not installed here are known by what their exceptions carry."""
    verdict = read_provider_error(error)
    assert verdict == expected, vars(error)


# ---------------------------------------------------------------------- exceptions that misbehave


def trap(*names: str, **attributes: Any) -> Exception:
    """An exception whose attributes of these names raise."""

    def get(self: Any, name: str) -> Any:
        if name in names:
            raise RuntimeError(f"{name} is broken")
        return object.__getattribute__(self, name)

    cls = type("Trap", (Exception,), {"__getattribute__": get})
    error: Exception = cls("no")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


@pytest.mark.parametrize(
    "name", ["headers", "body", "code", "type", "message", "status", "details", "error_code"]
)
def test_an_attribute_that_raises_hides_no_other(name: str) -> None:
    """One attribute that raises is one that says nothing; the status is still read."""
    error = trap(name, status_code=429)
    assert read_provider_error(error) == again("rate_limit")


def test_exceptions_whose_attributes_raise() -> None:
    """G2: An exception has exactly one class, whatever its attributes raise."""
    names = ("status_code", "status", "response", "headers", "body", "code", "type", "message")
    assert classify(trap(*names), HERE) is A
    assert read_provider_error(trap("response", status_code=503)) == again("overloaded")
    assert read_provider_error(trap("status_code", response=SimpleNamespace(status_code=401))) == Verdict(
        "TERMINAL", "auth"
    )

    class Everything(Exception):
        def __getattribute__(self, name: str) -> Any:
            if name == "__class__":
                return Everything
            raise RuntimeError(name)

        def __str__(self) -> str:
            raise RuntimeError("str")

    assert read_provider_error(Everything("x")) is None
    failure = diagnose(Everything("x"), HERE)
    assert (failure.failure_class, failure.message) == (A, "Everything")
    failure = diagnose(shaped(status_code=429, response=trap("headers")), HERE)
    assert (failure.failure_class, failure.reason) == (R, "rate_limit")


@pytest.mark.parametrize(
    "text", ["Mon, 01 Jan 9999 00:00:00 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "1e999", "9" * 5000]
)
def test_a_wait_of_no_world_breaks_nothing(text: str) -> None:
    """A Retry-After that is no date or number of this world leaves a 429 RECOVERABLE."""
    assert classify(shaped(status_code=429, headers={"retry-after": text}), HERE) is R


def test_headers_that_raise_are_no_headers() -> None:
    """A mapping that cannot be read costs the wait, not the class."""

    class Broken(dict[str, str]):
        def items(self) -> Any:
            raise RuntimeError("no")

    error = shaped(status_code=429, response=SimpleNamespace(headers=Broken()), headers={"retry-after": "2"})
    assert read_provider_error(error) == again("rate_limit", 2)


@pytest.mark.core
@pytest.mark.parametrize(
    "headers",
    [
        [("Retry-After", "8")],
        (("retry-after", b"8"),),
        [(b"Retry-After", b"8")],
        {b"Retry-After": b"8"},
        {"RETRY-AFTER": 8},
        {"retry-after": ["8"]},
        # Said more than once, by a server and a proxy before it: no earlier than the last of them wants.
        [("retry-after", "8"), ("retry-after", "5")],
        {"retry-after": ["8", b"5"]},
        {"retry-after": "5, 8"},
        {"retry-after": "soon, 8"},
        httpx.Headers([("retry-after", "5"), ("Retry-After", "8")]),
        httpx2.Headers([("retry-after", "8"), ("Retry-After", "5")]),
    ],
    ids=str,
)
def test_headers_of_any_shape_are_read(headers: Any) -> None:
    """Pairs, bytes, lists, another case, a header twice: the server's wish is obeyed all the same."""
    error = shaped(response=SimpleNamespace(status_code=429, headers=headers))
    assert read_provider_error(error) == again("rate_limit", 8)


@pytest.mark.parametrize(
    "headers", [["retry-after"], [1, 2], "retry-after: 8", 8, [("a", "b", "c")], b"x"], ids=str
)
def test_what_is_no_headers_is_passed_over(headers: Any) -> None:
    """What cannot be headers costs the wait, not the class."""
    error = shaped(response=SimpleNamespace(status_code=429, headers=headers))
    assert read_provider_error(error) == again("rate_limit")


class Unsaid:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (shaped(status_code=400, message=Unsaid()), lasting("bad_request")),
        (shaped(status_code=429, headers={"retry-after": Unsaid()}), again("rate_limit")),
        (
            shaped(
                package="grpc",
                code=coded("UNAVAILABLE"),
                details=lambda: 1 / 0,
                trailing_metadata=lambda: 1 / 0,
            ),
            again("overloaded"),
        ),
    ],
    ids=lambda v: "",
)
def test_what_cannot_be_said_hides_no_status(error: Exception, expected: Verdict) -> None:
    """A message, a header or a method that raises costs what it would have said, not the class."""
    assert read_provider_error(error) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 30_000,
        b"\xff\xfe",
        b"{",
        b"{}",
        b"null",
        b'{"error": null}',
        b'{"error": {"code": 7}}',
        b" " * 70_000,
        json.dumps({"error": {"code": "insufficient_quota", "message": "x" * 65_536}}).encode(),
    ],
    ids=lambda v: str(v[:12]),
)
def test_bodies_that_make_no_sense_say_nothing(body: bytes) -> None:
    """A body that is no JSON, too deep, or of 64 KiB or more leaves the status to decide."""
    error = shaped(response=SimpleNamespace(status_code=429, _content=body))
    assert read_provider_error(error) == again("rate_limit")


def test_a_body_is_never_fetched() -> None:
    """A client that reads the body when it is asked for it is not asked: that would block the event loop."""

    class Lazy:
        status_code = 429

        @property
        def content(self) -> bytes:
            return b'{"error": {"code": "insufficient_quota"}}'

    assert read_provider_error(shaped(response=Lazy())) == again("rate_limit")


@pytest.mark.slow
def test_no_sdk_is_imported() -> None:
    """Reading an exception, or usage from plain data, imports no SDK, no HTTP client and no genai-prices."""
    code = """
        import sys
        from stroma import usage_from
        from stroma.failures.providers import read_provider_error
        print(read_provider_error(ConnectionError()).reason)
        print(usage_from({"usage": {"prompt_tokens": 1}}).input_tokens)
        sdks = "openai anthropic google mistralai cohere botocore genai_prices".split()
        print(sorted({*sdks, "httpx", "httpx2", "requests", "aiohttp", "grpc"} & set(sys.modules)))
    """
    assert ended(start_python(code=code)) == "connection\n1\n[]\n"
