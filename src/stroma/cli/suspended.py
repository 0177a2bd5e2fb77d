"""What suspended runs wait for: as data, in words, and as the command that answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from stroma._utils.text import clean
from stroma.checkpoint.manager import resolve_schema
from stroma.checkpoint.protocols import Waiting
from stroma.cli.formatting import id_word
from stroma.cli.inputs import example
from stroma.cli.stores import Keeper

__all__ = ["approve_hint", "asked", "find_schema", "open_ones", "waiting_data", "where"]


def open_ones(waiting: Sequence[Waiting]) -> list[Waiting]:
    """Those without an answer."""
    return [one for one in waiting if one.payload is None]


def waiting_data(one: Waiting) -> dict[str, Any]:
    """A node that waits, as the JSON schemas show it."""
    return {
        "position": one.position,
        "branch": one.branch,
        "node_id": one.node_id,
        "reason": one.reason,
        "schema": one.schema_ref or None,
        "answered": one.payload is not None,
    }


def where(one: Waiting) -> str:
    """The node that waits, and its place in the run."""
    at = f"{one.position}.{one.branch}" if one.branch else str(one.position)
    return f"node {clean(one.node_id, 100)!r} (at {at})"


def asked(one: Waiting) -> str:
    """What an answer must be."""
    name = one.schema_ref.partition(":")[2]
    return clean(name, 100) if name else "any JSON"


def find_schema(one: Waiting, module: ModuleType | None = None) -> type[BaseModel] | None:
    """The class that a node asked for, among what is imported; nothing is imported for it.

    ``module``: looked into where the class is not found by its full name: a program that ran as ``__main__`` recorded
    that, and a file may be known by another name in this process.
    """
    recorded, _, name = one.schema_ref.partition(":")
    places = [] if recorded == "__main__" else [recorded]
    places += [module.__name__] if module is not None else []
    for place in places:
        try:
            return resolve_schema(f"{place}:{name}")
        except (LookupError, TypeError):
            continue
    return None


def approve_hint(
    db: Keeper, run_id: str, target: str, waiting: Sequence[Waiting], *, limit: int = 5
) -> list[str]:
    """The commands that answer, one for each node that waits."""
    lines = []
    for one in waiting[:limit]:
        model = find_schema(one) if one.schema_ref else None
        answer = "ANSWER" if model is None else json.dumps(example(model), ensure_ascii=False)
        options: tuple[str, ...] = ()
        if len(waiting) > 1:
            options = ("--node", one.node_id, *(("--branch", one.branch) if one.branch else ()))
        lines.append(db.hint("approve", id_word(run_id), target, answer, options=options))
    return lines
