"""Answers to suspended runs, and messages to runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint import StoreError, Waiting, resolve_schema
from stroma.checkpoint.decisions import not_waiting
from stroma.checkpoint.entries import NOT_DONE
from stroma.contracts.effects import NotDone, Unknown
from stroma.contracts.node import output_class
from stroma.contracts.schema import schema_of

__all__ = ["encode_message", "match_answer"]

_MAX_NAMED: Final = 10  # questions in a message


def match_answer(
    questions: Sequence[Waiting],
    run_id: str,
    answer: Any,
    *,
    question: str | None,
    schema: type[BaseModel] | None,
) -> Waiting:
    """Return the question that an answer is for, with the answer validated and encoded.

    ``questions``: the questions of the run, answered ones too. Raises pydantic's ValidationError, StoreError
    if no question is open or the class of the answer is not imported, ValueError if the id of the question is
    needed, or the answer is of another kind.
    """
    waiting = _find(questions, run_id, answer, question)
    if isinstance(answer, (NotDone, Unknown)):
        if waiting.effect is None:
            raise ValueError(
                f"question {waiting.id!r} of run {run_id!r} is not about the call of an effect; answer it"
            )
        if isinstance(answer, Unknown):
            raise ValueError(
                f"node {waiting.node_id!r} of run {run_id!r} is suspended until its call is known; pass its output, or NotDone()"
            )
        return waiting._replace(payload=NOT_DONE)
    expected = schema_of(schema or _class_of(waiting, answer))
    if isinstance(answer, BaseModel) and waiting.schema_ref:
        return waiting._replace(payload=expected.encode(expected.convert(answer)))
    return waiting._replace(payload=expected.encode(expected.validate(answer)))


def encode_message(message: Any) -> bytes:
    """Return a message in stored form. Raises NotSerialisable for a model without one, TypeError or ValueError for what is no JSON."""
    if isinstance(message, BaseModel):
        schema = schema_of(type(message))
        return schema.encode(schema.convert(message))
    # The space tells it from a model in stored form.
    return b" " + json.dumps(message, ensure_ascii=False, allow_nan=False).encode()


def _find(questions: Sequence[Waiting], run_id: str, answer: Any, question: str | None) -> Waiting:
    """Return the question with an id; without an id the one that is open. Raises StoreError, ValueError."""
    if question is not None:
        named = next((one for one in questions if one.id == question), None)
        if named is None:
            raise not_waiting(run_id, question)
        return named
    waiting = [one for one in questions if one.payload is None]
    if not waiting:
        raise StoreError(f"run {run_id!r} has no open question; check its status and its attempts")
    is_statement = isinstance(answer, (NotDone, Unknown))
    # A statement is about one call: by now the open question may be about another one.
    taking = [one for one in waiting if one.effect is None and not is_statement]
    if len(taking) == 1:
        return taking[0]
    names = ", ".join(f"{one.id!r} of {one.node_id!r}" for one in (taking or waiting)[:_MAX_NAMED])
    why = f"has {len(taking)} open questions"
    if not taking:
        is_about_effect = any(one.effect for one in waiting)
        why = (
            "needs a statement that names its call"
            if is_about_effect
            else "is not asked about the call of an effect"
        )
    raise ValueError(f"run {run_id!r} {why}; pass question= with the id of one: {names}")


def _class_of(waiting: Waiting, answer: Any) -> type[BaseModel]:
    """Return the class that an answer must satisfy. Raises StoreError if it is not imported."""
    if not waiting.schema_ref:
        return output_class(None)
    if (
        isinstance(answer, BaseModel)
        and waiting.schema
        and schema_of(type(answer)).json_schema == waiting.schema
    ):
        return type(answer)  # The class, or the same one by another name of its module.
    try:
        return resolve_schema(waiting.schema_ref)
    except (LookupError, TypeError) as error:
        raise StoreError(
            f"question {waiting.id!r} of {waiting.node_id!r} needs a {waiting.schema_ref}: {error}; "
            "or pass that class as schema="
        ) from error
