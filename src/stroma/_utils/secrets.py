"""Secrets: found in any value, and masked in texts and exceptions.

The whole package finds secrets here, with one set of limits. Beyond a limit nothing is known, so every text
is masked. No code of a value's class is called: an endless mapping or a method that blocks cannot stop the
event loop.
"""

from __future__ import annotations

import gc
import marshal
import re
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from types import UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    Union,
    cast,
    final,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID
from weakref import WeakKeyDictionary, ref

from pydantic import AliasChoices, AliasPath, BaseModel, Secret, SecretBytes, SecretStr

from stroma._utils.access import cause_of, context_of, members_of
from stroma._utils.hiding import Needles, forms_of
from stroma._utils.text import one_line

MASK: Final = "**********"
#: Stands for every text once a value could not be searched.
UNSEARCHED: Final = f"{MASK} (a value of the run is too large or too deep to be searched for secrets)"
MAX_DEPTH: Final = 100
MAX_ITEMS: Final = 200_000  # values; some 0.1 s
MAX_SECRETS: Final = 10_000
MAX_ERRORS: Final = 1000  # causes and members of one exception

_NO_NAMES: Final[frozenset[str]] = frozenset()
_SECRET_TYPES: Final = (SecretStr, SecretBytes, Secret)
#: pydantic's own, and not what a subclass makes of it.
_reveal: Final[Callable[[Any], Any]] = Secret.get_secret_value
_field: Final[Callable[[Any, str], Any]] = object.__getattribute__
#: Types that hold nothing else.
_PLAIN: Final[frozenset[type]] = frozenset({str, int, float, bool, bytes, type(None), datetime})
_MORE_PLAIN: Final[frozenset[type]] = frozenset({date, time, timedelta, Decimal, UUID})
_WRITTEN: Final = (str, bytes, int, float, date, time, timedelta, Decimal, UUID, PurePath)
_CONTAINERS: Final = frozenset({dict, list, tuple})
_SEQUENCES: Final = (list, tuple, set, frozenset, deque)
_LARGE: Final = 100  # values
#: Code, and what leads from a value to the whole process.
_CLOSED: Final = (
    *_WRITTEN,
    bytearray,
    memoryview,
    Enum,
    type,
    property,
    classmethod,
    staticmethod,
    ref,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_MACHINERY: Final = frozenset(
    {
        "_asyncio",
        "_contextvars",
        "_io",
        "_socket",
        "_ssl",
        "_thread",
        "asyncio",
        "concurrent",
        "logging",
        "multiprocessing",
        "selectors",
        "socket",
        "sqlite3",
        "ssl",
        "stroma",
        "subprocess",
        "threading",
    }
)


# ---------------------------------------------------------------------- finding them


def find_secrets(
    value: Any, names: frozenset[str] = _NO_NAMES, *, is_secret: bool = False
) -> set[str] | None:
    """Return the texts of the secrets in any value; None if it is too large or too deep to be searched.

    Args:
        value: a state, an exception, or any other object; its attributes are searched too.
        names: keys and attributes whose values are secrets.
        is_secret: all of the value is a secret.
    """
    try:
        return _find(value, names, is_secret)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # A damaged object: of a model that was never initialized, say.
        return None


def _find(value: Any, names: frozenset[str], is_secret: bool) -> set[str] | None:
    # With a stack, and no call for each plain value: 4 ms for a state of 60,000 values instead of 60.
    texts: set[str] = set()
    seen: dict[int, Any] = {}  # The values too: an id must not be given to another one.
    room = MAX_ITEMS
    stack = [(value, 0, is_secret)]
    while stack:
        value, depth, is_secret = stack.pop()
        kind = type(value)
        is_plain_search = not (is_secret or names)
        secret: list[Any] = []
        if is_plain_search and kind is dict:
            parts: Any = [*value, *value.values()]
        elif is_plain_search and (kind is list or kind is tuple):
            parts = value
        elif issubclass(kind, _SECRET_TYPES):
            stack.append((_reveal(value), depth, True))
            continue
        else:
            way = _way_into(kind)
            if way is None:
                if is_secret:
                    texts.update(_texts_of(value))
                continue
            parts, secret = way(value, _NO_NAMES if is_secret else names)
            if way is _in_model and is_plain_search and len(parts) < 2 and not may_hold_secrets(kind):
                continue  # It has no extra and no private attributes.
        place = ~id(value) if is_secret else id(value)
        if place in seen:
            continue
        seen[place] = value
        room -= len(parts) + len(secret)
        if depth > MAX_DEPTH or room < 0 or len(texts) > MAX_SECRETS:
            return None
        depth += 1
        stack += [(part, depth, True) for part in secret]
        if is_secret:
            stack += [(part, depth, True) for part in parts]
        else:
            stack += [
                (part, depth, False)
                for part in parts
                if type(part) not in _PLAIN
                and not (type(part) in _CONTAINERS and (len(part) > _LARGE and not names and _is_plain(part)))
            ]
    return texts if len(texts) <= MAX_SECRETS else None


class _Inside(NamedTuple):
    """The values in another one. ``secret``: those under the name of a secret."""

    parts: list[Any]
    secret: list[Any]


def _in_dict(value: Any, names: frozenset[str]) -> _Inside:
    pairs = list(dict.items(value))
    parts = [key for key, _ in pairs if type(key) is not str]
    if type(value) is not dict:
        parts += _attributes(value).values()
    if not names:
        return _Inside(parts + [inner for _, inner in pairs], [])
    secret = [inner for key, inner in pairs if type(key) is str and key in names]
    return _Inside(parts + [inner for key, inner in pairs if not (type(key) is str and key in names)], secret)


def _in_sequence(value: Any, _names: frozenset[str]) -> _Inside:
    base: Any = next(one for one in _SEQUENCES if issubclass(type(value), one))
    own = [] if type(value) is base else list(_attributes(value).values())
    return _Inside([*base.__iter__(value), *own], [])


def _in_model(value: Any, names: frozenset[str]) -> _Inside:
    own = _field(value, "__dict__")
    try:
        parts = [part for part in (own, _extra_of(value), _private_of(value)) if part]
    except AttributeError:  # It was never initialized.
        parts = [own]
    return _joined(parts, names) if names else _Inside(parts, [])


_extra_of: Final = vars(BaseModel)["__pydantic_extra__"].__get__
_private_of: Final = vars(BaseModel)["__pydantic_private__"].__get__


def _in_object(value: Any, names: frozenset[str]) -> _Inside:
    if not names:
        # All that it refers to, in slots, attributes or in C. No code of its class is called.
        return _Inside(gc.get_referents(value), [])
    return _joined([_attributes(value), *gc.get_referents(value)], names)


def _joined(parts: list[Any], names: frozenset[str]) -> _Inside:
    """Return the values of an object: those of its dicts of attributes, and others."""
    inside = _Inside([], [])
    for part in parts:
        if type(part) is dict:
            more = _in_dict(part, names)
            inside.parts.extend(more.parts)
            inside.secret.extend(more.secret)
        else:
            inside.parts.append(part)
    return inside


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes and slots of an object."""
    attributes = dict(_slot(value, "__dict__") or ())
    for base in type(value).__mro__:
        for name, slot in type.__getattribute__(base, "__dict__").items():
            if type(slot) is types.MemberDescriptorType:
                attributes[name] = _slot(value, name)
    return attributes


def _slot(value: Any, name: str) -> Any:
    try:
        return _field(value, name)
    except AttributeError:
        return None


_Way = Callable[[Any, frozenset[str]], _Inside]
_ways: WeakKeyDictionary[type, _Way | None] = WeakKeyDictionary()
_COMMON_WAYS: Final[dict[type, _Way | None]] = {
    dict: _in_dict,
    **dict.fromkeys(_SEQUENCES, _in_sequence),
    **dict.fromkeys((*_PLAIN, *_MORE_PLAIN)),
}


def _way_into(kind: type) -> _Way | None:
    """Return the function that opens values of a type; None for those that hold nothing, or are code."""
    if kind in _COMMON_WAYS:
        return _COMMON_WAYS[kind]
    try:
        return _ways[kind]
    except KeyError:
        way = _ways[kind] = _choose_way(kind)
        return way


def _choose_way(kind: type) -> _Way | None:
    if issubclass(kind, dict):
        return _in_dict
    if issubclass(kind, _SEQUENCES):
        return _in_sequence
    if issubclass(kind, BaseModel):
        return _in_model
    if issubclass(kind, BaseException):
        return _in_object
    if issubclass(kind, _CLOSED):
        return None
    roots = {str(type.__getattribute__(base, "__module__")).partition(".")[0] for base in kind.__mro__}
    return None if roots & _MACHINERY else _in_object


def _is_plain(container: Any) -> bool:
    """Return True for a container that holds nothing but plain data."""
    try:
        # Takes exact types alone, and runs no code of theirs: 2 ms for 60,000 values.
        marshal.dumps(container)
    except ValueError:
        return False
    return True


def _texts_of(value: Any) -> Iterator[str]:
    """Yield the texts of a plain value that is a secret."""
    if isinstance(value, bytes):  # As a message has it after decode(), and after repr().
        yield from filter(None, (value.decode("utf-8", "ignore"), repr(value)[2:-1]))
    elif isinstance(value, str):
        yield from filter(None, (str.__str__(value),))
    elif isinstance(value, _WRITTEN) and not isinstance(value, bool):
        yield str(value)


# ---------------------------------------------------------------------- what classes declare

#: What is known of classes of models: the classes that one involves, or None if it may hold secrets.
_secretless: WeakKeyDictionary[type, tuple[type, ...] | None] = WeakKeyDictionary()


def may_hold_secrets(model: type[BaseModel]) -> bool:
    """Return False if the annotations of a model say that no instance holds a secret."""
    try:
        involved = _secretless[model]
    except KeyError:
        classes: dict[type, None] = {}
        involved = tuple(classes) if _declares_no_secret(model, classes) else None
        _secretless[model] = involved
    # An instance of a subclass may hold more.
    return involved is None or any(one is not model and one.__subclasses__() for one in involved)


def _declares_no_secret(annotation: Any, classes: dict[type, None]) -> bool:
    if annotation in _PLAIN or annotation in _MORE_PLAIN or annotation is None:
        return True
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if annotation in classes:
            return True
        if issubclass(annotation, BaseModel):
            classes[annotation] = None
            is_closed = (
                annotation.model_config.get("extra") != "allow" and not annotation.__private_attributes__
            )
            return is_closed and all(
                _declares_no_secret(one.annotation, classes) for one in annotation.model_fields.values()
            )
        return issubclass(annotation, Enum)
    origin = get_origin(annotation)
    if origin is Literal:
        return True
    if origin in (list, dict, tuple, set, frozenset, Union, UnionType, Annotated):
        arguments = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
        return bool(arguments) and all(
            one is Ellipsis or _declares_no_secret(one, classes) for one in arguments
        )
    return False


@final
class DeclaredSecrets:
    """The fields that a schema declares as secrets.

    Attributes:
        names: every name and alias of these fields.
        is_whole: all of an instance is a secret.
    """

    __slots__ = ("_revealing", "_seen", "is_whole", "names")

    def __init__(self, schema: type[BaseModel]) -> None:
        names: set[str] = set()
        self._seen: set[Any] = set()
        self.is_whole = self._collect(schema, names)
        self.names = frozenset(names)
        self._seen.clear()
        # In a text that was not parsed: a field, and its value.
        either = "|".join(sorted(map(re.escape, names)))
        self._revealing = re.compile(rf"""(?<!\w)({either})["'\\*`]*\s*[:=]""") if names else None

    def reveals(self, text: str) -> bool:
        """Return True if a text names a field that holds a secret, followed by a value."""
        return self._revealing is not None and self._revealing.search(text) is not None

    def _collect(self, annotation: Any, names: set[str]) -> bool:
        """Add the names of the secret fields in an annotation. Return True if it can be a secret itself."""
        aliased = getattr(annotation, "__value__", getattr(annotation, "__supertype__", None))
        if aliased is not None:
            return self._collect(aliased, names)
        kind = get_origin(annotation) or annotation
        if isinstance(kind, type) and issubclass(kind, _SECRET_TYPES):
            return True
        if isinstance(annotation, str):  # A hint that could not be read.
            return "Secret" in annotation
        is_secret = False
        for argument in get_args(annotation):
            is_secret |= self._collect(argument, names)
        fields = _fields(annotation)
        if fields and annotation not in self._seen:
            self._seen.add(annotation)
            for aliases, inner in fields:
                if self._collect(inner, names):
                    names.update(aliases)
                    is_secret |= "root" in aliases and issubclass(annotation, BaseModel)
        return is_secret


_declared: WeakKeyDictionary[type, DeclaredSecrets] = WeakKeyDictionary()


def declared_secrets(schema: type[BaseModel] | None) -> DeclaredSecrets:
    """Return the secret fields of a model; none without a model."""
    model = BaseModel if schema is None else schema
    try:
        return _declared[model]
    except KeyError:
        declared = _declared[model] = DeclaredSecrets(model)
        return declared


def _fields(annotation: Any) -> list[tuple[set[str], Any]]:
    """Return the names and annotations of the fields of a model, dataclass or typed dict; else []."""
    if not isinstance(annotation, type):
        return []
    if issubclass(annotation, BaseModel):
        return [
            (set(names_of_field(name, info)), info.annotation)
            for name, info in annotation.model_fields.items()
        ]
    if not (is_dataclass(annotation) or hasattr(annotation, "__total__")):
        return []
    try:
        hints = get_type_hints(annotation, include_extras=True)
    except Exception:  # They name what is not there at run time.
        hints = annotation.__annotations__
    return [({name}, hint) for name, hint in hints.items()]


def names_of_field(name: str, info: Any) -> Iterator[str]:
    """Yield the name of a field and its aliases."""
    yield name
    for alias in (info.alias, info.validation_alias, info.serialization_alias):
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        for choice in choices:
            if isinstance(choice, AliasPath):
                yield from (part for part in choice.path if isinstance(part, str))
            elif isinstance(choice, str):
                yield choice


# ---------------------------------------------------------------------- masking them


@final
class Secrets:
    """Secrets that were met, to mask them in texts and exceptions."""

    __slots__ = ("_needles", "_texts")

    def __init__(self, schema: type[BaseModel] | None = None, values: Iterable[Any] = ()) -> None:
        #: None: more than can be known, so that every text is masked.
        self._texts: dict[str, None] | None = {}
        self._needles: Needles | None = None
        for value in values:
            self.note(value, schema)

    def note(self, value: Any, schema: type[BaseModel] | None = None) -> None:
        """Remember the secrets in a value, and those that a schema declares; see :func:`find_secrets`."""
        known = self._texts
        if known is None:
            return
        if schema is None:
            texts = find_secrets(value)
        else:
            declared = declared_secrets(schema)
            texts = find_secrets(value, declared.names, is_secret=declared.is_whole)
        if texts is None or len(texts) + len(known) > MAX_SECRETS:
            self._texts = self._needles = None
        elif not texts <= known.keys():
            known.update(dict.fromkeys(texts))
            self._needles = None

    def note_error(self, error: BaseException) -> None:
        """Find and remember the secrets in an exception: its attributes, notes, causes and members."""
        # Most have a text and nothing else: 1 us instead of 8.
        is_plain = cause_of(error) is context_of(error) is None and not _slot(error, "__dict__")
        if not is_plain or any(type(one) not in _PLAIN for one in _args_of(error)):
            self.note(error)

    def mask(self, text: str) -> str:
        """Return a text without the secrets."""
        if self._texts is None:
            return UNSEARCHED
        if not self._texts:
            return text
        if self._needles is None:
            self._needles = Needles({form for word in self._texts for form in forms_of(word)})
        return self._needles.hide(text, MASK)

    def mask_error(self, error: BaseException) -> BaseException:
        """Return an exception as a log may show it: its messages are single lines without secrets.

        That is the exception itself where nothing has to be taken out, else one of the same name, without its
        attributes. Causes, notes and members of groups are treated alike. Never raises.
        """
        members = _members(error)
        if members is None:
            return stand_in_of(
                error, f"{one_line(self.mask(_message(error) or ''))} (too many causes to be shown)"
            )
        if all(self._may_be_shown(one) for one in members.values()):
            return error
        shown: dict[int, BaseException] = {}
        for one in members.values():
            self._stand_in(one, shown)
        for one in members.values():
            stand_in = shown[id(one)]
            stand_in.__cause__, stand_in.__context__ = (
                None if linked is None else shown[id(linked)] for linked in (cause_of(one), context_of(one))
            )
            stand_in.__suppress_context__ = one.__suppress_context__
        return shown[id(error)]

    def _may_be_shown(self, error: BaseException) -> bool:
        message = _message(error)
        if message is None:
            return False
        lines = [message, *_notes(error)]
        if issubclass(type(error), SyntaxError):  # Its line of source is printed with it.
            values = [_slot(error, name) for name in ("text", "filename")]
            lines += [str.rstrip(one, "\n") for one in values if type(one) is str]
        # Tools that collect exceptions read their attributes, too.
        values = [*_args_of(error), *(_slot(error, "__dict__") or {}).values()]
        others = [one for one in values if type(one) is str]
        return all(one_line(one) == one for one in lines) and all(
            self.mask(one) == one for one in lines + others
        )

    def _stand_in(self, error: BaseException, shown: dict[int, BaseException]) -> BaseException:
        """Return the stand-in of an exception, and add it to ``shown`` after the members of a group."""
        if id(error) not in shown:
            inner = [self._stand_in(one, shown) for one in members_of(error)]
            text = str(_message_of_group(error)) if inner else _message(error) or "<exception str() failed>"
            stand_in = shown[id(error)] = stand_in_of(error, one_line(self.mask(text)), inner)
            for note in _notes(error):
                stand_in.add_note(one_line(self.mask(note)))
        return shown[id(error)]


# As the base class has them: an exception's own attributes may raise anything.
_args_of: Final = cast("Any", BaseException).args.__get__
_message_of_group: Final[Callable[[Any], str]] = cast("Any", BaseExceptionGroup).message.__get__


def _members(error: BaseException) -> dict[int, BaseException] | None:
    """Return an exception, its causes and members of groups by id; None if too many or too deep."""
    members: dict[int, BaseException] = {}
    stack = [(error, 0)]
    while stack:
        one, depth = stack.pop()
        if id(one) in members:
            continue
        inner = members_of(one)
        if len(members) + len(inner) >= MAX_ERRORS or depth > MAX_DEPTH:
            return None
        members[id(one)] = one
        stack += [(linked, depth) for linked in (cause_of(one), context_of(one)) if linked is not None]
        stack += [(member, depth + 1) for member in inner]
    return members


def stand_in_of(error: BaseException, message: str, members: Iterable[BaseException] = ()) -> BaseException:
    """Return an exception of the same name, message and traceback."""
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    inner: Any = list(members)  # A group of BaseExceptions makes one of them.
    stand_in: BaseException
    if inner:
        stand_in = type(kind.__name__, (ExceptionGroup,), names)(message, inner)
    else:
        stand_in = type(kind.__name__, (Exception,), names)(message)
    stand_in.__traceback__ = error.__traceback__
    marks = _slot(error, "__dict__") or {}
    if "_stroma_notes" in marks:
        stand_in.__dict__["_stroma_notes"] = marks["_stroma_notes"]
    return stand_in


def _message(error: BaseException) -> str | None:
    """Return ``str(error)``; None if that raises."""
    try:
        return str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return None


def _notes(error: BaseException) -> list[str]:
    notes = (_slot(error, "__dict__") or {}).get("__notes__")
    if notes is None:
        return []
    return [_text(one) for one in notes] if isinstance(notes, (list, tuple)) else [_text(notes)]


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"
