"""What providers' exceptions mean, read by their shape: a status code, response headers, a class name.

No SDK is imported. An exception is recognised by what it carries, so a new release of an SDK, or a client that
wraps another, needs no change here.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["Verdict", "read_provider_error", "retry_after_seconds"]

ClassName = Literal["RECOVERABLE", "TERMINAL"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a provider's error means: a class, a stable reason, and the seconds the server asks to wait, if any."""

    failure_class: ClassName
    reason: str
    retry_after: float | None = None


_STATUS: Final[dict[int, tuple[ClassName, str]]] = {
    400: ("TERMINAL", "bad_request"),
    401: ("TERMINAL", "auth"),
    402: ("TERMINAL", "quota"),
    403: ("TERMINAL", "permission"),
    404: ("TERMINAL", "not_found"),
    408: ("RECOVERABLE", "timeout"),
    409: ("RECOVERABLE", "conflict"),
    413: ("TERMINAL", "too_large"),
    422: ("TERMINAL", "bad_request"),
    425: ("RECOVERABLE", "too_early"),
    429: ("RECOVERABLE", "rate_limit"),
    503: ("RECOVERABLE", "overloaded"),
    529: ("RECOVERABLE", "overloaded"),
}
#: Codes and types in a provider's error body that say more than its status does.
_CODES: Final[dict[str, tuple[ClassName, str]]] = {
    "insufficient_quota": ("TERMINAL", "quota"),
    "billing_hard_limit_reached": ("TERMINAL", "quota"),
    "billing_error": ("TERMINAL", "quota"),
    "context_length_exceeded": ("TERMINAL", "context_length"),
    "string_above_max_length": ("TERMINAL", "context_length"),
    "content_filter": ("TERMINAL", "content_policy"),
    "content_policy_violation": ("TERMINAL", "content_policy"),
    "overloaded_error": ("RECOVERABLE", "overloaded"),
    "rate_limit_error": ("RECOVERABLE", "rate_limit"),
    "rate_limit_exceeded": ("RECOVERABLE", "rate_limit"),
    "authentication_error": ("TERMINAL", "auth"),
    "permission_error": ("TERMINAL", "permission"),
    "api_error": ("RECOVERABLE", "server_error"),
    "timeout_error": ("RECOVERABLE", "timeout"),
}
#: Without a status: the root package and the name of a class among the exception's bases.
_TIMEOUTS: Final = frozenset(
    {"APITimeoutError", "TimeoutException", "ReadTimeout", "ConnectTimeout", "ServerTimeoutError", "Timeout"}
)
_CONNECTIONS: Final = frozenset(
    {
        "APIConnectionError",
        "TransportError",
        "ConnectionError",
        "ClientConnectionError",
        "ChunkedEncodingError",
    }
)
_CLIENTS: Final = frozenset(
    {"openai", "anthropic", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp", "urllib3"}
)
#: Subclasses of a transport error that no second try mends.
_LASTING: Final = frozenset(
    {"UnsupportedProtocol", "LocalProtocolError", "InvalidURL", "MissingSchema", "InvalidSchema"}
)


def read_provider_error(exc: BaseException) -> Verdict | None:
    """The verdict on an exception, or on what it was raised from; None if its shape says nothing.

    Never raises: an exception whose attributes misbehave is one that says nothing.
    """
    for candidate in (exc, exc.__cause__):
        if candidate is None:
            continue
        try:
            verdict = _read(candidate)
        except Exception:
            verdict = None
        if verdict is not None:
            return verdict
    return None


def _read(exc: BaseException) -> Verdict | None:
    status = _status(exc)
    headers = _headers(exc)
    if status is None:
        return _read_transport(exc)
    known: tuple[ClassName, str] | None = next((_CODES[c] for c in _codes(exc) if c in _CODES), None)
    if known is None or (known[0] == "RECOVERABLE" and status in (400, 401, 403)):
        known = _STATUS.get(status) or (("RECOVERABLE", "server_error") if status >= 500 else None)
    if known is None:
        return None
    failure_class, reason = known
    wish = headers.get("x-should-retry")
    if wish == "true" and failure_class == "TERMINAL" and reason not in ("quota", "auth"):
        failure_class = "RECOVERABLE"
    elif wish == "false":
        failure_class = "TERMINAL"
    return Verdict(failure_class, reason, retry_after_seconds(headers))


def _read_transport(exc: BaseException) -> Verdict | None:
    names: set[str] = set()
    for cls in type(exc).__mro__:
        if cls.__module__.partition(".")[0] in _CLIENTS:
            names.add(cls.__name__)
    if names & _LASTING:
        return Verdict("TERMINAL", "bad_request")
    if names & _TIMEOUTS:
        return Verdict("RECOVERABLE", "timeout")
    if names & _CONNECTIONS or isinstance(exc, ConnectionError):
        return Verdict("RECOVERABLE", "connection")
    return None


def _status(exc: BaseException) -> int | None:
    response = getattr(exc, "response", None)
    for owner in (exc, response):
        for name in ("status_code", "status"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:
                return int(value)
    return None


def _headers(exc: BaseException) -> dict[str, str]:
    for owner in (getattr(exc, "response", None), exc):
        headers = getattr(owner, "headers", None)
        if isinstance(headers, Mapping):
            return {str(k).lower(): str(v) for k, v in headers.items()}
    return {}


def _codes(exc: BaseException) -> Iterator[str]:
    for name in ("code", "type"):
        value = getattr(exc, name, None)
        if isinstance(value, str):
            yield value
    body: Any = getattr(exc, "body", None)
    if body is None:
        # httpx has the body on the response; a body that was never read must not be fetched here.
        body = getattr(getattr(exc, "response", None), "_content", None)
        try:
            body = json.loads(body) if isinstance(body, bytes) and len(body) < 65_536 else None
        except ValueError:
            body = None
    for level in (body, body.get("error") if isinstance(body, Mapping) else None):
        if isinstance(level, Mapping):
            for name in ("code", "type"):
                value = level.get(name)
                if isinstance(value, str):
                    yield value


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait a server asks for: ``retry-after-ms``, or ``retry-after`` in seconds or as an HTTP date.

    ``headers`` has lower-case names. None if there is none, or one that makes no sense.
    """
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if not text:
            continue
        try:
            seconds = float(text) / scale
        except ValueError:
            try:
                moment = email.utils.parsedate_to_datetime(text)
            except (TypeError, ValueError):
                continue
            seconds = moment.timestamp() - time.time()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
