"""Access control of the web interface: hosts, origins, the token, and response headers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

#: No foreign or inline content, no frames, no caching.
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src "
    "'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: it would give forms of these pages the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_COOKIE: Final = "stroma_ui"
_NONCE_BYTES: Final = 16
_MAX_SENT: Final = 10_000  # forms
_SAFE: Final = ("GET", "HEAD")
_LOOPBACK: Final = ("127.0.0.1:", "localhost:", "[::1]:")
_CHALLENGE: Final = [(b"www-authenticate", b'Basic realm="stroma", charset="UTF-8"')]
#: SVG images have inline styles. Browsers run no scripts in them.
IMAGE_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class Keys:
    """Secrets of this process.

    Attributes:
        token: access token that clients must send; None if only this machine can connect.
    """

    token: str | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _sent: dict[str, None] = field(default_factory=dict[str, None], repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def form(self, action: str, subject: str) -> str:
        """Return a key for one form, of one action on one subject, which no other site can compute."""
        return self._form(secrets.token_hex(_NONCE_BYTES), action, subject)

    def is_form(self, key: str, action: str, subject: str) -> bool:
        own = self._form(key[: 2 * _NONCE_BYTES], action, subject)
        return hmac.compare_digest(key.encode("utf-8", "replace"), own.encode("utf-8", "replace"))

    def id_of(self, key: str, content: int | str) -> str:
        """Return the id of what a form creates: the same one however often it is sent with this content."""
        return self._sign(f"run\0{key}\0{content}")[:32]

    @contextmanager
    def once(self, form: str) -> Iterator[bool]:
        """Yield True for a form that is sent for the first time. Remembers the last 10,000. Thread-safe.

        A form whose handler raises may be sent again.
        """
        digest = self._sign(f"sent\0{form}")
        with self._lock:
            is_first = digest not in self._sent
            if len(self._sent) >= _MAX_SENT:
                del self._sent[next(iter(self._sent))]
            self._sent[digest] = None
        try:
            yield is_first
        except BaseException:
            with self._lock:
                self._sent.pop(digest, None)
            raise

    def _form(self, nonce: str, action: str, subject: str) -> str:
        return nonce + self._sign(f"form\0{action}\0{subject}\0{nonce}")

    @property
    def cookie(self) -> str:
        """Cookie that a browser gets for the token."""
        return self._sign(f"cookie\0{self.token}")

    def admits(self, authorization: str, cookies: str) -> bool:
        """Return True if a request has the token, or the cookie for it.

        A browser sends Basic credentials to one port only, and a cookie to all ports of a host.
        """
        if self.token is None:
            return True
        kind, _, secret = authorization.partition(" ")
        if kind.lower() == "bearer" and self.is_token(secret.strip()):
            return True
        if kind.lower() == "basic" and self.is_token(_password(secret.strip())):
            return True
        try:
            cookie = SimpleCookie(cookies).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(
            cookie.value.encode("utf-8", "replace"), self.cookie.encode()
        )

    def is_token(self, secret: str) -> bool:
        return self.token is not None and hmac.compare_digest(
            secret.encode("utf-8", "replace"), self.token.encode()
        )

    def _sign(self, text: str) -> str:
        return hmac.new(self.secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _password(credentials: str) -> str:
    """Return the password of Basic credentials; "" if there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


class SecurityMiddleware:
    """ASGI middleware that checks each request and adds headers to each response."""

    def __init__(
        self, app: ASGIApp, keys: Keys, hosts: frozenset[str], private_host: str | None = None
    ) -> None:
        """Wrap an application.

        ``hosts``: accepted Host headers, with the port, in lower case. ``private_host``: one of them that no
        other server on this machine uses, so that its cookie is not sent to others.
        """
        self._app = app
        self._private_host = private_host
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # No websockets.
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _send_text(send, *refusal)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in present)]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(
        self, scope: Scope, headers: dict[str, str]
    ) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """Return (status, text, headers) for a rejected request; None to accept it."""
        host = headers.get("host", "").lower()
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return 403, "the request comes from a page of another site", []
        # Another name for this address may be DNS rebinding by a foreign page.
        if host not in self._hosts:
            return 421, "this is not a host of this server; use the address that `stroma ui` printed", []
        if scope["method"] not in (*_SAFE, "POST"):
            return 405, "this server accepts GET and POST", []
        if scope["method"] == "POST" and (origin is None and site not in (None, "same-origin")):
            return 403, "the request comes from a page of another site", []
        navigates = headers.get("sec-fetch-mode") == "navigate"
        if site not in (None, "none", "same-origin") and not (
            navigates and headers.get("sec-fetch-dest", "document") == "document"
        ):
            return 403, "the request comes from a page of another site", []
        if navigates and scope["path"] == "/events":
            return 403, "this address is for the pages of this server only", []
        if self._keys.token is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == "token"]
        if scope["method"] in _SAFE and any(map(self._keys.is_token, tokens)):
            # Redirect at once: browsers keep addresses in their history.
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            # One slash only: two would name another host.
            there = "/" + quote(scope["path"]).lstrip("/") + (f"?{rest}" if rest else "")
            if host != self._private_host:
                if self._private_host is not None and host.startswith(_LOOPBACK):
                    token = urlencode({"token": self._keys.token})
                    there = f"http://{self._private_host}{there}{'&' if rest else '?'}{token}"
                return 303, "", [(b"location", there.encode())]
            cookie = f"{_COOKIE}={self._keys.cookie}; Path=/; HttpOnly; SameSite=Strict"
            return 303, "", [(b"location", there.encode()), (b"set-cookie", cookie.encode())]
        cookies = headers.get("cookie", "") if host == self._private_host else ""
        if not self._keys.admits(headers.get("authorization", ""), cookies):
            return (
                401,
                "open the address that `stroma ui` printed, or sign in with any name and the token as "
                "the password",
                _CHALLENGE,
            )
        return None


async def _send_text(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]]) -> None:
    own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
    kind = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *own, *headers]})
    await send({"type": "http.response.body", "body": f"{text}\n".encode() if text else b""})
