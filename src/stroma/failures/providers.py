"""The meaning of providers' exceptions, read by their shape: a status code, response headers, a class name.

No SDK is imported. An exception is recognised by what it carries, so a new release of an SDK, or a client that
wraps another, needs no change here.
"""

from __future__ import annotations

import builtins
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC
from typing import Any, Final, Literal, NamedTuple, cast

from stroma._utils.access import safe_get

__all__ = ["ProviderVerdict", "read_provider_error", "retry_after_seconds"]

ClassName = Literal["RECOVERABLE", "TERMINAL"]


class ProviderVerdict(NamedTuple):
    """The meaning of a provider error: a class, a stable reason, and the seconds that the server asks to wait, if any."""

    failure_class: ClassName
    reason: str
    retry_after: float | None = None


_BAD_REQUEST: Final = ProviderVerdict("TERMINAL", "bad_request")
_AUTH: Final = ProviderVerdict("TERMINAL", "auth")
_PERMISSION: Final = ProviderVerdict("TERMINAL", "permission")
_QUOTA: Final = ProviderVerdict("TERMINAL", "quota")
_NOT_FOUND: Final = ProviderVerdict("TERMINAL", "not_found")
_TOO_LARGE: Final = ProviderVerdict("TERMINAL", "too_large")
_CONTEXT: Final = ProviderVerdict("TERMINAL", "context_length")
_CONTENT: Final = ProviderVerdict("TERMINAL", "content_policy")
_TIMEOUT: Final = ProviderVerdict("RECOVERABLE", "timeout")
_CONNECTION: Final = ProviderVerdict("RECOVERABLE", "connection")
_CONFLICT: Final = ProviderVerdict("RECOVERABLE", "conflict")
_RATE_LIMIT: Final = ProviderVerdict("RECOVERABLE", "rate_limit")
_OVERLOADED: Final = ProviderVerdict("RECOVERABLE", "overloaded")
_SERVER: Final = ProviderVerdict("RECOVERABLE", "server_error")

