"""A backend that never does what it should."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Literal

Mode = Literal["refuses", "hangs", "fails", "resets"]


class BrokenBackend:
    """A TCP server on loopback that refuses connections, takes them and never answers, answers each request
    with 500, or resets the connection after it has read something.

    Attributes:
        connections: how many came; none is seen where they are refused.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.connections = 0
        self._open: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A port that is bound but not listened on refuses, and nobody else can get it.
        self._listener.bind(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        self.url = f"http://{self.host}:{self.port}"
        if mode != "refuses":
            self._listener.listen(128)
            threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self.mode == "hangs":
                while connection.recv(65536):
                    pass
            elif self.mode == "resets":
                connection.recv(65536)
                # Closed with this option, it sends a reset instead of an orderly end.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                while _read_request(connection):
                    connection.sendall(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    def __enter__(self) -> BrokenBackend:
        return self

    def __exit__(self, *_: object) -> None:
        # accept() and recv() in other threads do not notice close() alone.
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _read_request(connection: socket.socket) -> bool:
    """Read one HTTP request with its body; False when there is none."""
    with connection.makefile("rb") as stream:
        if not stream.readline():
            return False
        length, chunked = 0, False
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").lower().partition(":")
            if name == "content-length":
                length = int(value)
            chunked = chunked or (name == "transfer-encoding" and "chunked" in value)
        if chunked:
            while size := int(stream.readline() or b"0", 16):
                stream.read(size + 2)
            stream.readline()
        stream.read(length)
        return True
