"""Redaction of states and messages before they leave the process."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal, final
from weakref import WeakKeyDictionary

from pydantic import BaseModel

from stroma._utils.bounded_copy import BoundedCopy, items_of
from stroma._utils.secrets import names_of_field
from stroma._utils.text import visible
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.context import ReliabilityContext
from stroma.engine.redaction import UnreadState
from stroma.trace.plain import jsonable

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
_LONGEST_NAME: Final = 200  # characters at the end of a name in a text
#: Between the words of a name, in camel case too.
_WORD_ENDS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|\W+")
#: A name in a text of JSON, also where that stands in another text: the end of a quoted text, and what
#: follows it. Nothing is tried twice: 2 ms for 100,000 letters instead of 0.6 s.
_NAME_IN_TEXT: Final = re.compile(r"""(?<![\w$\\-])((?:[\w$-]++|\\{1,8}+u[0-9a-fA-F]{4})++)\\*+["']\s*[:,]""")
_ESCAPE: Final = re.compile(r"\\+u([0-9a-fA-F]{4})")


@final
class DeniedNames:
    """Names that are, or end with, one of some keys in whole words: "context" does not end with "text"."""

    __slots__ = ("_known", "_longest", "_patterns", "_tails")

    def __init__(self, keys: Collection[str]) -> None:
        self._tails = frozenset(_snake(key).replace("_", "") for key in keys if "*" not in key)
        self._longest = max(map(len, self._tails), default=0)
        patterns = [_pattern(key) for key in keys if "*" in key]
        self._patterns = re.compile("|".join(patterns)) if patterns else None
        #: Names that were looked at.
        self._known: dict[str, bool] = {}

    def __contains__(self, name: Any) -> bool:
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= _MOST_NAMES:  # Keys of dicts may be anything.
                self._known.clear()
            known = self._known[name] = self._matches(name)
        return known

    def are_in(self, text: str) -> bool:
        """Return True if a text of JSON has a denied name, perhaps."""
        names = {name[-_LONGEST_NAME:] for name in _NAME_IN_TEXT.findall(text)}
        return any(_ESCAPE.sub(lambda code: chr(int(code[1], 16)), name) in self for name in names)

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
    return _WORD_ENDS.sub("_", name).casefold()


def _pattern(key: str) -> str:
    start = "" if key.startswith("*") else "^"
    return f"{start}{re.escape(_snake(key.strip('*')))}{'' if key.endswith('*') else '$'}"


ContentMode = Literal["none", "redacted"]

