"""A model provider for the demo: a server that speaks the OpenAI HTTP protocol on 127.0.0.1.

It needs no key and no network, answers as recorded below, and misbehaves the way real
providers do: rate limits, server errors, hangs, dropped connections, truncated JSON, wrong types.

    with Provider() as provider:
        client = openai.AsyncOpenAI(base_url=provider.base_url, api_key="demo", max_retries=0)

The first line of the system message is `TASK: extract`, `TASK: classify` or `TASK: risk`. The first user
message is the document's text (extract) or JSON `{"records": [{"name": ..., <fields of extract>}, ...]}`.
Later messages, such as a request to fix an earlier answer, change neither the answer nor the faults.

The faults of a text depend on the task, the text and how often that text was sent; never on the time or on
the order in which requests arrive. `Provider(faults=["429"])` has other ones.
"""

from __future__ import annotations

import hashlib
import json
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self

#: Answers about a document that does not ship with the demo.
_UNKNOWN: Final[Mapping[str, dict[str, Any]]] = {
    "extract": {
        "kind": "other",
        **dict.fromkeys(("party", "reference", "date", "currency", "total")),
        "summary": "Not a document of the demo; set OPENAI_API_KEY to have a model read it",
        "flags": [],
    },
    "classify": {"category": "ignore", "priority": "low"},
    "risk": {"level": "low", "reasons": []},
}


def digest_of(task: str, text: str) -> str:
    """Return the SHA-256 (hex) of a task and the text of its user message.

    Line ends, white space around a document and the layout of JSON do not count, what they say does.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\ufeff \t\n")
    if task != "extract":
        text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{task}\n{text}".encode("utf-8", "replace")).hexdigest()


def answer(task: str, text: str) -> dict[str, Any]:
    """Return the answer to a task."""
    if task == "extract":
        known: dict[str, Any] = _recorded().get(digest_of(task, text)[:12], _UNKNOWN)[task]
        return known
    by_name = {one["document"]: one for one in _recorded().values()}
    names = [one["name"] for one in json.loads(text)["records"]]
    answers = [{"name": name, **by_name.get(name, _UNKNOWN)[task]} for name in names]
    return {"labels" if task == "classify" else "risks": answers}


@cache
def _recorded() -> Mapping[str, Mapping[str, Any]]:
    """Return the answers about each document of the demo by task, by its digest, and its faults."""
    recorded: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("answers.json").read_text("utf-8")
    )
    return recorded


#: Kinds of faults.
FAULTS: Final = ("429", "500", "503", "hang", "drop", "malformed", "wrong_type")
_WRONG_ANSWERS: Final = ("malformed", "wrong_type")
_HOST: Final = "127.0.0.1"
_LATENCY_SECONDS: Final = 0.04


# ---------------------------------------------------------------------- faults


def faults_of(digest: str) -> tuple[str, ...]:
    """Return the faults of the first calls with a text; later calls succeed. ``digest``: see digest_of().

    They are recorded for the documents that ship with the demo; of other texts, every third has one.
    """
    recorded = _recorded().get(digest[:12])
    if recorded is not None:
        return tuple(recorded.get("faults", ()))
    number = int(digest[:8], 16)
    return () if number % 3 else (FAULTS[number // 3 % len(FAULTS)],)


@dataclass(frozen=True, slots=True)
class _Decision:
    """The provider's decision about one request: "ok" or a fault. ``call``: 1-based, of this text."""

    outcome: str
    call: int
    digest: str


class _RequestLog:
    """Decisions about requests, shared by the threads that serve connections."""

    def __init__(self, faults: Sequence[str] | None) -> None:
        self._faults = faults
        self._lock = threading.Lock()
        #: Requests by the digest of their text.
        self.calls: Counter[str] = Counter()

    def decide(self, task: str, text: str) -> _Decision:
        digest = digest_of(task, text)
        with self._lock:
            # Counted before it is answered: a client that dies in between has bought this answer.
            self.calls[digest] += 1
            call = self.calls[digest]
        faults = faults_of(digest) if self._faults is None else self._faults
        return _Decision(faults[call - 1] if call <= len(faults) else "ok", call, digest)


# ---------------------------------------------------------------------- HTTP


