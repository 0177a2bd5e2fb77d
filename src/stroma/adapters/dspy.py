"""DSPy: a program and its predictors as steps.

::

    program = attach(MyProgram(), Guard(runner), {"answer.predict": (Question, Answer)})
    program(question="...")  # a run
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stroma.adapters._releases import import_error, warn_if_untested

try:
    import dspy
    from dspy.streaming.messages import StatusMessage
    from dspy.utils.usage_tracker import UsageTracker
except ImportError as error:
    raise import_error("dspy", error) from error

from stroma.adapters._delegation import guard_methods, own_method
from stroma.adapters._step import mark_published
from stroma.adapters.guard import Contracts, Guard
from stroma.cost.usage import usage_from
from stroma.engine.execution import current_node

warn_if_untested("dspy")

__all__ = ["attach"]


def attach(program: Any, guard: Guard, contracts: Contracts | None = None) -> Any:
    """Make a step of a program, by the name of its class, and of each predictor in it; changes it and returns it.

    ``contracts``: by the names that ``program.named_predictors()`` gives, or that of the class; input is the keyword
    arguments, output the prediction's fields. Each call of the program is a run. Raises UnknownNode for a contract of none.
    """
    own = type(program).__name__
    steps = {
        own: program,
        **{name: predictor for name, predictor in program.named_predictors() if predictor is not program},
    }
    by_name = guard.contracts(contracts, steps, "predictor")
    for name, module in steps.items():
        about: Any = {
            "contract": by_name.get(name),
            "input_view": lambda _, kwargs: kwargs,
            "output_view": _fields,
        }
        guard_methods(module, ("forward", "aforward"), guard, name, _counted, **about)
    for name in ("forward", "aforward"):
        method = own_method(program, name)
        if method is not None and not hasattr(method, "_stroma_run"):
            run = guard.each_call(method, lambda _, kwargs: kwargs)
            run.__dict__["_stroma_run"] = True
            object.__setattr__(program, name, run)
    return program


def _counted(bare: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _booking():
            return bare(*args, **kwargs)

    async def acall(*args: Any, **kwargs: Any) -> Any:
        with _booking():
            return await bare(*args, **kwargs)

    return acall if inspect.iscoroutinefunction(bare) else call


class _Tracker(UsageTracker):
    """Counts what is used inside one step. What is used in a step further inside is count_tokens there."""

    def __init__(self) -> None:
        super().__init__()
        outer = dspy.settings.usage_tracker
        #: The one of the user's, around all steps.
        self.users: Any = outer.users if isinstance(outer, _Tracker) else outer

    def add_usage(self, lm: str, usage_entry: Any) -> None:
        super().add_usage(lm, usage_entry)
        if self.users is not None:
            self.users.add_usage(lm, usage_entry)


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
    node, tracker = current_node(), _Tracker()
    assert node is not None
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
                    node.report_usage(usage_from(entry, model=model.partition("/")[2] or model))


def _fields(output: Any) -> Any:
    return output.toDict() if isinstance(output, dspy.Prediction) else output