_REDACTED: Final = "[redacted]"
#: What json.dumps() returns for a text, without an encoder for each: 0.2
#: us and not 1.3.
_quoted: Final = json.encoder.encode_basestring_ascii
#: Bytes that are written beyond the limit, so that a secret at the end is found as a whole.
_SLACK: Final = 4096
#: Characters of a JSON text that is parsed: a longer one that may have a denied name is hidden.
_LONGEST_JSON: Final = 256 * 1024
_MOST_NAME_BYTES: Final = 1000
_JSON_STARTS: Final = ("{", "[")
#: Keys of a header, or another pair, that is a dict; in lower case.
_NAME_KEYS: Final = ("name", "key", "header")
_VALUE_KEYS: Final = frozenset({"value", "values"})
#: Fields whose types and sizes are sent.
_MOST_FIELDS: Final = 2000
_SIZED: Final = frozenset({str, bytes, list, tuple, set, frozenset, dict})
_UNSIZED: Final = frozenset({int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class Content:
    """Amount of the inputs and outputs of nodes that is sent.

    Attributes:
        mode: "none" sends names, types and sizes of fields, and of failures the type, class and reason.
            "redacted" sends states and messages: what ``RunConfig.redact`` leaves of them, without the values
            of ``denied`` names, at most ``max_bytes`` of each.
    """

    mode: ContentMode
    denied: DeniedNames
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
        return cls(mode, DeniedNames(deny_keys), max_bytes)

    def state(self, run: ReliabilityContext, state: Mapping[str, Any]) -> str:
        """Return a state as JSON, or a plain text unchanged: its values, or types and sizes of its fields.

        It is walked no further than ``max_bytes``, so that a large one costs no more than a small one. "" for
        a guarded call or run without an input or output.
        """
        if self.mode == "none":
            return self._shapes(state)
        value, model = _value_of(state)
        if value is None:
            return ""
        if isinstance(state, UnreadState):
            state.note_secrets()
        else:
            run.redactor.note_secrets(state)
        copy = _Copy(self, self.max_bytes + _SLACK, value, model)
        data = copy.copy(value)
        text = data if isinstance(value, str) else _dump(data)
        return self.cut(run.redactor.mask(text), has_more=copy.is_cut)

    def _shapes(self, state: Mapping[str, Any]) -> str:
        text = state.shapes if isinstance(state, UnreadState) else None
        if text is None:
            fields = _value_of(state)[0]
            if isinstance(fields, Mapping) and not _has_data_as_keys(state):
                known = (
                    fields.items() if len(fields) <= _MOST_FIELDS else islice(fields.items(), _MOST_FIELDS)
                )
                # What json.dumps() returns, in a third of its time: both are texts.
                shapes = [f"{_quoted(str(name))}: {_quoted(_shape(value))}" for name, value in known]
                text = f"{{{', '.join(shapes)}}}"
            else:
                text = "" if fields is None else _quoted(_shape(fields))
            if isinstance(state, UnreadState):
                state.shapes = text
        return text if len(text) <= self.max_bytes and text.isascii() else self.cut(text)

    def messages(self, run: ReliabilityContext, messages: list[dict[str, Any]]) -> str:
        """Return messages as JSON: of long ones the newest, within ``max_bytes``; "" for none of them."""
        if self.mode == "none" or not messages:
            return ""
        shown = run.redactor.redact_state({"messages": messages}).get("messages")
        if not isinstance(shown, list):
            return ""
        whole = _Copy(self, self.max_bytes + _SLACK).copy(shown[::-1])
        try:
            masked = json.loads(run.redactor.mask(_dump(whole)))
        except ValueError:  # A secret was part of the syntax, such as a comma.
            return ""
        return _dump(_Copy(self, self.max_bytes).copy(masked)[::-1])

    def message(self, text: str | None) -> str | None:
        """Return the message of a failure, which was redacted when it was recorded; None in mode "none"."""
        if self.mode == "none" or text is None:
            return None
        room = self.max_bytes + _SLACK
        return self.cut(visible(text[:room]), has_more=len(text) > room)

    def cut(self, text: str, *, has_more: bool = False) -> str:
        """Return at most ``max_bytes`` of a text, with a mark that says how long it was.

        ``has_more``: the text is only the beginning of a longer one.
        """
        data = text.encode("utf-8", "backslashreplace")
        if len(data) <= self.max_bytes and not has_more:
            return data.decode()
        size = f"{'over ' if has_more else ''}{len(data)} bytes"
        return f"{data[: self.max_bytes].decode('utf-8', 'ignore')}... [truncated, {size}]"

    def is_denied(self, name: Any) -> bool:
        """Return True for a name whose value is never sent; it may be bytes."""
        if isinstance(name, bytes):
            name = name[:_MOST_NAME_BYTES].decode("utf-8", "replace")
        return isinstance(name, str) and name in self.denied


class _Copy(BoundedCopy):
    """Copies states as JSON data without the values of denied names.

    ``top``: the fields of the state, whose ``model`` knows more names of them.
    """

    def __init__(self, content: Content, max_bytes: int, top: Any = None, model: Any = None) -> None:
        super().__init__(max_bytes, content.denied, _REDACTED)
        self._content, self._top, self._model = content, top, model
        self._has_denied = False

    def _secret(self) -> str:
        self._has_denied = True
        return super()._secret()

    def _is_hidden(self, name: str, owner: Any) -> bool:
        model = self._model if owner is self._top else type(owner)
        names = _names_of(model) if model is not None and issubclass(model, BaseModel) else {}
        if any(one in self._hidden for one in (name, *names.get(name, ()))):
            return True
        # A header: {"name": "authorization", "value": "..."}.
        if name.lower() not in _VALUE_KEYS or not isinstance(owner, dict):
            return False
        keys = [key for key in owner if isinstance(key, str) and key.lower() in _NAME_KEYS]
        return any(self._content.is_denied(owner[key]) for key in keys)

    def _list(self, value: Any, depth: int) -> list[Any]:
        if isinstance(value, (list, tuple)) and len(value) == 2 and self._content.is_denied(value[0]):
            return [self._copy(value[0], depth + 1), self._secret()]
        return super()._list(value, depth)

    def _text(self, text: str) -> str:
        """Return a text; of JSON, without the values of denied names, and nothing if it cannot be parsed."""
        start = text[:1] if text[:1] in _JSON_STARTS else text[:100].lstrip()[:1]
        if start not in _JSON_STARTS or not self._content.denied.are_in(text[: max(0, self._room) + 1]):
            return super()._text(text)
        try:
            value = json.loads(text) if len(text) <= _LONGEST_JSON else None
        except (ValueError, RecursionError):
            value = None
        if value is None:
            return self._secret()
        inner = _Copy(self._content, self._room)
        data = inner.copy(value)
        self._has_denied, self.is_cut = self._has_denied or inner._has_denied, self.is_cut or inner.is_cut
        return super()._text(_dump(data) if inner._has_denied else text)

    def _copy_other(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):  # It may be endless.
            return super()._copy_other(value, depth)
        return self._copy(jsonable(value), depth + 1)


def _dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


def _value_of(state: Mapping[str, Any]) -> tuple[Any, type[BaseModel] | None]:
    """Return the fields of a state, without a copy of their values, and its class if it is known.

    Of a state that is not a record, such as the text that a guarded function returns, the value alone.
    """
    if not isinstance(state, UnreadState):
        return state, None
    fields = dict(items_of(state.model))
    if not state.schema.is_root:
        return state.shown() if state.is_redacted else fields, type(state.model)
    root = fields.get("root")
    if not state.is_redacted:
        return root, None
    shown = state.shown()
    return shown if isinstance(root, Mapping) else shown.get("root"), None


def _has_data_as_keys(state: Mapping[str, Any]) -> bool:
    """Return True for the state of a root model, such as a dict by address: its keys are not field names."""
    return (
        isinstance(state, UnreadState) and state.schema.is_root and not isinstance(state.model, UntypedState)
    )


def is_text(state: Mapping[str, Any]) -> bool:
    """Return True for a state that is a plain text, which is sent unchanged."""
    return isinstance(_value_of(state)[0], str)


#: The aliases of the fields of a model.
_aliases: WeakKeyDictionary[type[BaseModel], Mapping[str, tuple[str, ...]]] = WeakKeyDictionary()


def _names_of(model: type[BaseModel]) -> Mapping[str, tuple[str, ...]]:
    """Return the names of the fields of a model that have an alias, by the name of the field."""
    aliases = _aliases.get(model)
    if aliases is None:
        names = {field: (*names_of_field(field, info),) for field, info in model.model_fields.items()}
        aliases = _aliases[model] = {field: known for field, known in names.items() if len(known) > 1}
    return aliases


def _shape(value: Any) -> str:
    kind = type(value)
    if kind in _SIZED:
        return f"{kind.__name__}[{len(value)}]"
    if kind in _UNSIZED:
        return kind.__name__
    if isinstance(value, BaseModel):  # Hooks see them as dicts.
        fields = dict(items_of(value))
        return _shape(fields.get("root")) if schema_of(type(value)).is_root else f"dict[{len(fields)}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"dict[{len(dataclasses.fields(value))}]"
    size = f"[{len(value)}]" if isinstance(value, (str, bytes, list, tuple, set, frozenset, dict)) else ""
    return f"{type(value).__name__}{size}"
