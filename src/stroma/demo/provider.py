"""A model provider for the demo: a server that speaks the OpenAI HTTP protocol on 127.0.0.1.

It needs no key and no network, answers as recorded below, and misbehaves the way real
providers do: rate limits, server errors, hangs, dropped connections, truncated JSON, wrong types.

    with Provider() as provider:
        client = openai.AsyncOpenAI(base_url=provider.base_url, api_key="demo", max_retries=0)

The first line of the system message is `TASK: extract`, `TASK: classify` or `TASK: risk`. The first user
message is the document's text (extract) or JSON `{"records": [{"name": ..., <fields of extract>}, ...]}`.
Later messages, such as a request to fix an earlier answer, change neither the answer nor the faults.

The faults of a text depend on the task, the text and how often that text was sent; never on the time or on
the order in which requests arrive. A header forces one of `FAULTS`: `X-Demo-Fault: 429`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self, TypedDict

#: Kinds of documents, with the words that tell them; the first that is found counts.
_KINDS: Final = {
    "credit_note": "credit note|credit memo|gutschrift",
    "reminder": "reminder|mahnung|overdue",
    "purchase_order": "purchase order|bestellung|bon de commande",
    "contract": "agreement|contract|vertrag",
    "invoice": "invoice|rechnung|facture",
    "support": "ticket|help|problem|refund|error|anfrage",
}
_CATEGORIES: Final = {
    "credit_note": ("receivable", "low"),
    "reminder": ("support", "normal"),
    "purchase_order": ("receivable", "normal"),
    "contract": ("legal", "normal"),
    "invoice": ("payable", "normal"),
    "support": ("support", "normal"),
}
#: Flags of records that are dealt with first.
_URGENT: Final = {
    "prompt_injection",
    "overdue",
    "late_delivery",
    "bank_details_changed",
    "auto_renewal",
    "unlimited_liability",
    "urgent",
}
_FLAG_RISKS: Final = {
    "prompt_injection": ("high", "the text gives orders to whoever processes it"),
    "bank_details_changed": ("high", "asks for payment to a new bank account; call the supplier back"),
    "unlimited_liability": ("high", "contains a liability without a limit"),
    "overdue": ("medium", "payment is overdue"),
    "late_delivery": ("medium", "a delivery is late and a penalty may be due"),
    "auto_renewal": ("medium", "renews by itself unless notice is given"),
    "urgent": ("medium", "a customer reports an outage"),
    "two_currencies": ("medium", "amounts in more than one currency"),
    "total_missing": ("medium", "states no total"),
    "ocr_noise": ("medium", "badly scanned, check the figures against the original"),
    "empty": ("low", "nothing to read"),
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
    """Return the answer to a task. Raises ValueError for records in another form than the pipeline's."""
    if task == "extract":
        recorded = _recorded().get(digest_of(task, text)[:12])
        about = ("document", "faults")
        return _guess(text) if recorded is None else {k: recorded[k] for k in recorded if k not in about}
    message = json.loads(text)
    records = message.get("records") if isinstance(message, dict) else None
    if not isinstance(records, list) or not all(isinstance(one, dict) and one.get("name") for one in records):
        raise ValueError('the user message must be JSON of the form {"records": [{"name": ...}, ...]}')
    if task == "classify":
        return {"labels": [_label(record) for record in records]}
    return {"risks": [_risk(record, records) for record in records]}


@cache
def _recorded() -> Mapping[str, dict[str, Any]]:
    recorded: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("answers.json").read_text("utf-8")
    )
    return recorded


def _guess(text: str) -> dict[str, Any]:
    """Return the record of an unknown document: its kind, number and total, if they are plain."""
    if not text.strip():
        nothing = dict.fromkeys(("party", "reference", "date", "currency", "total"))
        return {"kind": "other", **nothing, "summary": "Empty document", "flags": ["empty"]}
    kind = next((kind for kind, words in _KINDS.items() if re.search(words, text, re.IGNORECASE)), "other")
    number = re.search(r"\b(?:no|number|nr)\b\.?:? *([\w/-]*\d[\w/-]*)", text, re.IGNORECASE)
    total = re.search(r"^.*\btotal\b.*?(\d[\d,]*\.\d\d)", text, re.IGNORECASE | re.MULTILINE)
    is_bill = kind in ("invoice", "credit_note", "purchase_order")
    return {
        "kind": kind,
        "party": None,
        "reference": None if number is None else number[1],
        "date": None,
        "currency": None,
        "total": float(total[1].replace(",", "")) if is_bill and total is not None else None,
        "summary": f"{kind.replace('_', ' ').capitalize()} {number[1] if number else ''}".strip(),
        "flags": ["total_missing"] if is_bill and total is None else [],
    }


