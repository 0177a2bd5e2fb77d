"""LlamaIndex workflows: the steps of a workflow as steps.

::

    workflow = attach(MyWorkflow(), guard, {"weather": (City, Weather)})
    async with guard.run():
        await workflow.run(city="Oslo")
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("llama-index"):
    from workflows import Workflow
    from workflows.events import Event
    from workflows.runtime.types.results import WaitingForEvent

from stroma.adapters._delegation import guard_methods
from stroma.adapters._step import Control
from stroma.adapters.guard import Contracts, Guard

__all__ = ["attach"]

W = TypeVar("W", bound=Workflow)


def attach(workflow: W, guard: Guard, contracts: Contracts | None = None) -> W:
    """Make steps of the steps of a workflow, by their names; changes it and returns it.

    ``contracts``: by the names of steps; input is the fields of the event that a step gets, output those of
    the one that it returns. Raises UnknownNode for a contract of none, ValueError for a step that is no
    method of the workflow.
    """
    methods = inspect.getmembers(type(workflow), inspect.isfunction)
    names = [name for name, method in methods if hasattr(method, "_step_config")]
    free = type(workflow)._step_functions
    by_name = guard.contracts(contracts, [*names, *free], "step")
    if free:
        raise ValueError(
            f"steps {', '.join(map(repr, sorted(free)))} are free functions, which all workflows of "
            "the class share; decorate "
            "them with @guard.step(...) below @step"
        )
    for name in names:
        guard_methods(
            workflow,
            (name,),
            guard,
            name,
            contract=by_name.get(name),
            input_view=_received,
            output_view=_fields,
            control=_control,
        )
    return workflow


def _received(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the fields of the event among a step's arguments: the others are its context and resources."""
    values = (*args, *kwargs.values())
    event = next((value for value in values if isinstance(value, (Event, list))), None)
    return _fields(event)


def _fields(value: Any) -> Any:
    """Return the fields of an event, those beside its class's too, or of each event in a list."""
    if isinstance(value, list):
        return [_fields(event) for event in value]
    if not isinstance(value, Event):
        return value
    fields, result = (
        {**value.model_dump(mode="python"), **dict(value.items())},
        getattr(value, "_result", None),
    )
    return fields if result is None else {"result": result, **fields}


def _control(error: BaseException) -> Control | None:
    """Return that a step waits for an event, which it is called again with, in the same run."""
    return Control("returned") if isinstance(error, WaitingForEvent) else None
