"""Redaction of states and messages before they leave the process."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from stroma._utils.text import visible
from stroma.contracts.contract import ContractViolation
from stroma.engine.context import ReliabilityContext
from stroma.failures.errors import RemoteFailure
from stroma.failures.failure import message_of
from stroma.trace.plain import jsonable

__all__ = ["DENY_KEYS", "Content", "ContentMode", "type_name"]

ContentMode = Literal["none", "redacted"]

#: Names whose values are never sent: those that end with the words of one of these (`openai_api_key`, `dbPassword`).
DENY_KEYS: Final = (
    "api_key", "apikey", "access_token", "auth_token", "authorization", "client_secret", "cookie", "credentials",
    "passphrase", "passwd", "password", "private_key", "pwd", "refresh_token", "secret", "set_cookie", "ssn",
)  # fmt: skip
_REDACTED: Final = "[redacted]"
_DEEPEST: Final = 50
#: Between the words of a name in camel case.
_WORD_ENDS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True, slots=True)
class Content:
    """Amount of the inputs and outputs of nodes that is sent.

    Attributes:
        mode: "none" sends names, types and sizes of fields, and of failures the type, class and reason. "redacted"
            sends states and messages: what ``RunConfig.redact`` leaves of them, without the values of ``deny_keys``,
            at most ``max_bytes`` of each.
    """

    mode: ContentMode
    deny_keys: frozenset[str]
    max_bytes: int

    @classmethod
    def make(cls, mode: ContentMode, deny_keys: Collection[str], max_bytes: int) -> Content:
        """Create the rules. Raises ValueError for an invalid mode or size."""
        if mode not in ("none", "redacted"):
            raise ValueError(f'content must be "none" or "redacted", got {mode!r}')
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes!r}")
        if isinstance(deny_keys, str):
            raise TypeError(f"deny_keys must be a collection of names, got {deny_keys!r}")
        return cls(mode, frozenset(map(_plain, deny_keys)), max_bytes)

    def state(self, run: ReliabilityContext, state: Mapping[str, Any]) -> str:
        """Return a state as JSON text: its values, or the types and sizes of its fields."""
        if self.mode == "none":
            return self.cut(json.dumps({str(name): _shape(value) for name, value in state.items()}))
        run.redactor.note_secrets(state)
        try:
            text = json.dumps(self._allowed(jsonable(dict(state)), 0), ensure_ascii=False)
        except Exception as error:
            # A number of ten thousand digits, say. The span is worth more than its input.
            return f"[unreadable: {type(error).__name__}]"
        return self.cut(run.redactor.mask(text))

    def message(self, run: ReliabilityContext, error: BaseException | str) -> str | None:
        """Return the message of an exception; None in mode "none"."""
        if self.mode == "none":
            return None
        if isinstance(error, ContractViolation) and isinstance(error.raw, dict):
            run.redactor.note_secrets(error.raw)  # Of an input that nobody was shown.
        text = run.redactor.mask(error if isinstance(error, str) else message_of(error))
        shown = run.redactor.redact_state({"message": text}).get("message")
        return self.cut(visible(shown) if isinstance(shown, str) else _REDACTED)

    def cut(self, text: str) -> str:
        """At most ``max_bytes`` of a text, with a mark that says how long it was."""
        data = text.encode("utf-8", "backslashreplace")
        if len(data) <= self.max_bytes:
            return data.decode()
        return f"{data[: self.max_bytes].decode('utf-8', 'ignore')}... [truncated, {len(data)} bytes]"

    def _denied(self, name: str) -> bool:
        """Return True if a name is, or ends with, a denied one in whole words; "context" does not end with "text"."""
        words = _WORD_ENDS.sub("_", name).casefold().replace("-", "_").split("_")
        longest = max(map(len, self.deny_keys), default=0)
        tail = ""
        for word in reversed(words):
            tail = word + tail
            if len(tail) > longest:
                return False
            if word and tail in self.deny_keys:
                return True
        return False

    def _allowed(self, value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            return "[too deep]"
        if isinstance(value, dict):
            return {
                name: _REDACTED if self._denied(name) else self._allowed(inner, depth + 1)
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self._allowed(inner, depth + 1) for inner in value]
        return value


def type_name(error: BaseException) -> str:
    """Return the full name of an exception's class."""
    if isinstance(error, RemoteFailure):  # It stands for one of another process.
        return error.full_name
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").casefold()


def _shape(value: Any) -> str:
    size = f"[{len(value)}]" if isinstance(value, (str, bytes, list, tuple, set, frozenset, dict)) else ""
    return f"{type(value).__name__}{size}"