def _label(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return who handles a record, and how soon."""
    category, priority = _CATEGORIES.get(str(record.get("kind")), ("ignore", "low"))
    if record.get("kind") == "reminder" and record.get("total") is not None:
        category = "payable"
    priority = "high" if _URGENT.intersection(record.get("flags") or ()) else priority
    return {"name": record["name"], "category": category, "priority": priority}


def _risk(record: Mapping[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how risky it is to act on a record, among all of them."""
    causes = [cause for flag, cause in _FLAG_RISKS.items() if flag in (record.get("flags") or ())]
    number = ("kind", "reference", "party")
    if record.get("kind") == "invoice" and record.get("reference"):
        same = [one["name"] for one in records if all(one.get(name) == record.get(name) for name in number)]
        if others := [name for name in same if name != record["name"]]:
            causes.append(("high", f"the same invoice number is on {', '.join(others)}"))
    level = max((level for level, _ in causes), key=("low", "medium", "high").index, default="low")
    return {"name": record["name"], "level": level, "reasons": [reason for _, reason in causes]}


#: Kinds of faults that texts have, and one that is only forced.
_FAULTS: Final = ("429", "500", "503", "hang", "drop", "malformed", "wrong_type")
FAULTS: Final = (*_FAULTS, "quota")
_WRONG_ANSWERS: Final = ("malformed", "wrong_type")
_TASKS: Final = ("extract", "classify", "risk")
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
    return () if number % 3 else (_FAULTS[number // 3 % len(_FAULTS)],)


class Stats(TypedDict):
    """Requests served so far: how often each outcome ("ok" and `FAULTS`) and each text, by its digest."""

    calls: int
    by_outcome: dict[str, int]
    by_text: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Decision:
    """The provider's decision about one request. ``call``: 1-based, of this text."""

    outcome: str
    call: int
    digest: str


@dataclass(slots=True)
class _RequestLog:
    """Decisions and counts of requests, shared by the threads that serve connections."""

    calm: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _planned: Counter[str] = field(default_factory=Counter)
    _calls: Counter[str] = field(default_factory=Counter)
    _outcomes: Counter[str] = field(default_factory=Counter)

    def decide(self, task: str, text: str, forced: str | None) -> _Decision:
        digest = digest_of(task, text)
        with self._lock:
            self._calls[digest] += 1
            call, outcome = self._calls[digest], forced
            if outcome is None:  # Else it leaves the faults that the text has coming as they are.
                plan, planned = () if self.calm else faults_of(digest), self._planned[digest]
                outcome = plan[planned] if planned < len(plan) else "ok"
                self._planned[digest] += 1
            # Counted before it is answered: a client that dies in between has bought this answer.
            self._outcomes[outcome] += 1
        return _Decision(outcome, call, digest)

    def stats(self) -> Stats:
        with self._lock:
            return {
                "calls": self._outcomes.total(),
                "by_outcome": dict(self._outcomes),
                "by_text": dict(self._calls),
            }


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
    if decision.outcome == "quota":
        message = "You exceeded your current quota, please check your plan and billing details."
        return _HTTPError(429, message, "insufficient_quota", "insufficient_quota")
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
            if self.path != "/v1/chat/completions":
                raise _HTTPError(404, f"Invalid URL (POST {self.path})")
            self._complete(json.loads(body))
        except _HTTPError as error:
            self._send(error.status, error.body, error.headers)
        except (ValueError, LookupError, TypeError) as error:
            self._send(400, _HTTPError(400, f"the request is not one of the demo's: {error}").body)

    def _complete(self, request: Any) -> None:
        model, messages, forced = request["model"], request["messages"], self.headers.get("X-Demo-Fault")
        task = messages[0]["content"].partition("\n")[0].removeprefix("TASK: ")
        if task not in _TASKS:
            tasks = ", ".join(f"`TASK: {task}`" for task in _TASKS)
            raise ValueError(f"the system message must start with one of {tasks}")
        if forced not in (None, *FAULTS):
            raise ValueError(f"X-Demo-Fault is {forced!r}; it must be one of {', '.join(FAULTS)}")
        text = next(message["content"] for message in messages if message["role"] == "user")
        right = answer(task, text)
        decision = self.server.ledger.decide(task, text, forced)
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
        """Print nothing: `Provider.stats()` has the requests."""


class Provider:
    """A running provider, in threads of this process. Use it as a context manager or call `close()`.

    `calm` turns off all faults but those a request asks for. `hang_seconds` is how long the fault `hang`
    stays silent before it drops the connection: let it be more than the client's timeout.
    """

    def __init__(self, *, calm: bool = False, hang_seconds: float = 4.0) -> None:
        self._server = _Server(_RequestLog(calm), hang_seconds)
        self.base_url: Final = f"http://{_HOST}:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stats(self) -> Stats:
        """Return the requests served so far."""
        return self._server.ledger.stats()

    def close(self) -> None:
        """Stop listening. Can be called again."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
