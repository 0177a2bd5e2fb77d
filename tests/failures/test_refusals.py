"""Which exceptions show that a request was not carried out, from real clients on real sockets."""

import asyncio
import errno
import smtplib
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import httpx
import pytest
import requests

from stroma.failures.refusals import is_refusal

REPLIES = {
    "refused": b"HTTP/1.1 402 no\r\ncontent-length: 0\r\n\r\n",
    "limited": b"HTTP/1.1 429 no\r\ncontent-length: 0\r\n\r\n",
    "conflict": b"HTTP/1.1 409 no\r\ncontent-length: 0\r\n\r\n",
    "late": b"HTTP/1.1 408 no\r\ncontent-length: 0\r\n\r\n",
    "failed": b"HTTP/1.1 500 no\r\ncontent-length: 0\r\n\r\n",
    "overloaded": b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n",
    "closed": b"",
    "broken": b"HTTP/1.1 200 ok\r\ncontent-length: 10\r\n\r\nhal",
}
REDIRECT = b"HTTP/1.1 303 see other\r\nlocation: %s\r\ncontent-length: 0\r\n\r\n"
ANSWERS = {"refused", "limited"}
CONNECTIONS = {"unreachable", "unknown host"}


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[str], str]]:
    """Answers each request by its path: "silent" not at all, "done-NAME" with a redirect to NAME."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed_port = free.getsockname()[1]
    kept = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            name = urllib.parse.unquote(connection.recv(65536).split()[1][1:].decode())
            if name == "silent":
                kept.append(connection)
                continue
            _, is_done, then = name.partition("done-")
            connection.sendall(REDIRECT % url(then).encode() if is_done else REPLIES[name])
            connection.close()

    def url(name: str) -> str:
        if name == "unreachable":
            return f"http://127.0.0.1:{closed_port}/"
        return "http://no-such-host.invalid/" if name == "unknown host" else f"http://127.0.0.1:{port}/{name}"

    threading.Thread(target=serve, daemon=True).start()
    yield url
    listening.close()


def seconds_for(url: str) -> float:
    """Return the time limit of a request: short where it is to be reached."""
    return 0.3 if url.endswith("/silent") else 30


def by_httpx(url: str) -> None:
    httpx.post(url, timeout=seconds_for(url), follow_redirects=True).raise_for_status()


def by_requests(url: str) -> None:
    requests.post(url, timeout=seconds_for(url)).raise_for_status()


def by_aiohttp(url: str) -> None:
    async def post() -> None:
        timeout = aiohttp.ClientTimeout(total=seconds_for(url))
        async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:
            async with session.post(url) as answer:
                await answer.read()

    asyncio.run(post())


def by_urllib(url: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data=b"x"), timeout=seconds_for(url)) as answer:
        answer.read()


#: What each client shows of a request that was certainly not carried out. Exceptions of aiohttp and urllib
#: do not say which request of a chain of redirects was not connected, those of urllib nothing.
CERTAIN = {
    by_httpx: ANSWERS | CONNECTIONS,
    by_requests: ANSWERS | CONNECTIONS,
    by_aiohttp: ANSWERS,
    by_urllib: set[str](),
}


@pytest.mark.core
@pytest.mark.parametrize("name", [*REPLIES, "silent", *sorted(CONNECTIONS)])
@pytest.mark.parametrize("post", CERTAIN)
def test_requests_of_clients(server: Callable[[str], str], post: Callable[[str], None], name: str) -> None:
    """A 4xx and a connection never made are refusals; 408, 409, 5xx, a timeout, a lost connection are not."""
    with pytest.raises(Exception) as caught:  # Each client has its own.
        post(server(name))
    assert is_refusal(caught.value) == (name in CERTAIN[post]), repr(caught.value)


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(ANSWERS | CONNECTIONS))
@pytest.mark.parametrize("post", CERTAIN)
def test_failures_after_a_redirect(
    server: Callable[[str], str], post: Callable[[str], None], name: str
) -> None:
    """An answer or a failed connection after a redirect is not a refusal: the first was carried out."""
    with pytest.raises(Exception) as caught:
        post(server(f"done-{name}"))
    assert not is_refusal(caught.value), repr(caught.value)


@pytest.mark.core
def test_broken_connections_that_name_the_host() -> None:
    """ "No route to host" on a connection that was made is not a refusal, whatever its client wraps it in."""
    error = OSError(errno.EHOSTUNREACH, "No route to host")
    assert not is_refusal(error)
    assert not is_refusal(aiohttp.ClientOSError(*error.args))
    assert not is_refusal(chained(httpx.ReadError(""), error))
    assert not is_refusal(chained(httpx.ReadError(""), ConnectionRefusedError()))
    assert not is_refusal(chained(RuntimeError("of an SDK"), chained(httpx.ReadError(""), error)))


@pytest.mark.core
def test_answers_that_a_client_of_grpc_refuses() -> None:
    """An answer larger than a gRPC client takes is not a refusal: the server has acted."""
    grpc = pytest.importorskip("grpc")

    def answer(request: bytes, context: Any) -> bytes:
        if request == b"wrong":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        return b"x" * 5_000_000

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for request, expected in ((b"right", False), (b"wrong", True)):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary("/shop/Charge")(request)
                assert is_refusal(caught.value) is expected, repr(caught.value)
    finally:
        server.stop(0)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class StripeLike(Exception):
    http_status = 402


@pytest.mark.core
def test_exceptions_of_other_shapes() -> None:
    """What an exception was raised from is read, a group by all its members; misbehaviour is no refusal."""

    class Hostile(Exception):
        @property
        def response(self) -> Any:
            raise RuntimeError

    refused = ConnectionRefusedError()
    looped = RuntimeError()
    looped.__cause__ = ValueError()
    looped.__cause__.__cause__ = looped
    for error, expected in [
        (chained(RuntimeError("x"), refused), True),
        (chained(TimeoutError(), TimeoutError()), False),
        (StripeLike(), True),
        (smtplib.SMTPRecipientsRefused({}), True),
        (smtplib.SMTPDataError(554, b"no"), True),
        (smtplib.SMTPServerDisconnected("gone"), False),
        (ExceptionGroup("x", [refused, StripeLike()]), True),
        (ExceptionGroup("x", [refused, TimeoutError()]), False),
        (looped, False),
        (Hostile(), False),
        (NameError("x"), False),
        (ConnectionResetError(), False),
        (BrokenPipeError(), False),
    ]:
        assert is_refusal(error) is expected, repr(error)
