"""Refused calls: exceptions which show that a request was certainly not carried out, read by their shape."""

from __future__ import annotations

import socket
from typing import Final

from stroma._utils.access import cause_of, members_of, safe_get
from stroma.failures.errors import PlaceError, verdict_of
from stroma.failures.providers import grpc_status, read_status

#: 4xx statuses after which the request may have been carried out, or may still be.
_OPEN_STATUSES: Final = frozenset({408, 409, 425, 499})
#: Statuses of gRPC that no client and no proxy has for a call which the server carried out.
_GRPC_REFUSALS: Final = frozenset(
    {"INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"}
)
#: HTTP clients. Their class decides, and not the error of the socket below: a connection that was used can
#: end with "no route to host" too.
_CLIENTS: Final = frozenset(
    {"aiohttp", "botocore", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib", "urllib3"}
)
#: Their exceptions before a connection is made. None of aiohttp and urllib: they follow redirects, and their
#: exceptions do not say which request failed.
_UNCONNECTED: Final = frozenset(
    {
        "ConnectError",
        "ConnectTimeout",
        "ConnectTimeoutError",
        "EndpointConnectionError",
        "InvalidURL",
        "MissingSchema",
        "NameResolutionError",
        "NewConnectionError",
        "PoolTimeout",
        "UnsupportedProtocol",
    }
)
_SILENT_CLIENTS: Final = frozenset({"aiohttp", "urllib"})
#: Of ``smtplib``: the server has answered that it did not accept the mail.
_MAIL_REFUSED: Final = frozenset(
    {
        "SMTPAuthenticationError",
        "SMTPConnectError",
        "SMTPDataError",
        "SMTPHeloError",
        "SMTPNotSupportedError",
        "SMTPRecipientsRefused",
        "SMTPSenderRefused",
    }
)
_MAX_CAUSES: Final = 8


def is_refusal(exc: BaseException) -> bool:
    """Return True if an exception shows that a request was refused, or that no connection was made for it.

    Anything that leaves a doubt is no refusal: a timeout, a lost connection, a 5xx, an error of unknown
    shape. Read from the exception and those it was raised from; all members of an exception group must be
    refusals. Never raises.
    """
    seen: list[BaseException] = []
    candidate: BaseException | None = exc
    while candidate is not None and len(seen) < _MAX_CAUSES and candidate not in seen:
        seen.append(candidate)
        try:
            answer = _read(candidate)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            return False
        if answer is not None:
            return answer
        candidate = cause_of(candidate)
    return False


def _read(exc: BaseException) -> bool | None:
    """Return what one exception says; None if that is nothing."""
    kind = type(exc)
    known = verdict_of(exc)
    if known is not None or issubclass(kind, PlaceError):
        return known is None or known.is_refusal
    if issubclass(kind, BaseExceptionGroup):
        return all(map(is_refusal, members_of(exc)))
    names = {
        (cls.__module__.partition(".")[0], cls.__name__) for cls in kind.__mro__ if cls is not BaseException
    }
    packages = {package for package, _ in names}
    code = grpc_status(exc)
    if code is not None:
        return code in _GRPC_REFUSALS
    status = _status(exc)
    if status is not None:
        return 400 <= status < 500 and status not in _OPEN_STATUSES and not _may_be_redirected(exc, packages)
    if packages & _CLIENTS:
        return _is_unconnected(exc, names) and not _may_be_redirected(exc, packages)
    if any(package == "smtplib" and name in _MAIL_REFUSED for package, name in names):
        return True
    if issubclass(kind, (ConnectionRefusedError, socket.gaierror)):
        return True
    return None


def _is_unconnected(exc: BaseException, names: set[tuple[str, str]]) -> bool:
    """Return True if an exception of an HTTP client says that it made no connection."""
    if any(package in _CLIENTS and name in _UNCONNECTED for package, name in names):
        return True
    if ("requests", "ConnectionError") not in names:
        return False
    # It has the exception of urllib3, and that has the reason.
    return type(safe_get(next(iter(exc.args), None), "reason")).__name__ in _UNCONNECTED


def _may_be_redirected(exc: BaseException, packages: set[str]) -> bool:
    """Return True if the failed request may not be the first one, which the server carried out.

    A client that follows the redirect of a POST sends a GET, but for a 307 or 308, with which the server
    has done nothing.
    """
    for known in (safe_get(exc, "history"), safe_get(safe_get(exc, "response"), "history")):
        if known is not None:
            return len(known) > 0
    return bool(packages & _SILENT_CLIENTS) or safe_get(safe_get(exc, "request"), "method") in ("GET", "HEAD")


def _status(exc: BaseException) -> int | None:
    status = read_status(exc)
    own = safe_get(exc, "http_status")  # stripe
    return own if status is None and isinstance(own, int) else status
