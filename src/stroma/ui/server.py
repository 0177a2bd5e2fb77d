"""The server of the web interface."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["collect_seldom", "make_config", "serve"]

_HEAD_SECONDS: Final = 5.0
_MAX_CONNECTIONS: Final = 150
#: Requests at once; further ones get 503. Connections are counted until the loop has closed them, so this is
#: above.
_MAX_REQUESTS: Final = 400


def collect_seldom() -> None:
    """Make this process search for reference cycles after 20,000 new objects, not 700: a page makes many and keeps none.

    The page of a map of 10,000 items takes 285 ms of CPU instead of 340 by this (Xeon under load, 28 Nov
    2026).
    """
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


class _BoundedConnection(H11Protocol):
    """A connection that cannot lock others out while it sends nothing.

    It is closed unless a complete head arrives in 5 s, and earlier if it is the oldest idle one of more than
    150.
    """

    _idle_since = 0.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        present = [one for one in self.connections if not one.transport.is_closing()]
        if len(present) > _MAX_CONNECTIONS:
            idle = [one for one in present if isinstance(one, _BoundedConnection) and one._is_idle]
            min(idle, key=lambda one: one._idle_since).transport.close()  # This one is idle too.

    def on_response_complete(self) -> None:
        self._await_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._idle_since = self.loop.time()
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self._close_idle)

    def _close_idle(self) -> None:
        if self._is_idle:
            self.transport.close()


def make_config(app: Any) -> uvicorn.Config:
    """Return the configuration of a server whose connections are bounded in number and time."""
    return uvicorn.Config(
        app,
        http=_BoundedConnection,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        limit_concurrency=_MAX_REQUESTS,
    )


def serve(app: Any, listening: socket.socket) -> None:
    """Serve an application on a listening socket until SIGINT or SIGTERM."""
    collect_seldom()
    uvicorn.Server(make_config(app)).run(sockets=[listening])
