"""Guarding of objects whose methods call each other, and that are copied.

The steps of an object lie in its ``__dict__``, where copies take them along, and its class asks for them at
each call: a copy's steps call the copy, and an object that is not guarded costs one look-up.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Final, cast

from stroma.adapters._state_views import View, arguments_of
from stroma.adapters.guard import Guard
from stroma.engine.execution import CURRENT, current_node

#: Where an object has its steps, and a method of a class what it stands for.
_STEPS: Final = "_stroma_steps"
_BARE: Final = "_stroma_bare"
_LOCK: Final = threading.Lock()
#: The wrapped methods that are under way in this context, with their objects.
_ENTERED: ContextVar[tuple[tuple[str, Any], ...]] = ContextVar("stroma_entered_methods", default=())


class _Steps:
    """Steps of an object's methods, by their names; its copies have the same."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        #: What is called in place of each method: a function of the object and the arguments of the method.
        self.by_name: dict[str, Callable[..., Any]] = {}
        #: The steps among them, and the names of the methods that are wrapped otherwise.
        self.guarded: dict[str, Callable[..., Any]] = {}
        self.wrapped: set[str] = set()

    def __deepcopy__(self, _: Any) -> _Steps:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()  # What is pickled is not guarded elsewhere.


def guard_methods(
    owner: Any,
    names: tuple[str, ...],
    guard: Guard,
    step_id: str,
    around: Callable[[Any], Any] = lambda bare: bare,
    *,
    input_view: View | None = None,
    messages: View | None = None,
    **about: Any,
) -> Any:
    """Make steps of methods of an object and its copies, one for nested calls of them; return the object.

    ``around(bare)``: returns the function to call in place of a function of the class, sync or async like it.
    """
    steps = _steps_of(owner, guard)
    for name in names:
        if name in steps.guarded:
            guard.has(steps.guarded[name], about.get("contract"))
        elif (bare := _function_of(owner, name)) is not None:
            # The object comes first; views do not show it.
            views = {"input_view": input_view, "messages": messages}
            about |= {
                view: functools.partial(_view_without_owner, of_arguments)
                for view, of_arguments in views.items()
                if of_arguments is not None
            }
            options: dict[str, Any] = {"input_view": arguments_of(bare), **about}
            step = guard.wrap(step_id, _noted(around(bare)), **options)
            steps.guarded[name] = steps.by_name[name] = step
            _ask_object(owner, name, bare)
    return owner


def wrap_method(owner: Any, name: str, guard: Guard, wrapper: Callable[[Any], Any]) -> None:
    """Call ``wrapper(func)`` in place of a method of an object and its copies, once for nested calls of it.

    ``func`` and what the wrapper returns are functions of the object and the arguments, both sync or both
    async. Nothing happens if there is no such method, or it was wrapped before.
    """
    bare, steps = _function_of(owner, name), _steps_of(owner, guard)
    if bare is not None and name not in steps.wrapped:
        steps.wrapped.add(name)
        steps.by_name[name] = wrapper(_entered(name, steps.by_name.get(name, bare)))
        _ask_object(owner, name, bare)


def within(
    call: Callable[..., Any], context: Callable[..., AbstractContextManager[Any]]
) -> Callable[..., Any]:
    """Return a function, sync or async like ``call``, that calls it inside ``context(*args, **kwargs)``."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with context(*args, **kwargs):
            return call(*args, **kwargs)

    async def ainside(*args: Any, **kwargs: Any) -> Any:
        with context(*args, **kwargs):
            return await call(*args, **kwargs)

    return functools.wraps(call)(ainside if inspect.iscoroutinefunction(call) else inside)


def before(call: Callable[..., Any], first: Callable[..., None]) -> Callable[..., Any]:
    """Return a function, sync or async like another one, that calls ``first(*args, **kwargs)`` before it."""

    @contextmanager
    def context(*args: Any, **kwargs: Any) -> Iterator[None]:
        first(*args, **kwargs)
        yield

    return within(call, context)


def _entered(name: str, call: Any) -> Any:
    """Return a function that marks the calls inside as part of a call of the method of its first argument."""

    @contextmanager
    def entering(owner: Any, *_: Any, **__: Any) -> Iterator[None]:
        token = _ENTERED.set((*_ENTERED.get(), (name, owner)))
        try:
            yield
        finally:
            _ENTERED.reset(token)

    return within(call, entering)


def _steps_of(owner: Any, guard: Guard) -> _Steps:
    steps: _Steps | None = vars(owner).get(_STEPS)
    if steps is None:
        steps = _Steps(guard)
        object.__setattr__(owner, _STEPS, steps)
    elif steps.guard is not guard:
        raise ValueError(
            f"{owner!r} is already guarded by another guard; attach only one guard, or create the "
            "object again"
        )
    return steps


def _function_of(owner: Any, name: str) -> Any:
    """Return the function of the class behind a method, or None."""
    if name in vars(owner):  # A method of this very object, which takes no `self`.
        bare = vars(owner)[name]
        return getattr(bare, _BARE, None) or _with_owner(bare)
    function = inspect.getattr_static(type(owner), name, None)
    if not inspect.isroutine(function):
        return None
    # As the class that has it gives it out: only then does what an instrumentation has put in its place
    # (wrapt) know its object.
    return getattr(function, _BARE, None) or cast("Any", function).__get__(None, _home_of(owner, name))


def _home_of(owner: Any, name: str) -> Any:
    return next(kind for kind in type(owner).__mro__ if name in vars(kind))


def _with_owner(bare: Any) -> Any:
    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        return bare(*args, **kwargs)

    async def acall(_: Any, *args: Any, **kwargs: Any) -> Any:
        return await bare(*args, **kwargs)

    return functools.wraps(bare)(acall if inspect.iscoroutinefunction(bare) else call)


def _ask_object(owner: Any, name: str, bare: Any) -> None:
    """Make the class of an object, or an object with a method of its own, ask for the steps at each call."""
    if name in vars(owner):
        if not hasattr(vars(owner)[name], _BARE):
            object.__setattr__(owner, name, _marked(functools.partial(_asking(name, bare), owner), bare))
        return
    with _LOCK:
        home = _home_of(owner, name)
        if not hasattr(vars(home)[name], _BARE):
            setattr(home, name, _asking(name, bare))


def _asking(name: str, bare: Any) -> Any:
    def step_of(owner: Any) -> Any:
        steps = vars(owner).get(_STEPS)
        return bare if steps is None or _is_inside(owner, name) else steps.by_name.get(name, bare)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return step_of(self)(self, *args, **kwargs)

    async def amethod(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await step_of(self)(self, *args, **kwargs)

    return _marked(functools.wraps(bare)(amethod if inspect.iscoroutinefunction(bare) else method), bare)


def _is_inside(owner: Any, name: str) -> bool:
    """Return True inside a step of an object, or inside a call of its method, such as by a subclass."""
    node = CURRENT.get()
    if node is not None and node.notes.get(id(owner)) is owner:
        return True
    return any(entered == name and each is owner for entered, each in _ENTERED.get())


def _marked(func: Any, bare: Any) -> Any:
    func.__dict__[_BARE] = bare
    return func


def _view_without_owner(view: View, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return view(args[1:], kwargs)


def _noted(call: Any) -> Any:
    """Return a function that marks the current step as one of its first argument."""

    def note(owner: Any, *_: Any, **__: Any) -> None:
        current_node().notes[id(owner)] = owner

    return before(call, note)
