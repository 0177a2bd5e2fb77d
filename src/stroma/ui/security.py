"""Who may ask for what: hosts, origins, the token, and the headers of every answer."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode

__all__ = ["HEADERS", "Guard", "Keys"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Nothing from elsewhere, nothing inline, in no frame; what was shown is kept nowhere.
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: forms of our own pages would then come from the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_COOKIE: Final = "stroma_ui"
_SAFE: Final = ("GET", "HEAD")
_LOOPBACK: Final = ("127.0.0.1:", "localhost:", "[::1]:")
_CHALLENGE: Final = [(b"www-authenticate", b'Basic realm="stroma", charset="UTF-8"')]
#: A picture of ours has its style in it. It is shown as an image, which runs nothing, or by itself.
PICTURE_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class Keys:
    """What this process alone knows.

    Attributes:
        token: what a user must show; None where only this machine can connect.
    """

    token: str | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def form(self, action: str, subject: str) -> str:
        """What a form of ours carries, and nobody else's can: for one action on one thing."""
        return self._sign(f"form\0{action}\0{subject}")

    def is_form(self, given: str, action: str, subject: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.form(action, subject).encode())

    @property
    def cookie(self) -> str:
        """What a browser has once it has shown the token."""
        return self._sign(f"cookie\0{self.token}")

    def admits(self, authorization: str, cookies: str) -> bool:
        """Return whether a request shows the token, or the cookie that it was given for it.

        A browser sends credentials of Basic to one port only, and a cookie to all ports of a host.
        """
        if self.token is None:
            return True
        kind, _, shown = authorization.partition(" ")
        if kind.lower() == "bearer" and self.is_token(shown.strip()):
            return True
        if kind.lower() == "basic" and self.is_token(_password(shown.strip())):
            return True
        try:
            kept = SimpleCookie(cookies).get(_COOKIE)
        except CookieError:
            return False
        return kept is not None and hmac.compare_digest(
            kept.value.encode("utf-8", "replace"), self.cookie.encode()
        )

    def is_token(self, shown: str) -> bool:
        return self.token is not None and hmac.compare_digest(
            shown.encode("utf-8", "replace"), self.token.encode()
        )

    def _sign(self, text: str) -> str:
        return hmac.new(self.secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _password(credentials: str) -> str:
    """Return the password in the credentials of Basic; "" where there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


class Guard:
    """Around the application: looks at every request before it, and puts the headers on every answer."""

    def __init__(
        self, app: ASGIApp, keys: Keys, hosts: frozenset[str], private_host: str | None = None
    ) -> None:
        """``hosts``: what the Host header may be, with the port; lower case. ``private_host``: one of them that no
        other server on this machine has, so that a cookie for it reaches nobody else."""
        self._app = app
        self._private_host = private_host
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # No websockets here.
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {key.lower() for key, _ in message["headers"]}
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in given)]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(
        self, scope: Scope, headers: dict[str, str]
    ) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """(status, words, headers) of a request that goes no further."""
        host = headers.get("host", "").lower()
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return 403, "the request comes from a page of another site", []
        # Another name that leads here is a page elsewhere that has its browser ask us.
        if host not in self._hosts:
            return 421, "this is not a host of this server; use the address that `stroma ui` printed", []
        if scope["method"] not in (*_SAFE, "POST"):
            return 405, "this server knows GET and POST", []
        if scope["method"] == "POST" and (origin is None and site not in (None, "same-origin")):
            return 403, "the request comes from a page of another site", []
        navigates = headers.get("sec-fetch-mode") == "navigate"
        if site not in (None, "none", "same-origin") and not (
            navigates and headers.get("sec-fetch-dest", "document") == "document"
        ):
            return 403, "the request comes from a page of another site", []
        if navigates and scope["path"] == "/events":
            return 403, "this is for the pages of this server, not to be opened by itself", []
        if self._keys.token is None:
            return None
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = [value for name, value in asked if name == "token"]
        if scope["method"] in _SAFE and any(map(self._keys.is_token, shown)):
            # Out of the address at once: that is kept in histories.
            rest = urlencode([pair for pair in asked if pair[0] != "token"])
            # One slash: two would name another host.
            there = "/" + quote(scope["path"]).lstrip("/") + (f"?{rest}" if rest else "")
            if host != self._private_host:
                if self._private_host is not None and host.startswith(_LOOPBACK):
                    there = f"http://{self._private_host}{there}{'&' if rest else '?'}{urlencode({'token': self._keys.token})}"
                return 303, "", [(b"location", there.encode())]
            cookie = f"{_COOKIE}={self._keys.cookie}; Path=/; HttpOnly; SameSite=Strict"
            return 303, "", [(b"location", there.encode()), (b"set-cookie", cookie.encode())]
        cookies = headers.get("cookie", "") if host == self._private_host else ""
        if not self._keys.admits(headers.get("authorization", ""), cookies):
            return (
                401,
                "open the address that `stroma ui` printed, or sign in with any name and the token as the password",
                _CHALLENGE,
            )
        return None


async def _answer(send: Send, status: int, words: str, headers: list[tuple[bytes, bytes]]) -> None:
    own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
    kind = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *own, *headers]})
    await send({"type": "http.response.body", "body": f"{words}\n".encode() if words else b""})
