"""Comparison of a recorded run with a pipeline that is to resume it."""

# Which keys a node has depends on its kind.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stroma.checkpoint import PipelineChanged
from stroma.checkpoint.identity import child_indexes
from stroma.drivers.remote.state import RunState
from stroma.drivers.remote.wire import NodeSpec

__all__ = ["check_unchanged"]


def check_unchanged(
    run_id: str, before: Sequence[NodeSpec], now: Sequence[NodeSpec], state: RunState
) -> None:
    """Raise PipelineChanged if a committed position has another node or schema in the pipeline."""
    for position in range(state["position"]):
        then = before[position]
        if position >= len(now):
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: it has the output of node {then['id']!r} at position {position}, and the "
                f"pipeline has only {len(now)} nodes; restore it, or start a new run"
            )
        if then["id"] != now[position]["id"]:
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: at position {position} it has the output of node {then['id']!r}, but the "
                f"pipeline has {now[position]['id']!r} there; restore the order of nodes, or start a new run"
            )
        if then.get("output") != now[position].get("output"):
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: the output of node {then['id']!r} at position {position} was recorded with "
                "another schema; restore it, or start a new run"
            )
    unknown = [key for key, call in state["effects"].items() if call["is_open"]]
    for key in [*state["done"], *state["maps"], *state["answers"], *unknown]:
        where, _, branch = key.partition("|")
        steps = [int(where), *child_indexes(branch)]
        old, new = _spec_at(before, steps), _spec_at(now, steps)
        if old is not None and (new is None or _compatible_part(old) != _compatible_part(new)):
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: at position {where} ({branch}) it has what came of node {old['id']!r} so far, and "
                f"the pipeline has {'nothing' if new is None else repr(new['id'])} there, or another contract; restore it, or "
                "start a new run"
            )


def _spec_at(specs: Sequence[NodeSpec], steps: Sequence[int]) -> NodeSpec | None:
    """Return the node at a position and the index of each child on the way, or None."""
    spec: NodeSpec | None = None
    for index in steps:
        if spec is not None:
            specs = spec.get("children", [])
            index = 0 if spec["kind"] == "map" else index
        if index >= len(specs):
            return None
        spec = specs[index]
    return spec


def _compatible_part(spec: NodeSpec) -> tuple[Any, ...]:
    """Return the part of a node by which recorded outputs of it can be used."""
    children = spec.get("children", [])
    inner = children[-1:] if spec["kind"] in ("map", "sequence") else []
    return (
        spec["id"],
        spec["kind"],
        spec.get("output"),
        spec.get("over"),
        [_compatible_part(one) for one in inner],
    )
