"""Which exceptions show that a request was certainly not carried out; real clients raise them, against real
sockets."""

import asyncio
import smtplib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
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
CERTAIN = {"refused", "limited", "unreachable", "unknown host"}


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[str], str]]:
    """Answers each request by its path; "silent" not at all."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    kept = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            name = connection.recv(65536).split()[1][1:].decode()
            if name == "silent":
                kept.append(connection)
                continue
            connection.sendall(REPLIES[name])
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed_port = free.getsockname()[1]

    def url(name: str) -> str:
        if name == "unreachable":
            return f"http://127.0.0.1:{closed_port}/"
        return "http://no-such-host.invalid/" if name == "unknown host" else f"http://127.0.0.1:{port}/{name}"

    yield url
    listening.close()


def seconds_for(url: str) -> float:
    """Return the time limit of a request: short where it is to be reached."""
    return 0.3 if url.endswith("/silent") else 30


def by_httpx(url: str) -> None:
    httpx.post(url, timeout=seconds_for(url)).raise_for_status()


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


@pytest.mark.core
@pytest.mark.parametrize("name", [*REPLIES, "silent", "unreachable", "unknown host"])
@pytest.mark.parametrize("post", [by_httpx, by_requests, by_aiohttp, by_urllib])
def test_requests_of_real_clients(
    server: Callable[[str], str], post: Callable[[str], None], name: str
) -> None:
    """A 4xx and a connection that was not made are refusals; a 408, 409, 5xx, a timeout and a lost connection
    are none."""
    with pytest.raises(Exception) as caught:  # Each client has its own.
        post(server(name))
    assert is_refusal(caught.value) == (name in CERTAIN), repr(caught.value)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class StripeLike(Exception):
    http_status = 402


@pytest.mark.core
def test_exceptions_of_other_shapes() -> None:
    """What an exception was raised from is read, a group by all its members; what misbehaves is no
    refusal."""

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
        (OSError(113, "no route"), True),
    ]:
        assert is_refusal(error) is expected, repr(error)
