"""Finding the functions that were marked as nodes, in whatever a framework has wrapped them."""

from __future__ import annotations

import functools
from typing import Any

from stroma.contracts.contract import ContractRegistry, NodeContract

__all__ = ["marked", "marks_of"]


def marked(*candidates: Any) -> Any:
    """Return the first function with a marker, or None; partials and wrappers are unwrapped."""
    waiting = list(candidates)
    for func in waiting:
        if getattr(func, "_stroma_node_id", None) is not None:
            return func
        if isinstance(func, functools.partial):
            waiting.extend((func.func, *func.args))
    return None


def marks_of(func: Any, registry: ContractRegistry) -> tuple[str, NodeContract[Any, Any] | None]:
    """Return the id of a marked function and its contract: the registry's, else its own."""
    node_id: str = func._stroma_node_id
    return node_id, registry.find(node_id) or func._stroma_contract
