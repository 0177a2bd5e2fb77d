"""Blocking forms of the async functions of the test kit."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from stroma.engine.tasks import has_running_loop

P = ParamSpec("P")
T = TypeVar("T")


def blocking_form_of(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[[Any], Callable[P, T]]:
    """Return a decorator that gives its function the parameters of an async function, and calls that one."""

    def decorate(named: Any) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> T:
            if has_running_loop():
                raise RuntimeError(f"an event loop is running here; use `await {function.__name__}(...)`")
            return asyncio.run(function(*args, **options))

        call.__name__, call.__qualname__, call.__doc__ = named.__name__, named.__qualname__, named.__doc__
        return call

    return decorate
