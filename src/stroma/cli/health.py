"""--health: an HTTP server that answers GET /healthz, for the probes of a process manager."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import click

from stroma.cli.errors import Code, Problem

__all__ = ["HEALTH_HELP", "HealthAddress", "serve_health"]

HEALTH_HELP: Final = "Answer GET /healthz there, on 127.0.0.1 by default."

_READ_SECONDS: Final = 5.0
_MAX_LINES: Final = 100  # of the head of a request


class HealthAddress(click.ParamType[tuple[str, int]]):
    """[HOST:]PORT, as (host, port)."""

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        host, _, port = str(value).rpartition(":")
        if not (port.isascii() and port.isdecimal() and int(port) < 65536):
            self.fail(f"{value!r} is not an address; pass PORT or HOST:PORT, such as 8080", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


@contextlib.asynccontextmanager
async def serve_health(
    address: tuple[str, int] | None, read: Callable[[], tuple[bool, dict[str, Any]]]
) -> AsyncIterator[str | None]:
    """Answer requests while the context is open; yield the address, which has the real port for port 0.

    ``read`` returns True for 200 or False for 503, and the JSON to answer. Raises Problem for an address in
    use.
    """
    if address is None:
        yield None
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                status, body = _answer(await _read_head(reader), read)
                data = json.dumps(body).encode() + b"\n"
                head = (
                    f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                    "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
                )
                writer.write(head.encode() + data)
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # The client left, or does not speak HTTP.
        finally:
            writer.close()

    host, port = address
    try:
        server = await asyncio.start_server(answer, host, port)
    except OSError as error:
        raise Problem(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            "pass another --health",
            code=Code.ENVIRONMENT,
        ) from error
    try:
        bound = server.sockets[0].getsockname()
        yield f"http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}/healthz"
    finally:
        server.close()


async def _read_head(reader: asyncio.StreamReader) -> str:
    """Return the first line of a request, and skip its headers. Raises ValueError for a longer head."""
    first = await reader.readline()
    for _ in range(_MAX_LINES):
        if (await reader.readline()).strip() == b"":
            return first.decode("latin-1")
    raise ValueError("too many headers")


def _answer(request: str, read: Callable[[], tuple[bool, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    method, path, *_ = [*request.split(), "", ""]
    if path.partition("?")[0] != "/healthz":
        return "404 Not Found", {"error": "GET /healthz"}
    if method not in ("GET", "HEAD"):
        return "405 Method Not Allowed", {"error": "GET /healthz"}
    is_ok, body = read()
    return "200 OK" if is_ok else "503 Service Unavailable", body
