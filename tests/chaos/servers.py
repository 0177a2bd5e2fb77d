"""`--store postgres` and `--store redis`: a server from the tests' own helpers, while it is needed."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def served(store: str) -> Iterator[tuple[str, Any]]:
    """The URL of a store, and the server, if it is ours."""
    if store == "postgres":
        from tests.servers_postgres import PostgresServer

        postgres = PostgresServer()
        try:
            yield postgres.dsn, postgres
        finally:
            postgres.stop()
    elif store == "redis":
        from tests.servers import RedisServer

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with RedisServer(port=str(port), bind="127.0.0.1") as redis:
            yield f"redis://127.0.0.1:{port}/0", redis
    else:
        yield store, None
