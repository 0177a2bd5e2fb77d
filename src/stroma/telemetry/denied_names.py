"""Names whose values are never sent."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, final

__all__ = ["DENY_KEYS", "DeniedNames"]

#: Names whose values are never sent: those that end with the words of one of these (`openai_api_key`,
#: `dbPassword`). One with `*` matches the whole name in lower case with `_` between its words, anything in
#: place of `*` at its ends.
DENY_KEYS: Final = (
    "access_key",
    "access_token",
    "account_key",
    "api_key",
    "api_keys",
    "api_token",
    "apikey",
    "auth_token",
    "authorization",
    "authorization_code",
    "bearer_token",
    "client_secret",
    "connection_string",
    "cookie",
    "cookies",
    "credential",
    "credentials",
    "database_url",
    "db_pass",
    "dsn",
    "encryption_key",
    "id_token",
    "jwt",
    "otp",
    "passcode",
    "passphrase",
    "*passphrase*",
    "passwd",
    "*passwd*",
    "password",
    "*password*",
    "pin",
    "private_key",
    "*private_key*",
    "pwd",
    "refresh_token",
    "secret",
    "secret_*",
    "*_secret_*",
    "secrets",
    "session_id",
    "session_token",
    "set_cookie",
    "signing_key",
    "ssh_key",
    "ssn",
    "token",
    "webhook_url",
)
_MOST_NAMES: Final = 10_000  # that are remembered
#: Between the words of a name in camel case.
_WORD_ENDS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: A name in a text of JSON, also where that stands in another text: the end of a quoted text, and what
#: follows it.
_NAME_IN_TEXT: Final = re.compile(r"""([\w$-]{1,100})\\*["']\s*[:,]""")


@final
class DeniedNames:
    """Names that are, or end with, one of some keys in whole words: "context" does not end with "text"."""

    __slots__ = ("_known", "_longest", "_patterns", "_tails")

    def __init__(self, keys: Collection[str]) -> None:
        self._tails = frozenset(
            key.replace("-", "").replace("_", "").casefold() for key in keys if "*" not in key
        )
        self._longest = max(map(len, self._tails), default=0)
        patterns = [_pattern(key) for key in keys if "*" in key]
        self._patterns = re.compile("|".join(patterns)) if patterns else None
        #: Names that were looked at.
        self._known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= _MOST_NAMES:  # Keys of dicts may be anything.
                self._known.clear()
            known = self._known[name] = self._matches(name)
        return known

    def are_in(self, text: str) -> bool:
        """Return True if a text of JSON has a denied name, perhaps."""
        return any(name in self for name in set(_NAME_IN_TEXT.findall(text)))

    def _matches(self, name: str) -> bool:
        # A number at the end tells several of one kind apart.
        snake = _snake(name).rstrip("_0123456789")
        if self._patterns is not None and self._patterns.search(snake):
            return True
        tail = ""
        for word in reversed(snake.split("_")):
            tail = word + tail
            if len(tail) > self._longest:
                return False
            if word and tail in self._tails:
                return True
        return False


def _snake(name: str) -> str:
    return _WORD_ENDS.sub("_", name).casefold().replace("-", "_")


def _pattern(key: str) -> str:
    start = "" if key.startswith("*") else "^"
    return f"{start}{re.escape(_snake(key.strip('*')))}{'' if key.endswith('*') else '$'}"
