"""Redaction of states and messages before they leave the process."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, Final, Literal, final
from weakref import WeakKeyDictionary

from pydantic import BaseModel

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
#: Between the words of a name, in camel case too.
_WORD_ENDS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|\W+")
#: A name in a text of JSON, also where that stands in another text: the end of a quoted text, and what
#: follows it.
_NAME_IN_TEXT: Final = re.compile(r"""([\w$-]{1,100})\\*["']\s*[:,]""")


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
    return _WORD_ENDS.sub("_", name).casefold()


def _pattern(key: str) -> str:
    start = "" if key.startswith("*") else "^"
    return f"{start}{re.escape(_snake(key.strip('*')))}{'' if key.endswith('*') else '$'}"


ContentMode = Literal["none", "redacted"]

_REDACTED: Final = "[redacted]"
#: What json.dumps() returns for a text, without an encoder for each: 0.2
#: us and not 1.3.
_quoted: Final = json.encoder.encode_basestring_ascii
_DEEPEST: Final = 50
#: Characters that are written beyond the limit, so that a secret at the end is found as a whole.
_SLACK: Final = 4096
#: Characters of a JSON text that is parsed: a longer one that may have a denied name is hidden.
_LONGEST_JSON: Final = 256 * 1024
_MOST_NAME_BYTES: Final = 1000
_JSON_STARTS: Final = ("{", "[")
#: Keys of a header, or another pair, that is a dict.
_NAME_KEYS: Final = ("name", "key", "header")
_VALUE_KEYS: Final = frozenset({"value", "values"})
#: Fields whose types and sizes are sent.
_MOST_FIELDS: Final = 2000
#: Items of a set that are put in order.
_MOST_SORTED: Final = 1000
_SIZED: Final = frozenset({str, bytes, list, tuple, set, frozenset, dict})
_UNSIZED: Final = frozenset({int, float, bool, type(None)})
_NO_NAMES: Final[Mapping[str, tuple[str, ...]]] = {}


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
        walk = _DataWriter(self, self.max_bytes + _SLACK)
        try:
            text = walk.text_of(value, model)
        except Exception as error:
            # A number of ten thousand digits, say. The span is worth more than its input.
            return f"[unreadable: {type(error).__name__}]"
        return self.cut(run.redactor.mask(text), has_more=walk.room < 0)

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
        whole = _DataWriter(self, self.max_bytes + _SLACK)._data(shown[::-1], 0)
        try:
            masked = json.loads(run.redactor.mask(_dump(whole)))
        except ValueError:  # A secret was part of the syntax, such as a comma.
            return ""
        return _dump(_DataWriter(self, self.max_bytes)._data(masked, 0)[::-1])

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


