"""Findings about effects: one that cannot be looked up, and one inside a group that is retried."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from stroma.contracts.checks.finding import Finding
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node

__all__ = ["find_effects"]


def find_effects(
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    retried: Collection[str],
    prefix: str = "",
    group: str | None = None,
) -> Iterator[Finding]:
    """Yield the warnings about effects. ``retried``: ids of nodes with retries of their own; ``group``: of one around."""
    for index, node in enumerate(nodes):
        at = f"{prefix}{index}"
        if isinstance(node, Group):
            inner = node.node_id if node.node_id in retried else group
            yield from find_effects(node.children, registry, retried, f"{at}.", inner)
            continue
        contract = registry.find(node.node_id) or node.contract
        if contract is None or not contract.effect:
            continue
        if contract.reconcile is None:
            yield _finding(
                node,
                at,
                f"effect {node.node_id!r} has no reconcile: a person decides about each call that may have happened",
                "pass reconcile=, a function of (state, idempotency_key) that looks the call up",
            )
        if group is not None:
            yield _finding(
                node,
                at,
                f"effect {node.node_id!r} is inside {group!r}, which is retried as a whole",
                f"retry its children in place of {group!r}, or move the effect behind it",
            )


def _finding(node: Node, at: str, message: str, fix: str) -> Finding:
    return Finding("warning", "effect", node.node_id, node.node_id, at, at, "", "", "", message, fix)
