"""A provider on loopback: each address gives an answer, some in turn, or a transport fault."""

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_TIMEOUT = 0.25  # seconds a client waits for a server that says nothing


@dataclass(frozen=True)
class Answer:
    """What the server does: answers, or a fault of the transport."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    fault: str | None = None  # "drop", "cut", "hang", "refuse"

    @property
    def stream(self) -> bool:
        return isinstance(self.body, str)


PLAIN = Answer()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[Answer, ...]] = {}
        self.calls: Counter[str] = Counter()
        self.closing = threading.Event()

    def url(self, answer: Answer, *more: Answer) -> str:
        """An address that gives these answers one after the other, the last one from then on."""
        if answer.fault == "refuse":
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                return f"http://127.0.0.1:{closed.getsockname()[1]}"
        name = f"a{len(self.answers)}"
        self.answers[name] = (answer, *more)
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def calls_of(self, url: str) -> int:
        return self.calls[url.rpartition("/")[2]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # A client that gave up waiting.


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        name = self.path.split("/")[1]
        self.server.calls[name] += 1
        answers = self.server.answers[name]
        answer = answers[min(self.server.calls[name], len(answers)) - 1]
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if answer.fault == "hang":
            self.server.closing.wait(20 * READ_TIMEOUT)
        elif answer.fault == "drop":
            # Reset at once: a linger of 0 s.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.answer(answer)

    do_GET = do_POST

    def answer(self, answer: Answer) -> None:
        kind = "text/event-stream" if answer.stream else "application/json"
        if isinstance(answer.body, bytes):
            kind, data = "application/vnd.amazon.eventstream", answer.body
        else:
            data = (answer.body if answer.stream else json.dumps(answer.body)).encode()
        self.send_response(answer.status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data) + (answer.fault == "cut")))
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread of its own, gone at the end."""
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running
    finally:
        running.closing.set()
        running.shutdown()
        running.server_close()
        thread.join()
