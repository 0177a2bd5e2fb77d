"""The server of the web interface."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn

__all__ = ["serve"]


def serve(app: Any, listening: socket.socket) -> None:
    """Serve an application on a listening socket until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        limit_concurrency=200,
    )
    uvicorn.Server(config).run(sockets=[listening])
