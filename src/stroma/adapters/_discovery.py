"""Finding the functions that were marked as nodes, in whatever a framework has wrapped them."""

from __future__ import annotations

import functools
from typing import Any

from stroma.contracts.contract import ContractRegistry, NodeContract

__all__ = ["marked", "marks_of"]


def marked(*candidates: Any) -> Any:
    """The first function that bears the marker, or None; partials are looked through, and what they hold."""
    waiting = list(candidates)
    for func in waiting:
        if getattr(func, "_stroma_node_id", None) is not None:
            return func
        if isinstance(func, functools.partial):
            waiting.extend((func.func, *func.args))
    return None


def marks_of(func: Any, registry: ContractRegistry) -> tuple[str, NodeContract[Any, Any] | None]:
    """The id of a marked function, and the contract that it has: the registry's, else its own."""
    node_id: str = func._stroma_node_id
    return node_id, registry.find(node_id) or func._stroma_contract
