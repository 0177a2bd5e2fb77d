"""A model provider for the demo: a process that speaks the OpenAI HTTP protocol on 127.0.0.1.

It needs no key and no network, answers from the text it is sent by the rules of `stroma.demo.rules`, and
misbehaves the way real providers do: rate limits, server errors, hangs, dropped connections, truncated JSON,
wrong types.

    with start_provider(DEFAULT_SEED) as provider:
        client = openai.AsyncOpenAI(base_url=provider.base_url, api_key="demo", max_retries=0)

By hand: `python -m stroma.demo.provider --seed 7 [--calm] [--port 0]`. One line of JSON with its port says
that it is ready. It ends when its stdin (if a pipe) is closed or its parent process is gone, so that nothing
stays behind.

What it expects: the first line of the system message is `TASK: extract`, `TASK: classify` or `TASK: risk`.
The first user message is the document's text (extract) or JSON `{"records": [{"name": ..., <fields of
extract>}, ...]}`. Later messages, such as a request to fix an earlier answer, change neither the answer nor
the faults.

The faults of a text depend on the seed, the task, the text and how often that text was sent; never on the
time or on the order in which requests arrive. A header forces one: `X-Demo-Fault: 429` (or any other of
`FAULTS`). The quota error is served only on request: by that header, by `X-Demo-Quota: exhausted`, or to a
model named `...-no-quota`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import socketserver
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from stroma._utils.child_process import child_environment
from stroma.demo.fault_plan import (
    DEFAULT_SEED,
    FAULTS,
    TASKS,
    TRANSPORT_FAULTS,
    Ledger,
    Served,
    Stats,
    fault_plan,
    text_sha,
)
from stroma.demo.responses import HTTPError, answer_task, completion, to_error, with_wrong_type

__all__ = [
    "DEFAULT_SEED",
    "FAULTS",
    "TASKS",
    "TRANSPORT_FAULTS",
    "Provider",
    "Served",
    "Stats",
    "fault_plan",
    "start_provider",
    "text_sha",
]

_HOST: Final = "127.0.0.1"
_MAX_BODY: Final = 32 * 1024 * 1024  # bytes
_MODELS: Final = ("gpt-4o-mini", "gpt-4o")


# --- HTTP ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ChatRequest:
    model: str
    messages: tuple[tuple[str, str], ...]  # role, text
    task: str
    text: str


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(
            str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text"
        )
    return ""


def _parse_request(body: bytes) -> _ChatRequest:
    try:
        data = json.loads(body)
    except ValueError:
        raise HTTPError(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), str) or not data["model"]:
        raise HTTPError(400, "you must provide a model parameter", param="model")
    if data.get("stream"):
        raise HTTPError(400, "the demo provider does not stream; leave out `stream`", param="stream")
    raw = data.get("messages")
    if not isinstance(raw, list) or not all(isinstance(m, dict) for m in raw):
        raise HTTPError(400, "`messages` must be a list of objects", param="messages")
    messages = tuple((str(m.get("role")), _text_of(m.get("content"))) for m in raw)
    system = next((text for role, text in messages if role in {"system", "developer"}), "")
    user = next((text for role, text in messages if role == "user"), None)
    first_line = system.strip().partition("\n")[0]
    task = first_line.removeprefix("TASK:").strip().lower() if first_line.startswith("TASK:") else ""
    if task not in TASKS:
        raise HTTPError(
            400,
            f"the system message must start with one of {', '.join(f'`TASK: {t}`' for t in TASKS)}",
            param="messages",
        )
    if user is None:
        raise HTTPError(400, "there is no message with the role `user`", param="messages")
    return _ChatRequest(data["model"], messages, task, user)


def _forced_fault(headers: Message, model: str) -> str | None:
    fault = headers.get("X-Demo-Fault")
    if fault is not None:
        if fault not in FAULTS:
            raise HTTPError(400, f"X-Demo-Fault is {fault!r}; it must be one of {', '.join(FAULTS)}")
        return fault
    if headers.get("X-Demo-Quota") == "exhausted" or model.endswith("-no-quota"):
        return "quota"
    return None


class _ProviderServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, ledger: Ledger, hang_seconds: float) -> None:
        self.ledger = ledger
        self.hang_seconds = hang_seconds
        super().__init__((_HOST, port), _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it looks up the host's full name, which can take seconds without a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One segment for headers and body: two would wait for each other (Nagle and delayed acknowledgements).
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the client gave up or was killed, as the demo's does
            self.close_connection = True

    @property
    def _owner(self) -> _ProviderServer:
        assert isinstance(self.server, _ProviderServer)
        return self.server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._send(200, {"status": "ok"})
        elif path == "/stats":
            self._send(200, self._owner.ledger.stats())
        elif path == "/v1/models":
            models = [{"id": m, "object": "model", "created": 0, "owned_by": "stroma-demo"} for m in _MODELS]
            self._send(200, {"object": "list", "data": models})
        else:
            self._send_error(HTTPError(404, f"Invalid URL (GET {path})"))

    def do_POST(self) -> None:
        try:
            body = self._read_body()
            path = self.path.partition("?")[0]
            if path != "/v1/chat/completions":
                raise HTTPError(404, f"Invalid URL (POST {path})")
            self._complete(_parse_request(body))
        except HTTPError as error:
            self._send_error(error)

    def _read_body(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= _MAX_BODY:
            self.close_connection = True  # the body stays unread, so nothing after it can be understood
            raise HTTPError(411 if length < 0 else 413, f"send a Content-Length of at most {_MAX_BODY} bytes")
        return self.rfile.read(length)

    def _complete(self, request: _ChatRequest) -> None:
        forced = _forced_fault(self.headers, request.model)
        try:
            answer = answer_task(request.task, request.text)
        except ValueError as error:
            raise HTTPError(400, str(error), param="messages") from None
        except Exception as error:  # said in full: a dropped connection would look like one of the faults
            raise HTTPError(
                500, f"the demo's rules failed on this text: {error!r}", "server_error"
            ) from error
        decision = self._owner.ledger.decide(request.task, request.text, forced)
        time.sleep(decision.latency)
        if decision.outcome == "hang":
            self._await_client_gone(self._owner.hang_seconds)
        if decision.outcome in {"hang", "drop"}:
            self.close_connection = True
            return
        if decision.outcome not in {"ok", "malformed", "wrong_type"}:
            raise to_error(decision, request.model)
        if decision.outcome == "wrong_type":
            answer = with_wrong_type(request.task, answer)
        content = json.dumps(answer, ensure_ascii=False)
        if decision.outcome == "malformed":
            content = content[: max(1, len(content) * 3 // 5)]
        self._send(
            200,
            completion(request.model, request.messages, content, decision),
            {"openai-processing-ms": str(round(decision.latency * 1000))},
        )

    def _await_client_gone(self, seconds: float) -> None:
        """Wait until the client disconnects, or for so many seconds."""
        self.connection.settimeout(seconds)
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            pass

    def _send_error(self, error: HTTPError) -> None:
        self._send(error.status, error.body, error.headers)

    def _send(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        # Characters that UTF-8 cannot hold (lone surrogates) are sent as JSON escapes.
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def version_string(self) -> str:
        return "stroma-demo"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: /stats has the requests."""


