"""Parts of a flow, which call no hooks: a flow or pipeline inside it, and a map. They are known from the places of their steps."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

from stroma.checkpoint.identity import is_called

__all__ = ["FlowPart", "part_around"]


class FlowPart(NamedTuple):
    """A part of a flow.

    Attributes:
        branch: the place of its call.
        name: the flow or pipeline, or the node that a map runs; of a call with a key the key.
    """

    branch: str
    name: str
    is_map: bool


def part_around(branch: str) -> FlowPart | None:
    """Return the innermost part of a flow around a place; None for a place in no part."""
    outer = branch.rpartition(".")[0]
    if not is_called(outer):
        return None
    # "{task}/{kind}{name}#{number or key}", and "@{input}" behind it where that is in the identity.
    call = outer.rpartition(".")[2].rpartition("/")[2].partition("@")[0]
    name, _, number = call.partition("#")
    is_map = name.startswith("*")
    return FlowPart(outer, unquote(name.removeprefix("*") or number), is_map)
