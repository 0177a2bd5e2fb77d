"""recorded: replay responses of a provider from a file, by a server on this machine."""

from __future__ import annotations

import base64
import http.client
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

__all__ = ["Recorded", "Request", "recorded"]

_SCHEMA: Final = "stroma.recorded-responses/1"
#: Request headers that hold a secret; its text is replaced everywhere.
_SECRET_HEADERS: Final = (
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "cookie",
    "proxy-authorization",
)
_NAMES: Final = (
    r"(?:x-)?api[-_]?key|authorization|proxy-authorization|password|passwd|secret|client[-_]secret|"
    r"(?:access|refresh|id|auth|session|bearer)[-_]?token|private[-_]?key|cookie|signature|x-goog-api-key"
)
_SECRET_NAMES: Final = re.compile(_NAMES, re.IGNORECASE)
#: Secret names in addresses.
_SECRET_PARAMETERS: Final = re.compile(rf"{_NAMES}|key|token|sig", re.IGNORECASE)
_SECRET_TEXTS: Final = re.compile(
    r"sk-[\w-]{16,}|\bBearer\s+[\w.~+/-]{16,}=*|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bgh[pousr]_\w{20,}|\bxox[abprs]-[\w-]{10,}|"
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"
)
#: In a text: in a form, in an address, and in JSON.
_SECRET_PAIRS: Final = re.compile(
    rf"((?<![\w-])(?:{_NAMES})=|[?&](?:{_NAMES}|key|token|sig)=)[^&\s\"'\\<>]+"
    rf"|((\\*[\"'])(?:{_NAMES})\3\s*:\s*\3)[^\"'\\]+",
    re.IGNORECASE,
)
_HIDDEN: Final = "***"
#: Response headers that matter to a client.
_KEPT_HEADERS: Final = re.compile(
    r"(?i)content-type|retry-after(-ms)?|x-should-retry|(x-)?request-id|.*ratelimit-.*|openai-model|x-amzn-errortype"
)
_NOT_FORWARDED: Final = ("host", "connection", "accept-encoding", "content-length", "transfer-encoding")

Mode = Literal["replay", "record"]


class Request(NamedTuple):
    """A request of the client. ``body``: JSON data, text, or None; without secrets."""

    method: str
    path: str
    body: Any


def recorded(
    path: str | PathLike[str],
    *,
    upstream: str | None = None,
    mode: Mode = "replay",
    ignore: Collection[str] = (),
    scrub: Callable[[Any], Any] | None = None,
) -> Recorded:
    """Replay the responses in a file by a server on this machine. A context manager; its ``url`` is for the client.

    ```python
    with recorded("tests/recordings/draft.json") as provider:
        client = AsyncOpenAI(base_url=provider.url, api_key="any", max_retries=0)
    ```

    A request gets the response recorded for the same method, path and body: several responses in order, then the last one
    again and again. Nothing leaves this machine. A request that was not recorded gets status 404, and the block raises
    AssertionError at its end.

    ``mode="record"`` forwards requests to ``upstream`` (the base URL of the provider) and replaces the file. No header of a
    request is stored. Keys, tokens and passwords in addresses and bodies are replaced by ``***``: they are recognised by
    their names, by their form, and by the secrets in the request's headers. ``scrub``: function that gets each body (JSON
    data, or a text) and returns the one to store; it is applied to requests before they are compared, too. ``ignore``: names
    in the outermost object of a body that make no difference, such as ``"user"``.

    Raises FileNotFoundError without a recording, ValueError for a file that is not a recording.
    """
    return Recorded(Path(path), upstream, mode, frozenset(ignore), scrub)