class _DataWriter:
    """Makes JSON data of values, without those of denied names, until there is enough of it.

    ``room``: characters that are still wanted; below 0 there are more than that.
    """

    def __init__(self, content: Content, room: int) -> None:
        self._content = content
        self.room = room
        self._has_denied = False

    def text_of(self, value: Any, model: type[BaseModel] | None) -> str:
        """Return the text of a state: of its fields, whose class knows more names of them, or of a value."""
        if isinstance(value, Mapping):
            return _dump(self._mapping(value, 0, _NO_NAMES if model is None else _names_of(model)))
        data = self._data(value, 0)
        return data if isinstance(value, str) else _dump(data)

    def _mapping(
        self, values: Mapping[Any, Any], depth: int, names: Mapping[str, tuple[str, ...]] = _NO_NAMES
    ) -> dict[str, Any]:
        denied, is_denied = self._content.denied, self._content.is_denied
        # A header: {"name": "authorization", "value": "..."}.
        is_pair = isinstance(values, dict) and any(
            is_denied(values[key]) for key in _NAME_KEYS if key in values
        )
        shown: dict[str, Any] = {}
        for key, value in values.items():
            if self.room < 0:
                break
            name = key if isinstance(key, str) else str(jsonable(key))
            is_hidden = name in denied or any(other in denied for other in names.get(name, ()))
            name = self._cut(name)
            if is_hidden or (is_pair and name in _VALUE_KEYS):
                shown[name] = self._hidden()
            else:
                shown[name] = self._data(value, depth + 1)
        return shown

    def _list(self, values: Iterable[Any], depth: int) -> list[Any]:
        if isinstance(values, (list, tuple)) and len(values) == 2 and self._content.is_denied(values[0]):
            return [self._data(values[0], depth + 1), self._hidden()]
        shown: list[Any] = []
        for value in values:
            if self.room < 0:
                break
            shown.append(self._data(value, depth + 1))
        return shown

    def _hidden(self) -> str:
        self._has_denied = True
        return self._cut(_REDACTED)

    def _cut(self, text: str) -> str:
        """Return no more of a text than is wanted."""
        text = text[: max(0, self.room) + 1]
        self.room -= len(text) + 4  # With quotes and what stands between.
        return text

    def _text(self, text: str, depth: int) -> str:
        """Return a text; of JSON, without the values of denied names, and nothing if it cannot be parsed."""
        start = text[:1] if text[:1] in _JSON_STARTS else text[:100].lstrip()[:1]
        if start not in _JSON_STARTS or not self._content.denied.are_in(text[: max(0, self.room) + 1]):
            return self._cut(text)
        try:
            value = json.loads(text) if len(text) <= _LONGEST_JSON else None
        except (ValueError, RecursionError):
            value = None
        if value is None:
            return self._hidden()
        inner = _DataWriter(self._content, self.room)
        data = inner._data(value, depth + 1)
        self._has_denied = self._has_denied or inner._has_denied
        return self._cut(_dump(data) if inner._has_denied else text)

    def _data(self, value: Any, depth: int) -> Any:
        """Return what jsonable() returns, and make no more of it than is wanted."""
        kind = type(value)
        if depth > _DEEPEST:
            return self._cut("[too deep]")
        if kind is str:
            return self._text(value, depth)
        if value is None or kind is bool or kind is int:
            self.room -= 6
            return value
        if kind is dict or (isinstance(value, Mapping) and not isinstance(value, Enum)):
            return self._mapping(value, depth)
        if (
            kind is list
            or kind is tuple
            or (isinstance(value, (set, frozenset)) and len(value) > _MOST_SORTED)
        ):
            return self._list(value, depth)
        if isinstance(value, BaseModel):
            fields = fields_in(value)
            if schema_of(kind).is_root:
                return self._data(fields.get("root"), depth)
            return self._mapping(fields, depth, _names_of(kind))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._mapping(
                {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}, depth
            )
        if isinstance(value, (bytes, bytearray)):
            size = _LONGEST_JSON if value[:1] in (b"{", b"[") else max(0, self.room)
            return self._text(bytes(value[: size + 1]).decode("utf-8", "backslashreplace"), depth)
        plain = jsonable(value)
        if isinstance(plain, (dict, list, str)):
            return self._data(plain, depth)
        self.room -= 6
        return plain


def _dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


def fields_in(model: BaseModel) -> Mapping[str, Any]:
    """Return the fields of a model by name, as they are: without those that are excluded, with extra ones."""
    schema = schema_of(type(model))
    if schema.is_flat and len(model.__dict__) == len(schema.field_names):
        return model.__dict__
    traits = schema.traits
    names, excluded = type(model).model_fields, traits.excluded_fields
    fields = {name: v for name, v in model.__dict__.items() if name in names and name not in excluded}
    if model.__pydantic_extra__:
        fields = {**model.__pydantic_extra__, **fields}
    return fields


def _value_of(state: Mapping[str, Any]) -> tuple[Any, type[BaseModel] | None]:
    """Return the fields of a state, without a copy of their values, and its class if it is known.

    Of a state that is not a record, such as the text that a guarded function returns, the value alone.
    """
    if not isinstance(state, UnreadState):
        return state, None
    fields = fields_in(state.model)
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
        fields = fields_in(value)
        return _shape(fields.get("root")) if schema_of(type(value)).is_root else f"dict[{len(fields)}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"dict[{len(dataclasses.fields(value))}]"
    size = f"[{len(value)}]" if isinstance(value, (str, bytes, list, tuple, set, frozenset, dict)) else ""
    return f"{type(value).__name__}{size}"
