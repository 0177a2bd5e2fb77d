"""A gRPC server on loopback: the method that is asked for says what it does."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from tests.providers.server import READ_TIMEOUT

_TOO_LARGE = 5_000_000  # bytes; a client takes 4 MiB


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        what, metadata = json.loads(request)
        if what == "the server's code raises":
            raise RuntimeError("boom")
        if what == "an answer that is too large":
            return b"x" * _TOO_LARGE
        if what == "no answer in time":
            self._closing.wait(20 * READ_TIMEOUT)
            return b""
        context.set_trailing_metadata(tuple(metadata.items()))
        context.abort(grpc.StatusCode[what], "no")  # It raises.
        return b""


class GrpcServer:
    """Where the server is, and calls of it."""

    def __init__(self, port: int, dropping: int) -> None:
        self._port = port
        self._dropping = dropping

    def _call(self, what: str, metadata: dict[str, str] | None) -> tuple[str, bytes, float]:
        """The address, the request and the seconds to wait."""
        port = {"connection refused": 1, "connection dropped": self._dropping}.get(what, self._port)
        timeout = READ_TIMEOUT if what == "no answer in time" else 30
        return f"127.0.0.1:{port}", json.dumps([what, metadata or {}]).encode(), timeout

    def ask(self, what: str, metadata: dict[str, str] | None = None) -> Any:
        address, request, timeout = self._call(what, metadata)
        with grpc.insecure_channel(address) as channel:
            return channel.unary_unary("/model/ask")(request, timeout=timeout)

    async def ask_async(self, what: str, metadata: dict[str, str] | None = None) -> Any:
        address, request, timeout = self._call(what, metadata)
        async with grpc.aio.insecure_channel(address) as channel:
            return await channel.unary_unary("/model/ask")(request, timeout=timeout)


def _drop(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


@contextmanager
def serving_grpc() -> Iterator[GrpcServer]:
    """A server, and a port that drops whoever connects, gone at the end."""
    closing = threading.Event()
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(_Handler(closing),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    dropper = threading.Thread(target=_drop, args=(listener,))
    dropper.start()
    try:
        yield GrpcServer(port, listener.getsockname()[1])
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        dropper.join()
        server.stop(0).wait()
