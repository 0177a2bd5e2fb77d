"""Functions that call others as steps: a function, a coroutine function, a generator function and an async one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

from stroma.adapters._guarded_call import Call
from stroma.adapters._guarded_run import GuardedRun
from stroma.adapters._step import GuardedStep
from stroma.contracts.node import gives_coroutine

__all__ = ["Kind", "wrapped"]

#: How a callable is called: as a function, a coroutine function, a generator function or an async one.
Kind: TypeAlias = Literal["call", "acall", "stream", "astream"]
#: Returns the run that a step belongs to.
CurrentRun: TypeAlias = Callable[[], GuardedRun]


def wrapped(
    current: CurrentRun, step: GuardedStep, func: Callable[..., Any], kind: Kind | None
) -> Callable[..., Any]:
    """Return a function that calls another one as a step, as that one is called.

    ``kind`` states how, where inspection cannot tell.
    """
    return _WRAPPERS[kind or _kind_of(func)](current, step, func)


def _kind_of(func: Callable[..., Any]) -> Kind:
    while isinstance(func, functools.partial):
        func = func.func
    for candidate in (func, getattr(func, "__call__", None)):  # noqa: B004
        if inspect.isasyncgenfunction(candidate):
            return "astream"
        if inspect.isgeneratorfunction(candidate):
            return "stream"
    return "acall" if gives_coroutine(func) else "call"


def _call(current: CurrentRun, step: GuardedStep, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return Call(current(), step, func, args, kwargs).call()

    return call


def _acall(current: CurrentRun, step: GuardedStep, func: Callable[..., Any]) -> Callable[..., Any]:
    async def acall(*args: Any, **kwargs: Any) -> Any:
        return await Call(current(), step, func, args, kwargs).acall()

    return acall


def _stream(current: CurrentRun, step: GuardedStep, func: Callable[..., Any]) -> Callable[..., Any]:
    def stream(*args: Any, **kwargs: Any) -> Any:
        return (yield from Call(current(), step, func, args, kwargs).stream())

    return stream


def _astream(current: CurrentRun, step: GuardedStep, func: Callable[..., Any]) -> Callable[..., Any]:
    async def astream(*args: Any, **kwargs: Any) -> Any:
        # The async form of `yield from`.
        stream = Call(current(), step, func, args, kwargs).astream()
        advance: Callable[[], Any] = stream.__anext__
        while True:
            try:
                chunk = await advance()
            except StopAsyncIteration:
                return
            try:
                advance = functools.partial(stream.asend, (yield chunk))
            except GeneratorExit:
                await stream.aclose()
                raise
            except BaseException as thrown:
                advance = functools.partial(stream.athrow, thrown)

    return astream


_WRAPPERS: Final[dict[Kind, Callable[[CurrentRun, GuardedStep, Callable[..., Any]], Callable[..., Any]]]] = {
    "call": _call,
    "acall": _acall,
    "stream": _stream,
    "astream": _astream,
}