_STATUS: Final[dict[int, ProviderVerdict]] = {
    400: _BAD_REQUEST,
    401: _AUTH,
    402: _QUOTA,
    403: _PERMISSION,
    404: _NOT_FOUND,
    408: _TIMEOUT,
    409: _CONFLICT,
    413: _TOO_LARGE,
    422: _BAD_REQUEST,
    425: ProviderVerdict("RECOVERABLE", "too_early"),
    429: _RATE_LIMIT,
    503: _OVERLOADED,
    504: _TIMEOUT,
    529: _OVERLOADED,
}
#: Codes and types in the body that say more than the status does, whichever that is.
_CODES: Final[dict[str, ProviderVerdict]] = {
    "insufficient_quota": _QUOTA,
    "billing_hard_limit_reached": _QUOTA,
    "billing_error": _QUOTA,
    "contract_spend_limit_reached": _QUOTA,
    "enforced_spend_limit_reached": _QUOTA,
    "linked_organization_spend_limit_reached": _QUOTA,
    "ServiceQuotaExceededException": _QUOTA,
    "context_length_exceeded": _CONTEXT,
    "string_above_max_length": _CONTEXT,
    "content_filter": _CONTENT,
    "content_policy_violation": _CONTENT,
    "moderation_blocked": _CONTENT,
    "overloaded_error": _OVERLOADED,
    # Google's ErrorInfo, beside a 400 or 403.
    "API_KEY_INVALID": _AUTH,
    "BILLING_DISABLED": _QUOTA,
    "PerDay": _QUOTA,  # A quota of the day that is used up: see _codes.
    # AWS: a key that is wrong or out of date has 400 or 403, a model that failed 424.
    "ExpiredTokenException": _AUTH,
    "InvalidSignatureException": _AUTH,
    "UnrecognizedClientException": _AUTH,
    "ModelErrorException": _SERVER,
    "ModelNotReadyException": _OVERLOADED,
    # Some of AWS's services say these with status 400.
    "Throttling": _RATE_LIMIT,
    "ThrottlingException": _RATE_LIMIT,
    "TooManyRequestsException": _RATE_LIMIT,
}
#: Those that only matter where there is no status that says something: an error inside a stream that began with 200.
_STREAMED: Final[dict[str, ProviderVerdict]] = {
    "rate_limit_error": _RATE_LIMIT,
    "rate_limit_exceeded": _RATE_LIMIT,
    "server_error": _SERVER,
    "api_error": _SERVER,
    "timeout_error": _TIMEOUT,
    "conflict_error": _CONFLICT,
    "invalid_api_key": _AUTH,
    "authentication_error": _AUTH,
    "permission_error": _PERMISSION,
    "not_found_error": _NOT_FOUND,
    "request_too_large": _TOO_LARGE,
    "invalid_request_error": _BAD_REQUEST,
    # AWS
    "throttlingException": _RATE_LIMIT,
    "serviceUnavailableException": _OVERLOADED,
    "internalServerException": _SERVER,
    "modelStreamErrorException": _SERVER,
    "modelTimeoutException": _TIMEOUT,
    "validationException": _BAD_REQUEST,
}
#: Statuses that mean something of their own at one provider.
_OWN: Final[dict[tuple[str, int], ProviderVerdict]] = {("cohere", 498): _CONTENT}  # a token of its deny-list
#: What a bad request is about where only its prose tells. It is TERMINAL either way: new words cost a good reason,
#: never the class.
_PHRASES: Final[tuple[tuple[str, ProviderVerdict], ...]] = (
    ("prompt is too long", _CONTEXT),
    ("input is too long", _CONTEXT),
    ("context length", _CONTEXT),
    ("context limit", _CONTEXT),
    ("context window", _CONTEXT),
    ("too many tokens", _CONTEXT),
    ("maximum number of tokens", _CONTEXT),
    ("content filtering policy", _CONTENT),
    ("content management policy", _CONTENT),
    ("content policy", _CONTENT),
    ("credit balance is too low", _QUOTA),
)
#: The same for a rate limit that no wait of ours outlasts.
_LASTING: Final[tuple[tuple[str, ProviderVerdict], ...]] = (
    ("api calls / month", _QUOTA),
    ("tokens must be reduced", _TOO_LARGE),  # OpenAI: one request is more than the limit of a minute.
)
#: And for what gRPC's client says of its own under a status that a server gives too.
_GRPC_PHRASES: Final[tuple[tuple[str, ProviderVerdict], ...]] = (
    ("message larger than max", _TOO_LARGE),
    ("failed to connect", _CONNECTION),
    ("errors resolving", _CONNECTION),
    ("dns resolution failed", _CONNECTION),
    ("connection reset", _CONNECTION),
    ("socket closed", _CONNECTION),
)
#: The statuses of gRPC, as Google's HTTP interfaces translate them.
_GRPC: Final = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "UNIMPLEMENTED": 404,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
#: Without a status: the names of an exception's bases that come from a client's package. The first match counts.
_CLIENTS: Final = frozenset(
    {
        "aiohttp", "anthropic", "botocore", "google", "httpcore", "httpcore2", "httpx", "httpx2", "mistralai",
        "openai", "requests", "urllib3",
    }
)  # fmt: skip
_NAMES: Final[tuple[tuple[frozenset[str], ProviderVerdict], ...]] = (
    # Subclasses of transport errors that no second try fixes.
    (
        frozenset(
            {
                "UnsupportedProtocol", "LocalProtocolError", "InvalidURL", "MissingSchema", "InvalidSchema",
                "NoRegionError", "ParamValidationError",
            }
        ),
        _BAD_REQUEST,
    ),
    (frozenset({"DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError"}), _AUTH),
    (frozenset({"ContentFilterFinishReasonError"}), _CONTENT),
    (
        frozenset(
            {
                "APITimeoutError", "TimeoutException", "Timeout", "ReadTimeout", "ConnectTimeout",
                "ReadTimeoutError", "ConnectTimeoutError", "ServerTimeoutError",
            }
        ),
        _TIMEOUT,
    ),
    (
        frozenset(
            {
                "APIConnectionError", "TransportError", "NetworkError", "RemoteProtocolError", "ConnectionError",
                "ClientConnectionError", "ClientPayloadError", "ChunkedEncodingError", "ConnectionClosedError",
                "IncompleteReadError", "NoResponseError", "ResponseStreamingError",
            }
        ),
        _CONNECTION,
    ),
)  # fmt: skip


def read_provider_error(exc: BaseException) -> ProviderVerdict | None:
    """Return the verdict on an exception, or on the one it was raised from; None if its shape is unknown.

    An exception group is what its worst member is: TERMINAL if one of them is, else nothing if one says nothing, else
    the one with the longest wait. Never raises: an attribute that misbehaves is one that says nothing.
    """
    return _verdict(exc, set())


def _verdict(exc: BaseException, seen: set[int]) -> ProviderVerdict | None:
    for candidate in (exc, _cause(exc)):
        kind = type(candidate)
        if candidate is None or (kind in _SILENT and not candidate.__dict__):
            continue  # Most errors of the user's own code. Looking for what they do not have would take 30 us.
        try:
            if issubclass(type(candidate), BaseExceptionGroup):
                verdict = _worst(cast("BaseExceptionGroup[Any]", candidate), seen)
            else:
                verdict = _read(candidate) if issubclass(type(candidate), BaseException) else None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            verdict = None
        if verdict is not None:
            return verdict
    return None


