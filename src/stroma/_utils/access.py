"""Looking at objects of classes that are not imported: a provider's exception, its response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias, cast

from stroma._utils.text import typed

_AttributeOf: TypeAlias = Callable[[BaseException], BaseException | None]
#: Attributes of exceptions as the base class has them: those of an exception's own class may raise anything.
cause_of: Final[_AttributeOf] = cast("Any", BaseException).__cause__.__get__
context_of: Final[_AttributeOf] = cast("Any", BaseException).__context__.__get__
_OF_RUN: Final = "stroma.failures.errors.RunFailed"
_members_of_group: Final = cast("Any", BaseExceptionGroup).exceptions.__get__


def causes_of(error: BaseException, most: int) -> Iterator[BaseException]:
    """Yield an exception, and what it was raised from: at most so many."""
    cause: BaseException | None = error
    while cause is not None and most:
        yield cause
        cause, most = cause_of(cause) or context_of(cause), most - 1


def members_of(error: BaseException) -> tuple[BaseException, ...]:
    """Return the exceptions in an exception group; of any other exception, none."""
    members: tuple[BaseException, ...] = ()
    if issubclass(type(error), BaseExceptionGroup):
        members = _members_of_group(error)
    return members


def safe_get(owner: Any, name: str) -> Any:
    """Return a key of a mapping or an attribute of another object; None if it cannot be read."""
    try:
        return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return None


def message_of(exc: BaseException) -> str:
    """``str(exc)``, or the type's name if that is empty or raises. Lone surrogates become escapes."""
    try:
        text = str(exc)
        if type(text) is not str or not text.isascii():
            text = text.encode("utf-8", "backslashreplace").decode()
        return text or type(exc).__name__
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return type(exc).__name__


def type_name(exc: BaseException) -> str:
    """Return the full name of an exception's type, also of one that was raised in another process."""
    kind = type(exc)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    recorded = vars(exc).get("type_name") if name == _OF_RUN else None
    return name if recorded is None else str(recorded)


def kind_of(exc: BaseException) -> str | None:
    """Return the short name of an exception's type, also of one that was raised in another process.

    None for a RunFailed whose message is that of a whole run: it begins with the type.
    """
    name = type_name(exc)
    return None if name == _OF_RUN else name.rpartition(".")[2]


def error_text(exc: BaseException) -> str:
    """Return an exception as people read it, ``Type: message``; never raises, whatever its ``str()`` does."""
    return typed(kind_of(exc), message_of(exc))
