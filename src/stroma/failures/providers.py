"""The meaning of providers' exceptions, read by their shape: a status code, response headers, a class name.

No SDK is imported. An exception is recognised by what it carries, so a new release of an SDK, or a client
that wraps another, needs no change here.
"""

from __future__ import annotations

import builtins
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC
from typing import Any, Final, cast

from stroma._utils.access import cause_of, safe_get
from stroma.failures.errors import verdict_of
from stroma.failures.provider_verdicts import (
    AUTH,
    BAD_REQUEST,
    CLIENTS,
    CODES,
    CONNECTION,
    GRPC,
    GRPC_PHRASES,
    LASTING,
    NAMES,
    OWN,
    PHRASES,
    QUOTA,
    RATE_LIMIT,
    SERVER,
    STATUS,
    STREAMED,
    TIMEOUT,
    ProviderVerdict,
)


def read_provider_error(exc: BaseException) -> ProviderVerdict | None:
    """Return the verdict on an exception, or on the one it was raised from; None if its shape is unknown.

    An exception group is what its worst member is: TERMINAL if one of them is, else AMBIGUOUS if one says
    nothing, else RECOVERABLE; with the longest wait. Never raises: an attribute that misbehaves is one that
    says nothing.
    """
    return _verdict(exc, set())


def _verdict(exc: BaseException, seen: set[int]) -> ProviderVerdict | None:
    for candidate in (exc, cause_of(exc)):
        kind = type(candidate)
        if candidate is None or (kind in _SILENT and not candidate.__dict__):
            # Most errors of the user's own code. Looking for what they do not have would take 30 us.
            if kind in _KEYLESS and _lacks_key(candidate):
                return AUTH
            continue
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


#: Python's own exceptions that have no attributes but a message.
_SILENT: Final = frozenset(
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, (OSError, BaseExceptionGroup))
)


#: Builtin exceptions that clients raise for want of a key.
_KEYLESS: Final = frozenset({TypeError, ValueError})
_KEY_PHRASES: Final = re.compile("api[_ ]key|authentication method|missing credentials", re.IGNORECASE)


def _lacks_key(exc: Any) -> bool:
    """Return True if a client raised an exception for lack of an API key, without an answer of a server."""
    text = exc.args[0] if exc.args else None
    if not isinstance(text, str):
        text = safe_get(exc, "body")  # cohere
    if not isinstance(text, str) or not _KEY_PHRASES.search(text, 0, 1000):
        return False
    at, module = exc.__traceback__, ""
    while at is not None:
        module, at = at.tb_frame.f_globals.get("__name__", ""), at.tb_next
    return module.partition(".")[0] in CLIENTS


def _worst(group: BaseExceptionGroup[Any], seen: set[int]) -> ProviderVerdict | None:
    if id(group) in seen:  # A member can be raised from the group that it is in.
        return None
    seen.add(id(group))
    verdicts: list[ProviderVerdict] = []
    is_known = True
    for member in group.exceptions:
        verdict = _verdict(member, seen)
        if verdict is not None and verdict.failure_class == "TERMINAL":
            return verdict
        if verdict is None or verdict.failure_class == "AMBIGUOUS":
            is_known = False
        if verdict is not None:
            verdicts.append(verdict)
    longest = max(verdicts, key=lambda verdict: verdict.retry_after or 0.0, default=None)
    if longest is None or is_known:
        return longest
    return longest._replace(failure_class="AMBIGUOUS", reason=None)


def requested_waits(exc: BaseException) -> list[float]:
    """Return the seconds that providers ask to wait, in an exception or the members of a group; 0 if none.

    Without a time, only a rate limit (429) and a provider that is overloaded as a whole (529) count; a 503
    may come from one server of many. A Retry-After of 0 is no time. Never raises.
    """
    waits: list[float] = []
    leaves, seen = [exc], set[int]()
    while leaves:
        leaf = leaves.pop()
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if issubclass(type(leaf), BaseExceptionGroup):
            leaves.extend(cast("BaseExceptionGroup[Any]", leaf).exceptions)
            continue
        known = verdict_of(leaf)
        if known is not None:
            waits += known.waits
            continue
        verdict = read_provider_error(leaf)
        if verdict is None:
            continue
        if verdict.retry_after or verdict.reason == "rate_limit" or _is_overloaded(verdict, leaf):
            waits.append(verdict.retry_after or 0.0)
    return waits


def _is_overloaded(verdict: ProviderVerdict, exc: BaseException) -> bool:
    if verdict.reason != "overloaded":
        return False
    for candidate in (exc, cause_of(exc)):
        packages = {_package(cls) for cls in type(candidate).__mro__}
        try:
            if candidate is not None and (
                _status(candidate, packages) == 529
                or "overloaded_error" in _codes(candidate, _levels(candidate, packages))
            ):
                return True
        except Exception:
            continue  # As in _verdict(): an exception that cannot be read says nothing.
    return False


