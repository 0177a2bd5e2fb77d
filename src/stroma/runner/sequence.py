"""Nodes of a sequence before it runs: their positions and ids, and the ids that a config names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from stroma._utils.text import did_you_mean
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext

__all__ = [
    "check_owners",
    "find_nodes",
    "find_position",
    "ids_in",
    "warn_of_unknown_ids",
    "warn_of_unused_limits",
]

#: The fields of a config that are keyed by node id.
_BY_NODE: Final = ("node_policies", "node_timeouts", "contract_retries", "node_limits")


def find_nodes(nodes: Iterable[Any]) -> list[Node | Group]:
    """Return the record of each node of a sequence. Raises TypeError for anything that is not a node."""
    if type(nodes) is not list and (isinstance(nodes, Group) or not isinstance(nodes, Iterable)):
        find_node(nodes)  # Raises, with the fix, for an object that is not a node at all.
        raise TypeError(f"run() takes a sequence of nodes; put {nodes!r} in a list")
    return [find_node(node) for node in nodes]


def find_position(nodes: Sequence[Node | Group], node_id: str, parameter: str) -> int:
    """Return the first position with a node id. Raises ValueError, naming the parameter, if there is none."""
    for position, node in enumerate(nodes):
        if node.node_id == node_id:
            return position
    known = ", ".join(repr(node.node_id) for node in nodes) or "none"
    raise ValueError(f"{parameter}={node_id!r} is not a node of this pipeline; its nodes are {known}")


def ids_in(nodes: Sequence[Node | Group]) -> Iterator[str]:
    """Yield the id of every node and group, those inside groups too."""
    for node in nodes:
        yield node.node_id
        if isinstance(node, Group):
            yield from ids_in(node.children)


def check_owners(nodes: Sequence[Node | Group], registry: ContractRegistry) -> None:
    """Raise ValueError for a node whose id was later assigned to another function with another contract."""
    decorated = registry.decorated
    if not decorated:
        return
    for node in nodes:
        if isinstance(node, Group):
            check_owners(node.children, registry)
            continue
        contract, latest = node.contract, decorated.get(node.node_id)
        if latest is None or contract is None or latest.contract is contract:
            continue
        if latest.contract is registry.find(node.node_id) and latest.contract != contract:
            raise ValueError(
                f"{node.func!r} cannot run as node {node.node_id!r}: the id was later assigned to {latest.owner}, with another "
                "contract; rename one of them"
            )


def warn_of_unknown_ids(
    config: RunConfig,
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    pipeline: str,
    *,
    warn: Callable[[str], None],
    warned: set[str],
) -> None:
    """Warn of each id that a config names and no node has, once; ``warned`` has those of earlier runs."""
    if not any(getattr(config, field) for field in _BY_NODE):
        return
    if FlowNode in set(map(type, nodes)):  # Its steps are known when they are called.
        return
    known = set(ids_in(nodes))
    named: dict[str, list[str]] = {}
    for field in _BY_NODE:
        for node_id in getattr(config, field):
            if node_id not in known and registry.find(node_id) is None and node_id not in warned:
                named.setdefault(node_id, []).append(field)
    for node_id, options in named.items():
        warned.add(node_id)
        warn(_unknown_id_warning(node_id, options, pipeline, known | registry.ids))


def warn_of_unused_limits(ctx: ReliabilityContext, nodes: Sequence[Node | Group]) -> None:
    """Warn of limits in the config that no node of a run uses."""
    config = ctx.config
    if FlowNode in set(map(type, nodes)):  # Whose steps are known when they are called.
        return
    if config.limits and not any(config.limit_of(node_id) for node_id in ids_in(nodes)):
        ctx.run_logger.warning(
            "no node of pipeline %r uses any of the limits (%s); assign them with node_limits={node id: name}",
            ctx.pipeline, ", ".join(map(repr, config.limits)),
        )  # fmt: skip


def _unknown_id_warning(node_id: str, options: Sequence[str], pipeline: str, known: set[str]) -> str:
    fix = did_you_mean(node_id, known) or "correct the id"
    name = " and ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    verb = "names" if len(options) == 1 else "name"
    return f"{name} {verb} {node_id!r}, which no node of pipeline {pipeline!r} has; {fix}"
