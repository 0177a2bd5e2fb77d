"""Answers to suspended runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import StoreError, Waiting, resolve_schema
from stroma.checkpoint.entries import NOT_DONE
from stroma.contracts.effects import NotDone, Unknown
from stroma.contracts.node import output_class
from stroma.contracts.schema import schema_of

__all__ = ["match_answer"]


def match_answer(
    pending: Sequence[Waiting],
    run_id: str,
    answer: Any,
    *,
    node_id: str | None,
    branch: str | None,
    schema: type[BaseModel] | None,
) -> Waiting:
    """Return the suspended node that an answer is for, with the answer validated and encoded.

    Raises pydantic's ValidationError, StoreError if no node matches or its schema is not imported, ValueError if
    several match.
    """
    matches = [
        waiting
        for waiting in pending
        if waiting.payload is None and node_id in (None, waiting.node_id) and branch in (None, waiting.branch)
    ]
    if not matches:
        which = "" if node_id is None else f" at node {node_id!r}"
        raise StoreError(
            f"run {run_id!r} is not waiting for an answer{which}; check its status and its attempts"
        )
    if len(matches) > 1:
        places = ", ".join(f"{w.node_id!r} (branch {w.branch!r})" for w in matches)
        raise ValueError(
            f"run {run_id!r} is waiting for answers at {places}; select one with node_id= and branch="
        )
    waiting, model = matches[0], schema
    if isinstance(answer, (NotDone, Unknown)):
        if waiting.effect is None:
            raise ValueError(
                f"node {waiting.node_id!r} of run {run_id!r} is no effect whose call is unknown; answer its question"
            )
        if isinstance(answer, Unknown):
            raise ValueError(
                f"node {waiting.node_id!r} of run {run_id!r} is suspended until its call is known; pass its output, or NotDone()"
            )
        return waiting._replace(payload=NOT_DONE)
    if model is None and waiting.schema_ref:
        try:
            model = resolve_schema(waiting.schema_ref)
        except (LookupError, TypeError) as error:
            raise StoreError(
                f"node {waiting.node_id!r} of run {run_id!r} needs a {waiting.schema_ref}: {error}; "
                "or pass that class as schema="
            ) from error
    expected = schema_of(model or output_class(None))
    validated = (
        expected.convert(answer) if isinstance(answer, BaseModel) and model else expected.validate(answer)
    )
    return waiting._replace(payload=expected.encode(validated))
