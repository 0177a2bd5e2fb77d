"""Loggers whose records are single lines, and show no secret."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final

from pydantic_core import ValidationError

from stroma._utils.secrets import Secrets
from stroma._utils.text import one_line

_NO_SECRETS: Final = Secrets()
_MOST_ERRORS: Final = 5  # of one model


def get_logger(name: str = "stroma") -> SafeLogger:
    """Return a logger for what concerns no single run."""
    return SafeLogger(logging.getLogger(name), {})


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """Writes every argument in one line, and so the messages of exceptions in tracebacks.

    Of a ValidationError it writes the places and kinds of errors: the text has the refused values. A subclass
    says which secrets are masked.
    """

    def mask(self, text: str) -> str:
        """Return a text as it may be logged."""
        return text

    def mask_error(self, error: BaseException) -> BaseException:
        """Return an exception as it may be logged with its traceback."""
        return _NO_SECRETS.mask_error(error)

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line; see :meth:`logging.Logger.log`."""
        if not self.isEnabledFor(level):
            return
        error = kwargs.get("exc_info")
        if error and not isinstance(error, BaseException):
            error = (error if isinstance(error, tuple) else sys.exc_info())[1]
        if error is not None:
            shown = self.mask_error(error) if error else None
            kwargs["exc_info"] = shown and (type(shown), shown, shown.__traceback__)
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        msg, processed = self.process(msg, kwargs)
        if len(args) == 1 and isinstance(args[0], dict):  # Named placeholders.
            args = ({name: self._shown(value) for name, value in args[0].items()},)
        else:
            args = tuple(map(self._shown, args))
        try:
            self.logger.log(level, msg, *args, **processed)
        except Exception as raised:  # A handler or filter of the application, which changes no outcome.
            if logging.raiseExceptions and sys.stderr is not None:
                with suppress(OSError):
                    traceback.print_exception(raised, chain=False)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message and the options of a record, with the fields of this logger."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs

    def _shown(self, argument: Any) -> Any:
        kind = type(argument)
        if kind is str:
            return one_line(self.mask(argument))
        if argument is None or hasattr(kind, "__float__"):
            return argument
        if issubclass(kind, ValidationError):
            argument = f"the value does not fit {argument.title}: {refused_fields(argument)}"
        return _Line(argument, self.mask)


class _Line:
    """An argument of a record, written in one line when the record is."""

    __slots__ = ("_mask", "_value")

    def __init__(self, value: Any, mask: Callable[[str], str]) -> None:
        self._value = value
        self._mask = mask

    def __str__(self) -> str:
        return self._written(str)

    def __repr__(self) -> str:
        return self._written(repr)

    def _written(self, write: Callable[[Any], str]) -> str:
        try:
            return one_line(self._mask(write(self._value)))
        except Exception:  # Code of the value's class.
            return f"<{type(self._value).__name__}>"


def refused_fields(error: ValidationError) -> str:
    """Return the places and kinds of the errors, without refused values and messages of validators."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        f"{'.'.join(map(str, one['loc'])) or 'the whole'} ({one['type']})" for one in errors[:_MOST_ERRORS]
    ]
    rest = f" and {len(errors) - len(shown)} more" if len(errors) > len(shown) else ""
    return ", ".join(shown) + rest