class Recorded:
    """Server that :func:`recorded` returns.

    Attributes:
        url: the base URL for the client, with the path of ``upstream``.
        requests: the requests since the server was started.
    """

    def __init__(
        self,
        path: Path,
        upstream: str | None,
        mode: Mode,
        ignore: frozenset[str],
        scrub: Callable[[Any], Any] | None,
    ) -> None:
        if mode not in ("replay", "record"):
            raise ValueError(f'mode must be "replay" or "record", got {mode!r}')
        if mode == "record" and upstream is None:
            raise ValueError('mode="record" needs upstream=, the base URL of the provider')
        self.path, self.mode = path, mode
        self.requests: list[Request] = []
        self._ignore, self._scrub = ignore, scrub
        self._upstream = None if upstream is None else upstream.rstrip("/")
        self._lock = threading.Lock()
        self._entries: list[dict[str, Any]] = []
        self._answers: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._served: defaultdict[str, int] = defaultdict(int)
        self._unknown: list[Request] = []
        self._server: ThreadingHTTPServer | None = None
        self.url = ""

    def rewind(self) -> None:
        """Start with the first responses again; for the ``reset=`` of assert_resumable."""
        with self._lock:
            self._served.clear()

    # ------------------------------------------------------------------ from beginning to end

    def __enter__(self) -> Self:
        base = self._upstream or ""
        if self.mode == "replay":
            base = self._load() or base
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="stroma-recorded", daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{urllib.parse.urlsplit(base).path}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        if kind is not None:
            return
        first = self._unknown[0] if self._unknown else None
        if first is not None and self.mode == "record":
            raise AssertionError(
                f"{self._upstream} cannot be reached: {first.method} {first.path}; {self.path} is not changed"
            )
        if first is not None:
            raise AssertionError(
                f"{self.path} lacks {len(self._unknown)} of the requests; the first is {first.method} {first.path} "
                f'{_short(first.body)}; record them with mode="record" and upstream=, in pytest with --stroma-record'
            )
        if self.mode == "record":
            self._save()

    def _load(self) -> str:
        try:
            data = json.loads(self.path.read_text("utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f'no recording {self.path}; create it with mode="record" and upstream=, in pytest with --stroma-record'
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.path} is not a recording: {error}; record it again") from error
        if not isinstance(data, dict) or data.get("schema") != _SCHEMA:
            raise ValueError(f"{self.path} is not a recording of this release ({_SCHEMA}); record it again")
        for entry in data["responses"]:
            self._answers[self._key(Request(**entry["request"]))].append(entry["response"])
        return str(data["upstream"])

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"schema": _SCHEMA, "upstream": self._upstream, "responses": self._entries}
        self.path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")

    # ------------------------------------------------------------------ one request

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        """Return the response for a request. Called by the threads of the server."""
        secrets = _secrets_of(headers)
        request = Request(method, _clean_path(path), self._cleaned(_read(body), secrets))
        if self.mode == "record":
            return self._ask(request, path, headers, body, secrets)
        key = self._key(request)
        with self._lock:
            self.requests.append(request)
            answers = self._answers.get(key)
            if not answers:
                self._unknown.append(request)
                error = {
                    "message": f"{method} {request.path} is not in {self.path.name}",
                    "type": "not_recorded",
                }
                return _Answer(
                    404, {"content-type": "application/json"}, json.dumps({"error": error}).encode()
                )
            number = min(self._served[key], len(answers) - 1)
            self._served[key] += 1
        return _Answer.of(answers[number])

    def _ask(
        self, request: Request, path: str, headers: Mapping[str, str], body: bytes, secrets: list[str]
    ) -> _Answer:
        assert self._upstream is not None
        base = urllib.parse.urlsplit(self._upstream)
        forwarded = {name: value for name, value in headers.items() if name.lower() not in _NOT_FORWARDED}
        query = urllib.request.Request(
            f"{base.scheme}://{base.netloc}{path}",
            data=body or None,
            headers=forwarded,
            method=request.method,
        )
        try:
            with urllib.request.urlopen(query, timeout=600) as response:
                answer = _Answer(
                    response.status, _response_headers(dict(response.headers.items())), response.read()
                )
        except urllib.error.HTTPError as error:
            answer = _Answer(error.code, _response_headers(dict(error.headers.items())), error.read())
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self._unknown.append(request)
            data = json.dumps({"error": {"message": f"{self._upstream} cannot be reached: {error}"}})
            return _Answer(502, {"content-type": "application/json"}, data.encode())
        with self._lock:
            self.requests.append(request)
            self._entries.append({"request": request._asdict(), "response": self._written(answer, secrets)})
        return answer

    def _written(self, answer: _Answer, secrets: list[str]) -> dict[str, Any]:
        data: dict[str, Any] = {"status": answer.status, "headers": answer.headers}
        read = _read(answer.body)
        if isinstance(read, bytes):
            return {**data, "base64": base64.b64encode(read).decode()}
        return {**data, "body": self._cleaned(read, secrets)}

    def _cleaned(self, value: Any, secrets: list[str]) -> Any:
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode()
        cleaned = _clean(value, secrets)
        return cleaned if self._scrub is None or value is None else self._scrub(cleaned)

    def _key(self, request: Request) -> str:
        body = request.body
        if isinstance(body, dict):
            body = {name: value for name, value in body.items() if name not in self._ignore}
        return json.dumps([request.method, request.path, body], sort_keys=True)


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> _Answer:
        body = written.get("body")
        if "base64" in written:
            data = base64.b64decode(written["base64"])
        else:
            data = (
                b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
            )
        return cls(written["status"], written["headers"], data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # many clients may connect at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        return None  # the client disconnected


def _handler(owner: Recorded) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            answer = owner.answer(self.command, self.path, dict(self.headers.items()), self._read_body())
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_one

        def _read_body(self) -> bytes:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            body: bytes = self.rfile.read(int(self.headers.get("content-length") or 0))
            return body

        def log_message(self, format: str, *args: Any) -> None:
            return None

    return Handler


# ---------------------------------------------------------------------- secrets


def _read(body: bytes) -> Any:
    """Return a body as JSON data, else as text, else as bytes; None for an empty one."""
    if not body:
        return None
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return body
    try:
        value = json.loads(text)
    except ValueError:
        return text
    # A text stays a text, so that reading it gives the same body.
    return text if isinstance(value, str) else value


def _secrets_of(headers: Mapping[str, str]) -> list[str]:
    secrets_found = []
    for name, value in headers.items():
        if name.lower() in _SECRET_HEADERS:
            secrets_found += [value, value.rpartition(" ")[2]]
    return sorted({text for text in secrets_found if len(text) >= 6}, key=len, reverse=True)


def _clean(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            name: _HIDDEN
            if isinstance(inner, str) and _SECRET_NAMES.fullmatch(name)
            else _clean(inner, secrets)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_clean(inner, secrets) for inner in value]
    if isinstance(value, str):
        text: str = value
        for secret in secrets:
            text = text.replace(secret, _HIDDEN)
        text = _SECRET_PAIRS.sub(lambda pair: (pair[1] or pair[2]) + _HIDDEN, text)
        return str(_SECRET_TEXTS.sub(_HIDDEN, text))
    return value


def _clean_path(path: str) -> str:
    parts = urllib.parse.urlsplit(path)
    query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    cleaned = [(name, _HIDDEN if _SECRET_PARAMETERS.fullmatch(name) else value) for name, value in query]
    query_text = urllib.parse.urlencode(cleaned, safe="*")
    return f"{_clean(parts.path, [])}?{query_text}" if query_text else str(_clean(parts.path, []))


def _response_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if _KEPT_HEADERS.fullmatch(name)}


def _short(body: Any) -> str:
    text = json.dumps(body, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
