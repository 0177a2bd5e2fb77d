"""The connection that the thread of a Redis store keeps for itself: no pool, no lock and no pipeline around a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from stroma.checkpoint.redis.server import Link, Server

__all__ = ["Line", "packed"]

_APART: Final = 32 * 1024  # bytes of a value from which on it is sent as it stands, in place of being copied


class Line(Link):
    """A :class:`Link` for one thread alone, on one connection.

    Between two commands the connection owes no reply: it is left as soon as one of them is not read to its end, and
    before each command it is looked at, so that one that the server closed, or on which it said something by itself,
    is made anew at once.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server, server.client())
        self._connection: Any = None
        self._up = False

    def _once(self, commands: Sequence[tuple[Any, ...]], atomic: bool) -> list[Any]:
        connection = self._ready()
        asked = [("MULTI",), *commands, ("EXEC",)] if atomic else commands
        try:
            connection.send_packed_command(packed(asked))
            replies = [self._reply(connection) for _ in asked]
        except BaseException:
            self._leave()  # What may still come would answer another command.
            raise
        return self._executed(replies, len(commands)) if atomic else replies

    def _reply(self, connection: Any) -> Any:
        try:
            return connection.read_response()
        except self.server.refusal as error:
            return error

    def _executed(self, replies: list[Any], count: int) -> list[Any]:
        """The replies to the commands of a transaction. Raises why it was not done."""
        *_, done = replies
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        if not isinstance(done, list) or len(done) != count:
            raise self.server.refusal(f"a transaction of {count} commands was answered by {done!r:.100}")
        return done

    def _ready(self) -> Any:
        connection = self._connection
        if connection is None:
            connection = self._connection = self.client.connection_pool.make_connection()
        if self._up:
            try:
                if not connection.can_read():
                    return connection
            except Exception as error:
                if not self.server.is_driver_error(error):
                    raise
            self._leave()
        connection.connect()
        self._up = True
        return connection

    def _leave(self) -> None:
        self._up = False
        if self._connection is not None:
            self._connection.disconnect()

    def _renew(self) -> None:
        self._leave()

    def close(self) -> None:
        """Close the connection; it is made again when it is used again."""
        self._leave()


def packed(commands: Sequence[tuple[Any, ...]]) -> list[bytes]:
    """Commands as the server reads them (RESP), in portions: large values are not copied."""
    portions: list[bytes] = []
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for value in command:
            data = value if type(value) is bytes else str(value).encode()
            if len(data) < _APART:
                parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
            else:
                parts.append(b"$%d\r\n" % len(data))
                portions += (b"".join(parts), data)
                parts = [b"\r\n"]
    portions.append(b"".join(parts))
    return portions
