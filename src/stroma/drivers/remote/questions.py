"""Questions of nodes and flows, and their answers, as plain data of a run's state."""

from __future__ import annotations

from typing import Any

from stroma.checkpoint import Waiting
from stroma.checkpoint.entries import UnknownCall
from stroma.drivers.remote.state import NodePlace, RunState
from stroma.drivers.remote.wire import Answer

__all__ = ["answer_of", "answers_for", "record_question", "waiting_of"]


def answer_of(waiting: Waiting) -> Answer:
    """Return a question or an answer as plain data."""
    answer: Answer = {
        "position": waiting.position, "branch": waiting.branch, "node_id": waiting.node_id, "reason": waiting.reason,
        "schema_ref": waiting.schema_ref, "payload": None if waiting.payload is None else waiting.payload.decode(),
    }  # fmt: skip
    if waiting.effect is not None:
        answer["effect"] = list(waiting.effect)
    return answer


def waiting_of(answer: Answer) -> Waiting:
    """Return a question or an answer from its plain data."""
    payload, call = answer["payload"], answer.get("effect")
    return Waiting(
        answer["position"], answer["branch"], answer["node_id"], answer["reason"], answer["schema_ref"],
        None if payload is None else payload.encode(), None if call is None else UnknownCall(*call),
    )  # fmt: skip


def record_question(state: RunState, question: Answer) -> None:
    """Record what a node waits for, or a step inside of it."""
    key = f"{question['position']}|{question['branch']}"
    state["waiting"][key] = question
    state["answers"].pop(key, None)  # It was for an earlier question.


def answers_for(state: RunState, place: NodePlace) -> dict[str, Any]:
    """Return the fields of a request for the answers to a node, and to the steps inside of it."""
    answers = state["answers"]
    around = f"{place.key}." if place.branch else place.key
    inside = [answers[key] for key in answers if key.startswith(around) and key != place.key]
    fields: dict[str, Any] = {"answer": answers.get(place.key)}
    return {**fields, "inside": inside} if inside else fields