# --- The process --------------------------------------------------------------------------------------------


def _end_with_parent(parent: int) -> None:
    """Exit when stdin, if a pipe, is closed, or when the parent process has ended."""

    def watch_stdin() -> None:
        try:
            while os.read(0, 1024):
                pass
        except OSError:
            pass
        # At once: every thread may be in the middle of an answer, and there is nothing to save.
        os._exit(0)

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.25)
        os._exit(0)

    # A terminal is not watched: to read from it in the background would stop the process.
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        mode = 0
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=watch_stdin, daemon=True).start()
    # A pipe's other end may be open in a fork of the parent as well, so its end alone is not enough.
    if os.name == "posix":
        threading.Thread(target=watch_parent, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stdin is closed, the parent has ended, or Ctrl-C. Prints JSON with `port` when ready."""
    parser = argparse.ArgumentParser(
        prog="python -m stroma.demo.provider", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="decides the faults (default: %(default)s)"
    )
    parser.add_argument("--calm", action="store_true", help="no faults but those a request asks for")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument(
        "--hang-seconds", type=float, default=4.0, help="silence of the fault hang (default: 4)"
    )
    options = parser.parse_args(argv)
    parent = os.getppid()
    try:
        server = _ProviderServer(options.port, Ledger(options.seed, options.calm), options.hang_seconds)
    except (OSError, OverflowError) as error:
        print(f"cannot listen on {_HOST}:{options.port}: {error}; try --port 0", file=sys.stderr)
        return 3
    _end_with_parent(parent)
    ready = {
        "port": server.server_port,
        "base_url": f"http://{_HOST}:{server.server_port}/v1",
        "pid": os.getpid(),
    }
    print(json.dumps(ready), flush=True)
    try:
        server.serve_forever(poll_interval=3600)  # nobody calls shutdown(), so there is nothing to poll for
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


# Isolated mode keeps modules in the user's working directory from taking the place of the standard library's.
# The folder that this stroma was imported from is then added last, for wherever the parent found it.
_BOOT: Final = (
    "import sys; sys.path.append(sys.argv.pop(1)); from stroma.demo.provider import main; sys.exit(main())"
)
_READY_SECONDS: Final = 15.0


class Provider:
    """A running provider process. Use it as a context manager or call `close()`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.port: Final = port
        self.pid: Final = process.pid
        self.base_url: Final = f"http://{_HOST}:{port}/v1"
        # Also at exit of the interpreter, should nobody have closed it; not in a fork, which is no owner.
        self._finalizer = weakref.finalize(self, _stop, process, os.getpid())

    def stats(self) -> Stats:
        """Return the requests served so far. Raises OSError after :meth:`close`."""
        # Not through a client that honours proxy variables: this never leaves the machine.
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=10)
        try:
            connection.request("GET", "/stats")
            stats: Stats = json.loads(connection.getresponse().read())
            return stats
        finally:
            connection.close()

    def close(self) -> None:
        """End the process and wait for it. Can be called again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def start_provider(seed: int = DEFAULT_SEED, *, calm: bool = False, hang_seconds: float = 4.0) -> Provider:
    """Start a provider on a free port and return it once it is ready (about 0.1 s), else raise RuntimeError.

    `calm` turns off all faults but those a request asks for. `hang_seconds` is how long the fault `hang`
    stays silent before it drops the connection: let it be more than the client's timeout.
    """
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-I", *(["-B"] if sys.dont_write_bytecode else []), "-c", _BOOT, root]
    command += ["--seed", str(seed), "--hang-seconds", str(hang_seconds), *(["--calm"] if calm else [])]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Ctrl-C in a terminal reaches the whole group; the provider has to outlive the run it serves.
            start_new_session=True,
        )
        try:
            port = _read_port(process)
        except BaseException as error:
            _stop(process, os.getpid())
            if not isinstance(error, ValueError):
                raise
            errors.seek(0)
            output = errors.read().decode(errors="replace").strip() or "nothing"
            raise RuntimeError(
                f"the demo's provider did not start (exit code {process.returncode}); it said: {output}"
            ) from None
    return Provider(process, port)


def _read_port(process: subprocess.Popen[bytes]) -> int:
    lines: list[bytes] = []

    def read(stream: IO[bytes] | None) -> None:
        if stream is not None:
            lines.append(stream.readline())

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    reader.join(_READY_SECONDS)
    port = json.loads(lines[0] if lines else b"")["port"]
    return int(port)


def _stop(process: subprocess.Popen[bytes], owner: int, patience: float = 2.0) -> None:
    """Close the process's stdin, which ends it; terminate, then kill, after `patience` seconds each."""
    if os.getpid() != owner:
        return
    if process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:
            pass
    for end in (process.terminate, process.kill):
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            end()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