class _HTTPError(Exception):
    """Error response in the format of OpenAI's."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _error_of(decision: _Decision, model: str) -> _HTTPError:
    if decision.outcome == "429":
        wait = 1000 if int(decision.digest[0], 16) % 2 else 300
        # Both forms are in use; the one in milliseconds is OpenAI's own and the finer.
        headers = {"retry-after": str(wait // 1000)} if wait >= 1000 else {"retry-after-ms": str(wait)}
        message = f"Rate limit reached for {model} on requests per min (RPM). Please try again in {wait}ms."
        return _HTTPError(429, message, "requests", "rate_limit_exceeded", headers)
    if decision.outcome == "503":
        message = "The engine is currently overloaded, please try again later."
        return _HTTPError(503, message, "service_unavailable_error")
    return _HTTPError(500, "The server had an error while processing your request.", "server_error")


def _with_wrong_type(task: str, right: dict[str, Any]) -> dict[str, Any]:
    if task == "extract":
        return {**right, "total": "twelve hundred"}
    key, spoilt = ("labels", {"priority": 3}) if task == "classify" else ("risks", {"level": 3})
    return {key: [{**right[key][0], **spoilt}, *right[key][1:]] if right[key] else "none"}


def _tokens(text: str) -> int:
    return -(-len(text) // 4)


def _completion(model: str, messages: list[dict[str, str]], content: str, decision: _Decision) -> Any:
    # The protocol's own overhead: four tokens a message and three for the reply's start.
    prompt, produced = sum(_tokens(one["content"]) + 4 for one in messages) + 3, _tokens(content)
    reason = "length" if decision.outcome == "malformed" else "stop"
    message = {"role": "assistant", "content": content, "refusal": None}
    usage = {"prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced}
    return {
        "id": f"chatcmpl-demo-{decision.digest[:12]}-{decision.call}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
        "usage": usage,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, ledger: _RequestLog, hang_seconds: float) -> None:
        self.ledger, self.hang_seconds = ledger, hang_seconds
        super().__init__((_HOST, 0), _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it looks up the host's full name, which can take seconds without a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    # One segment for headers and body: two would wait for each other (Nagle and delayed acknowledgements).
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the client gave up or was killed, as the demo's does
            self.close_connection = True

    def do_POST(self) -> None:
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._complete(json.loads(body))
        except _HTTPError as error:
            self._send(error.status, error.body, error.headers)
        except (ValueError, LookupError, TypeError) as error:
            self._send(400, _HTTPError(400, f"the request is not one of the demo's: {error}").body)

    def _complete(self, request: Any) -> None:
        model, messages = request["model"], request["messages"]
        task = messages[0]["content"].partition("\n")[0].removeprefix("TASK: ")
        text = next(message["content"] for message in messages if message["role"] == "user")
        right = answer(task, text)
        decision = self.server.ledger.decide(task, text)
        time.sleep(_LATENCY_SECONDS)
        if decision.outcome == "hang":
            self._await_client_gone()
        if decision.outcome in ("hang", "drop"):
            self.close_connection = True
            return
        if decision.outcome not in ("ok", *_WRONG_ANSWERS):
            raise _error_of(decision, model)
        right = _with_wrong_type(task, right) if decision.outcome == "wrong_type" else right
        content = json.dumps(right, ensure_ascii=False)
        if decision.outcome == "malformed":
            content = content[: max(1, len(content) * 3 // 5)]
        self._send(200, _completion(model, messages, content, decision))

    def _await_client_gone(self) -> None:
        """Wait until the client disconnects, or for some seconds."""
        self.connection.settimeout(self.server.hang_seconds)
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            pass

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        # Characters that UTF-8 cannot hold (lone surrogates) are sent as JSON escapes.
        payload = json.dumps(body).encode()
        self.send_response(status)
        about = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **(headers or {})}
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: `Provider.calls()` has the requests."""


class Provider:
    """A running provider, in threads of this process. Use it as a context manager or call `close()`.

    `faults` are those of the first calls with each text, in place of its own. `hang_seconds` is how long the
    fault `hang` stays silent before it drops the connection: let it be more than the client's timeout.
    """

    def __init__(self, *, faults: Sequence[str] | None = None, hang_seconds: float = 4.0) -> None:
        self._server = _Server(_RequestLog(faults), hang_seconds)
        self.base_url: Final = f"http://{_HOST}:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def calls(self) -> dict[str, int]:
        """Return how often each text was sent so far, by its digest."""
        return dict(self._server.ledger.calls)

    def close(self) -> None:
        """Stop listening. Can be called again."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