#: What an exception was raised from, whatever its class says of that name.
_cause: Final = cast("Any", BaseException).__cause__.__get__
#: Python's own exceptions that have no attributes but a message.
_SILENT: Final = frozenset(
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, (OSError, BaseExceptionGroup))
)


def _worst(group: BaseExceptionGroup[Any], seen: set[int]) -> ProviderVerdict | None:
    if id(group) in seen:  # A member can be raised from the group that it is in.
        return None
    seen.add(id(group))
    verdicts: list[ProviderVerdict] = []
    silent = False
    for member in group.exceptions:
        late = _TIMEOUT if issubclass(type(member), TimeoutError) else None
        verdict = _verdict(member, seen) or late
        if verdict is None:
            silent = True
        elif verdict.failure_class == "TERMINAL":
            return verdict
        else:
            verdicts.append(verdict)
    return None if silent else max(verdicts, key=lambda verdict: verdict.retry_after or 0.0)


def _read(exc: BaseException) -> ProviderVerdict | None:
    packages = {_package(cls) for cls in type(exc).__mro__}
    levels = _levels(exc, packages)
    codes = list(_codes(exc, levels))
    verdict = next((_CODES[code] for code in codes if code in _CODES), None)
    status = _status(exc, packages)
    if verdict is None and status is not None:
        own = (_OWN.get((package, status)) for package in packages)
        verdict = next(filter(None, own), None) or _STATUS.get(status) or (_SERVER if status >= 500 else None)
    if verdict is None and (status is None or status < 400):
        verdict = next((_STREAMED[code] for code in codes if code in _STREAMED), None)
    if verdict is not None:
        verdict = _read_prose(verdict, levels, packages)
    if status is None:
        return verdict or _read_transport(exc)
    headers = _headers(exc, packages)
    wish = headers.get("x-should-retry")
    if wish == "false" and status >= 400:
        verdict = (verdict or _BAD_REQUEST)._replace(failure_class="TERMINAL")
    elif wish == "true" and status >= 400 and verdict is not _QUOTA and verdict is not _AUTH:
        verdict = (verdict or _SERVER)._replace(failure_class="RECOVERABLE")
    if verdict is None:
        return None
    retry_after = retry_after_seconds(headers)
    return verdict._replace(retry_after=_retry_delay(levels) if retry_after is None else retry_after)


def _read_prose(known: ProviderVerdict, levels: list[Any], packages: set[str]) -> ProviderVerdict:
    """Return the same verdict, or a better one where the message says more than the status and the codes."""
    phrases: tuple[tuple[str, ProviderVerdict], ...] = ()
    if known is _BAD_REQUEST:
        phrases = _PHRASES
    elif known is _RATE_LIMIT:
        phrases = _LASTING
    if "grpc" in packages:
        phrases += _GRPC_PHRASES
    if not phrases:
        return known
    messages = [safe_get(level, name) for level in levels for name in ("message", "Message")]
    prose = " ".join(text for text in messages if isinstance(text, str)).lower()
    return next((verdict for phrase, verdict in phrases if phrase in prose), known)


def _read_transport(exc: BaseException) -> ProviderVerdict | None:
    names = {cls.__name__ for cls in type(exc).__mro__ if _package(cls) in _CLIENTS}
    for known, verdict in _NAMES:
        if names & known:
            return verdict
    return _CONNECTION if isinstance(exc, ConnectionError) else None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _status(exc: BaseException, packages: set[str]) -> int | None:
    response = safe_get(exc, "response")
    places = [(exc, "status_code"), (exc, "status"), (response, "status_code"), (response, "status")]
    places.append((safe_get(response, "ResponseMetadata"), "HTTPStatusCode"))  # botocore
    if "google" in packages:
        # Before the response, whose status is 200 where an error came in the middle of a stream.
        places.insert(0, (exc, "code"))
    for owner, name in places:
        value = safe_get(owner, name)
        if isinstance(value, int) and 100 <= value <= 599:
            return int(value)
    if "grpc" in packages:
        return _GRPC.get(str(safe_get(_call(exc, "code"), "name")))
    return None


def _call(exc: BaseException, name: str) -> Any:
    """Return the result of a method without arguments, as gRPC's exceptions have; None if it is missing or raises."""
    method = safe_get(exc, name)
    try:
        return method() if callable(method) else None
    except Exception:
        return None