def _read(exc: BaseException) -> ProviderVerdict | None:
    packages = {_package(cls) for cls in type(exc).__mro__}
    levels = _levels(exc, packages)
    codes = list(_codes(exc, levels))
    verdict = next((CODES[code] for code in codes if code in CODES), None)
    status = _status(exc, packages)
    if verdict is None and status is not None:
        own = (OWN.get((package, status)) for package in packages)
        verdict = next(filter(None, own), None) or STATUS.get(status) or (SERVER if status >= 500 else None)
    if verdict is None and (status is None or status < 400):
        verdict = next((STREAMED[code] for code in codes if code in STREAMED), None)
    if verdict is not None:
        verdict = _read_prose(verdict, levels, packages)
    if status is None:
        return verdict or _read_by_name(exc) or (AUTH if _lacks_key(exc) else None)
    headers = _headers(exc, packages)
    wish = headers.get("x-should-retry")
    if wish == "false" and status >= 400:
        verdict = (verdict or BAD_REQUEST)._replace(failure_class="TERMINAL")
    elif wish == "true" and status >= 400 and verdict is not QUOTA and verdict is not AUTH:
        verdict = (verdict or SERVER)._replace(failure_class="RECOVERABLE")
    if verdict is None:
        return None
    retry_after = retry_after_seconds(headers)
    return verdict._replace(retry_after=_retry_delay(levels) if retry_after is None else retry_after)


def _read_prose(known: ProviderVerdict, levels: list[Any], packages: set[str]) -> ProviderVerdict:
    """Return the same verdict, or a better one where the message says more than the status and the codes."""
    phrases: tuple[tuple[str, ProviderVerdict], ...] = ()
    if known is BAD_REQUEST:
        phrases = PHRASES
    elif known is RATE_LIMIT:
        phrases = LASTING
    if "grpc" in packages:
        phrases += GRPC_PHRASES
    if not phrases:
        return known
    messages = [safe_get(level, name) for level in levels for name in ("message", "Message")]
    prose = " ".join(text for text in messages if isinstance(text, str)).lower()
    return next((verdict for phrase, verdict in phrases if phrase in prose), known)


def _read_by_name(exc: BaseException) -> ProviderVerdict | None:
    names = {cls.__name__ for cls in type(exc).__mro__ if _package(cls) in CLIENTS}
    for known, verdict in NAMES:
        if names & known:
            return verdict
    if isinstance(exc, ConnectionError):
        return CONNECTION
    return TIMEOUT if isinstance(exc, TimeoutError) else None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def read_status(exc: BaseException) -> int | None:
    """Return the HTTP status of an exception, or the one that its gRPC status stands for, or None."""
    return _status(exc, {_package(cls) for cls in type(exc).__mro__})


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
    return GRPC.get(grpc_status(exc) or "")


def grpc_status(exc: BaseException) -> str | None:
    """Return the name of a gRPC status, also of one that Google's clients have wrapped, or None."""
    for candidate in (exc, safe_get(exc, "response")):
        if any(_package(cls) == "grpc" for cls in type(candidate).__mro__):
            name = safe_get(_call(candidate, "code"), "name")
            return name if isinstance(name, str) else None
    return None


def _call(exc: Any, name: str) -> Any:
    """Return the result of a method without arguments, as of gRPC's exceptions; None if it fails."""
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
    """Headers by their lower-case names, from a mapping, pairs, or a message of the standard library; or {}.

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
    """Return the objects that may hold codes and messages: the exception, and its body from outside in."""
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
            # The wait that is asked for beside it is of seconds, for a quota that is filled again at
            # midnight.
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
    """Return the wait that a server asks for: ``retry-after-ms``, or ``retry-after`` (seconds or a date).

    ``headers`` has lower-case names. A date that has passed is no wait. Of several wishes in one header, as a
    server and a proxy before it may have, the longest counts. None if there is no wish, or one that makes no
    sense.
    """
    milliseconds = [wait / 1000 for part in _parts(headers, "retry-after-ms") for wait in _seconds(part)]
    # The weekday of a date ends at a comma too. The rest is a date without it.
    waits = milliseconds or [
        wait for part in _parts(headers, "retry-after") for wait in _seconds(part) or _moment(part)
    ]
    return max(waits, default=None)


def _parts(headers: Mapping[str, str], name: str) -> list[str]:
    return [part.strip() for part in headers.get(name, "").split(",")]


def _seconds(text: str) -> list[float]:
    """Return the number that a text is; none for anything else, or a number that is not a time."""
    try:
        seconds = float(text)
    except ValueError:
        return []
    return [seconds] if math.isfinite(seconds) and seconds >= 0 else []


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
