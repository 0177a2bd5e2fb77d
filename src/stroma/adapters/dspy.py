"""DSPy: a program and its predictors as steps.

::

    program = attach(MyProgram(), Guard(runner), {"answer.predict": (Question, Answer)})
    program(question="...")  # a run
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("dspy"):
    import dspy
    from dspy.streaming.messages import StatusMessage
    from dspy.utils.usage_tracker import UsageTracker

from stroma.adapters._background_loop import Changes, applied
from stroma.adapters._delegation import before, guard_methods, within, wrap_method
from stroma.adapters._guarded_run import ACTIVE
from stroma.adapters._step import mark_published, report_uncounted
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import usage_from
from stroma.engine.execution import CURRENT, current_node

__all__ = ["attach"]

T = TypeVar("T")
_METHODS: Final = ("forward", "aforward")


def attach(program: T, guard: Guard, contracts: Contracts | None = None) -> T:
    """Make a step of a program, by the name of its class, and of each predictor in it; returns it changed.

    ``contracts``: by the names that ``program.named_predictors()`` gives, or that of the class; input is the
    keyword arguments, output the prediction's fields. Each call of the program, or of a copy of it, is a run,
    and guards the predictors that were added since. Raises UnknownNode for a contract of none.
    """
    target: Any = program
    own = type(target).__name__
    by_name = guard.contracts(contracts, {own, *(name for name, _ in target.named_predictors())}, "predictor")
    _guard_predictors(target, guard, own, by_name)

    def renewed(call: Callable[..., Any]) -> Callable[..., Any]:
        first = lambda self, *_, **__: _guard_predictors(self, guard, own, by_name)  # noqa: E731
        return guard.each_call(before(call, first), lambda _, kwargs: kwargs)

    for name in _METHODS:
        wrap_method(target, name, guard, renewed)
    return program


def _guard_predictors(
    program: Any, guard: Guard, own: str, contracts: dict[str, NodeContract[Any, Any]]
) -> None:
    steps = {own: program}
    steps.update((name, each) for name, each in program.named_predictors() if each is not program)
    for name, module in steps.items():
        about: Any = {"contract": contracts.get(name), "output_view": _fields}
        guard_methods(module, _METHODS, guard, name, _counted, input_view=lambda _, kwargs: kwargs, **about)
        if module is not program:
            for method in _METHODS:
                wrap_method(module, method, guard, _in_context)


def _counted(bare: Any) -> Any:
    return within(bare, lambda *_, **__: _booking())


class _Tracker(UsageTracker):
    """Counts what is used inside one step. What is used in a step further inside is count_tokens there."""

    def __init__(self) -> None:
        super().__init__()
        #: The step here, and the runs, for the threads that DSPy starts: they get its settings, and no
        #: context.
        self.context: Changes = [(ACTIVE, ACTIVE.get()), (CURRENT, CURRENT.get())]
        outer = dspy.settings.usage_tracker
        #: The one of the user's, around all steps.
        self.users: Any = outer.users if isinstance(outer, _Tracker) else outer

    def add_usage(self, lm: str, usage_entry: Any) -> None:
        super().add_usage(lm, usage_entry)
        if self.users is not None:
            self.users.add_usage(lm, usage_entry)

    def __deepcopy__(self, memo: Any) -> _Tracker:
        """Return a tracker for a thread of DSPy's: it counts for the same step, with a copy of the user's."""
        copied = copy.copy(self)
        copied.users = copy.deepcopy(self.users, memo)
        return copied


def _in_context(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that belongs to the step around it, in a thread without the context of that, too."""

    def around(*_: Any, **__: Any) -> Any:
        tracker = dspy.settings.usage_tracker
        return applied(tracker.context if isinstance(tracker, _Tracker) and not ACTIVE.get() else ())

    return within(call, around)


class _PublishingStream:
    """The stream of ``dspy.streamify``: what a step has sent there cannot be taken back."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def send(self, part: Any) -> None:
        if not isinstance(part, StatusMessage):
            mark_published()
        await self._stream.send(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _booking() -> Iterator[None]:
    """Book what the models inside use on the step here, when it fails, too."""
    node, tracker = current_node()._own, _Tracker()
    try:
        stream = dspy.settings.send_stream
        published = (
            stream if stream is None or isinstance(stream, _PublishingStream) else _PublishingStream(stream)
        )
        with dspy.settings.context(usage_tracker=tracker, send_stream=published):
            yield
    finally:
        for model, entries in tracker.usage_data.items():
            for entry in entries:
                if entry:
                    report_uncounted(node, usage_from(entry, model=model.partition("/")[2] or model))


def _fields(output: Any) -> Any:
    return output.toDict() if isinstance(output, dspy.Prediction) else output
