"""Refused calls: exceptions which show that a request was certainly not carried out, read by their shape."""

from __future__ import annotations

import errno
import socket
from typing import Any, Final, cast

from stroma._utils.access import safe_get
from stroma.failures.errors import PlaceError, verdict_of
from stroma.failures.providers import read_status

#: 4xx statuses after which the request may have been carried out, or may still be.
_OPEN_STATUSES: Final = frozenset({408, 409, 425, 499})
#: Exceptions of clients before a connection is made, by the name of a class and the packages that it may come
#: from.
_UNCONNECTED: Final = frozenset(
    {
        "ClientConnectorError",
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
_CLIENTS: Final = frozenset(
    {"aiohttp", "botocore", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
)
_UNREACHABLE: Final = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)
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
        candidate = _cause(candidate)
    return False


#: What an exception was raised from, whatever its class says of that name.
_cause: Final = cast("Any", BaseException).__cause__.__get__


def _read(exc: BaseException) -> bool | None:
    """Return what one exception says; None if that is nothing."""
    kind = type(exc)
    known = verdict_of(exc)
    if known is not None or issubclass(kind, PlaceError):
        return known is None or known.is_refusal
    if issubclass(kind, BaseExceptionGroup):
        return all(is_refusal(member) for member in cast("BaseExceptionGroup[Any]", exc).exceptions)
    status = _status(exc)
    if status is not None:
        return 400 <= status < 500 and status not in _OPEN_STATUSES
    names = {
        (cls.__module__.partition(".")[0], cls.__name__) for cls in kind.__mro__ if cls is not BaseException
    }
    if any(package in _CLIENTS and name in _UNCONNECTED for package, name in names):
        return True
    if any(package == "smtplib" and name in _MAIL_REFUSED for package, name in names):
        return True
    if issubclass(kind, (ConnectionRefusedError, socket.gaierror)):
        return True
    if issubclass(kind, OSError) and safe_get(exc, "errno") in _UNREACHABLE:
        return True
    # requests wraps the error of urllib3, and that the one of the connection, as urllib does.
    if any(package in ("requests", "urllib", "urllib3") for package, _ in names):
        inner = safe_get(exc, "reason") or next(iter(exc.args), None)
        if isinstance(inner, BaseException):
            return _read(inner)
    return None


def _status(exc: BaseException) -> int | None:
    status = read_status(exc)
    own = safe_get(exc, "http_status")  # stripe
    return own if status is None and isinstance(own, int) else status
