"""Deferred calls of Pydantic AI: their questions, and the stored answers that a history continues with."""

from __future__ import annotations

from typing import Any

from pydantic_ai.messages import ModelResponse
from pydantic_ai.tools import DeferredToolResults

from stroma.adapters.guard import Guard

__all__ = ["Deferred", "ask", "stored_results"]


class Deferred(Exception):
    """The run of an agent that waits for approvals, or for results of tools that others run."""

    def __init__(self, result: Any) -> None:
        waits = [f"approval of {call.tool_name}" for call in result.output.approvals]
        waits += [f"result of {call.tool_name}" for call in result.output.calls]
        super().__init__("; ".join(waits))
        self.result = result


async def ask(guard: Guard, requests: Any) -> None:
    """Suspend the run with a question for each call that waits for an approval or a result."""
    for kind, calls in (("approval", requests.approvals), ("result", requests.calls)):
        for call in calls:
            await guard.current.questions.ask(
                call.tool_name, f"{kind} {call.tool_call_id}", f"{kind} of {call.tool_name}"
            )


def stored_results(guard: Guard, messages: Any) -> DeferredToolResults | None:
    """Return the stored answers to the calls that a history ends with, or None unless all of them are answered."""
    last = next((message for message in reversed(messages) if isinstance(message, ModelResponse)), None)
    if last is None:
        return None
    done = (
        {getattr(part, "tool_call_id", None) for part in messages[-1].parts}
        if last is not messages[-1]
        else ()
    )
    pending = [call.tool_call_id for call in last.tool_calls if call.tool_call_id not in done]
    run = guard.current
    answers = run.questions.answers_to(
        f"{kind} {call_id}" for kind in ("approval", "result") for call_id in pending
    )
    if not pending or len(answers) < len(pending):
        return None
    run.questions.taken.update(answers)
    results = DeferredToolResults()
    for key, answer in answers.items():
        kind, _, call_id = key.partition(" ")
        if kind == "approval":
            results.approvals[call_id] = answer is True
        else:
            results.calls[call_id] = answer
    return results
