"""Looking at objects of classes that are not imported: a provider's exception, its response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias, cast

_AttributeOf: TypeAlias = Callable[[BaseException], BaseException | None]
#: Attributes of exceptions as the base class has them: those of an exception's own class may raise anything.
cause_of: Final[_AttributeOf] = cast("Any", BaseException).__cause__.__get__
context_of: Final[_AttributeOf] = cast("Any", BaseException).__context__.__get__
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
