"""Suspension of a graph of LangGraph, and the answers that it continues with."""

from __future__ import annotations

from typing import Any

from langgraph.types import Command

from stroma.adapters.guard import Guard
from stroma.engine.execution import current_node_or_none

__all__ = ["answer_of", "is_answered", "is_continuation", "may_be_suspended", "note_suspended"]


def is_continuation(input: Any) -> bool:
    return input is None or isinstance(input, Command)


def is_answered(guard: Guard, input: Any) -> bool:
    """Return True if a graph continues and its nodes have stored answers (``stroma approve``)."""
    return input is None and current_node_or_none() is None and bool(guard.current.questions.answers_of_steps)


def answer_of(guard: Guard, state: Any) -> Any:
    """Return the stored answers as LangGraph takes them."""
    answers = guard.current.questions.answers_of_steps
    pending = [(task.name, interrupt.id) for task in state.tasks for interrupt in task.interrupts]
    if not pending:
        return None
    if len(pending) == len(answers) == 1:
        return Command(resume=answers[0][1])
    by_id = {}
    for step_id, answer in answers:
        key = next((id for name, id in pending if name == step_id and id not in by_id), None)
        if key is not None:
            by_id[key] = answer
    return Command(resume=by_id)


def may_be_suspended(graph: Any, guard: Guard, options: dict[str, Any]) -> bool:
    """Return True if LangGraph may have ended the call without an interrupt() that a step has seen."""
    if current_node_or_none() is not None or not graph.checkpointer or guard.current.ctx.suspended:
        return False
    own = graph.interrupt_before_nodes or graph.interrupt_after_nodes
    return bool(own or options.get("interrupt_before") or options.get("interrupt_after"))


def note_suspended(guard: Guard, state: Any) -> None:
    if state.next:
        guard.current.ctx.note_suspended(f"before {', '.join(map(repr, state.next))}")
