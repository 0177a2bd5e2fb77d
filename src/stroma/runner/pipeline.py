"""Pipeline: a named sequence of nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stroma.contracts.contract import check_id
from stroma.contracts.node import find_node
from stroma.engine.config import RunConfig

__all__ = ["Pipeline"]


@dataclass(frozen=True, slots=True, init=False)
class Pipeline:
    """A named sequence of nodes, with an optional configuration.

    Metrics and spans are labelled with the name. Raises TypeError for anything that is not a node, ValueError for a name
    that a store cannot save.
    """

    name: str
    nodes: tuple[Any, ...]
    config: RunConfig | None

    def __init__(self, name: str, nodes: Iterable[Any], *, config: RunConfig | None = None) -> None:
        object.__setattr__(self, "name", check_id(name, "pipeline name"))
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "config", config)
        for node in self.nodes:
            find_node(node)
