"""Models whose validators are made when they are first asked for: a program that imports us may ask for none."""

from __future__ import annotations

import inspect
import os
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Deferred", "one_at_a_time"]

_lock = threading.RLock()


def one_at_a_time() -> AbstractContextManager[Any]:
    """Around the making of what is made when it is first asked for, by any thread."""
    return _lock


def _after_fork() -> None:
    # Another thread may have held it, and is not here to let it go.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


class _Signature:
    """What help() shows of a class: pydantic puts the real one in its place when it makes the validators."""

    def __get__(self, instance: object, owner: type[BaseModel]) -> inspect.Signature:
        owner.model_rebuild()
        return owner.__signature__


class Deferred(BaseModel):
    """The base of our models. What users derive from those is made at once, as any model of theirs."""

    model_config = ConfigDict(defer_build=True)

    if not TYPE_CHECKING:
        __signature__ = _Signature()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Deferred not in cls.__bases__:
            cls.model_rebuild(raise_errors=False)

    @classmethod
    def model_rebuild(cls, **options: Any) -> bool | None:
        """As pydantic's; two threads that ask for the validators at once get the same ones."""
        with one_at_a_time():  # pydantic before 2.14 has no lock of its own.
            return super().model_rebuild(**options)