def _headers(exc: BaseException, packages: set[str]) -> dict[str, str]:
    if "grpc" in packages:
        pairs = _pairs(_call(exc, "trailing_metadata"))
        if (pushback := pairs.get("grpc-retry-pushback-ms")) is not None:
            pairs["retry-after-ms"] = pushback
            if pushback.strip().startswith("-"):  # gRPC's way to say: do not try again.
                pairs["x-should-retry"] = "false"
        return pairs
    response = safe_get(exc, "response")
    places = (
        (response, "headers"),
        (exc, "headers"),
        (safe_get(response, "ResponseMetadata"), "HTTPHeaders"),
    )
    for owner, name in places:
        pairs = _pairs(safe_get(owner, name))
        if pairs:
            return pairs
    return {}


def _pairs(headers: Any) -> dict[str, str]:
    """Headers by their lower-case names, from a mapping, pairs, or a message of the standard library; {} from all else.

    A header that came several times is joined by commas, as HTTP has it.
    """
    pairs: dict[str, str] = {}
    try:
        items = headers.items() if hasattr(headers, "items") else headers
        for key, value in items if isinstance(items, Iterable) else ():
            name = _decoded(key).lower()
            text = ", ".join(map(_decoded, value)) if isinstance(value, (list, tuple)) else _decoded(value)
            pairs[name] = f"{pairs[name]}, {text}" if name in pairs else text
    except Exception:
        return {}
    return pairs


def _decoded(text: Any) -> str:
    return text.decode("latin-1") if isinstance(text, bytes) else str(text)


def _levels(exc: BaseException, packages: set[str]) -> list[Any]:
    """Return the objects that may hold codes and messages: the exception, and its body from the outside in."""
    if "grpc" in packages:
        return [exc, {"message": _call(exc, "details")}]
    if "aiohttp" in packages:
        return []  # It keeps no body, and warns whoever asks for its code.
    response = safe_get(exc, "response")
    body = safe_get(exc, "body")
    if body is None and isinstance(response, Mapping):
        return [exc, safe_get(response, "Error")]
    if body is None and isinstance(safe_get(exc, "details"), Mapping):
        body = safe_get(exc, "details")  # google
    if body is None:
        # httpx has the body on the response; a body that was never read must not be fetched here.
        body = safe_get(response, "_content")
    if isinstance(body, (bytes, str)):
        try:
            body = json.loads(body) if len(body) < 65_536 else None
        except (ValueError, RecursionError):
            body = None
    if isinstance(body, list) and len(body) == 1:
        body = body[0]  # google, from some of its addresses
    return [exc, body, safe_get(body, "error")]


def _codes(exc: BaseException, levels: list[Any]) -> Iterator[str]:
    for level in [*levels, *[safe_get(level, "details") for level in levels]]:
        for name in ("error_code", "code", "Code", "type"):
            value = safe_get(level, name)
            if isinstance(value, str):
                yield value
    for detail in _details(levels):
        reason = safe_get(detail, "reason")
        if isinstance(reason, str):
            yield reason
        violations = safe_get(detail, "violations")
        for violation in violations if isinstance(violations, list) else ():
            # The wait that is asked for beside it is of seconds, for a quota that is filled again at midnight.
            if "PerDay" in str(safe_get(violation, "quotaId")):
                yield "PerDay"


def _details(levels: list[Any]) -> Iterator[Any]:
    """Yield the details that Google's errors list: ErrorInfo, QuotaFailure, RetryInfo."""
    for level in levels[1:]:
        details = safe_get(level, "details")
        if isinstance(details, list):
            yield from details


def _retry_delay(levels: list[Any]) -> float | None:
    for detail in _details(levels):
        delay = safe_get(detail, "retryDelay")
        if isinstance(delay, str):
            return retry_after_seconds({"retry-after": delay.removesuffix("s")})
    return None


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the wait that a server asks for: ``retry-after-ms``, or ``retry-after`` in seconds or as an HTTP date.

    ``headers`` has lower-case names. A date that has passed is no wait. Of several wishes in one header, as a server
    and a proxy before it may have, the longest counts. None if there is no wish, or one that makes no sense.
    """
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        numbers = [_number(part) for part in text.split(",")]
        waits = [wait / scale for wait in numbers if math.isfinite(wait) and wait >= 0]
        if not waits and scale == 1.0:
            waits = _moment(text)
        if waits:
            return max(waits)
    return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _moment(text: str) -> list[float]:
    """Seconds from now until an HTTP date; none for anything else."""
    if not text:
        return []
    try:
        from email.utils import (
            parsedate_to_datetime,  # Few servers name a date, and this loads half of email.
        )

        moment = parsedate_to_datetime(text)
        # HTTP dates are in GMT, also where they do not say so.
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return [max(0.0, moment.timestamp() - time.time())]
    except (TypeError, ValueError, OverflowError, ImportError, OSError):
        return []
