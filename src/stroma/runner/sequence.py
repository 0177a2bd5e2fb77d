"""Nodes of a sequence before it runs: their positions and ids, and the ids that a config names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from stroma._utils.text import did_you_mean
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import FlowNode, Group, Node, find_node, marked_nodes
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.placed_calls import PlaceCaller, place_error
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = [
    "check_owners",
    "check_places",
    "find_nodes",
    "find_position",
    "ids_in",
    "leaves_in",
    "refuse_unknown_ids",
    "warn_of_unknown_ids",
]

#: Beginnings of the ids of groups, which have one only when they are made.
_GROUP_IDS: Final = ("parallel(", "map_over(")
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


def leaves_in(nodes: Sequence[Node | Group]) -> Iterator[Node]:
    """Yield every node, those inside groups too."""
    for node in nodes:
        if isinstance(node, Group):
            yield from leaves_in(node.children)
        else:
            yield node


def check_owners(nodes: Sequence[Node | Group], registry: ContractRegistry) -> None:
    """Raise ValueError for a node whose id was later assigned to another function with another contract."""
    decorated = registry.decorated
    if not decorated:
        return
    for node in leaves_in(nodes):
        contract, latest = node.contract, decorated.get(node.node_id)
        if latest is None or contract is None or latest.contract is contract:
            continue
        if latest.contract is registry.find(node.node_id) and latest.contract != contract:
            raise ValueError(
                f"{node.func!r} cannot run as node {node.node_id!r}: the id was later assigned to {latest.owner}, with another "
                "contract; rename one of them"
            )


def check_places(
    nodes: Sequence[Node | Group], registry: ContractRegistry, caller: PlaceCaller | None
) -> None:
    """Raise PlaceError for a node with a place that cannot be called in this process."""
    for node in leaves_in(nodes):
        contract = registry.find(node.node_id) or node.contract
        if contract is not None and contract.place is not None:
            error = place_error(caller, contract)
            if error is not None:
                raise error


def refuse_unknown_ids(
    config: RunConfig, nodes: Sequence[Node | Group], registry: ContractRegistry, pipeline: str
) -> None:
    """Raise ValueError for ids in a config that nobody knows, and for limits that no node has.

    Known are the ids of the pipeline, of the registry, and of all nodes of this process: other pipelines may
    share the config. With a flow in it a pipeline may call any node, and groups have no id before they are
    made: see :func:`warn_of_unknown_ids`.
    """
    if not _names_ids(config) or FlowNode in set(map(type, nodes)):
        return
    known = registry.known_ids.union(ids_in(nodes))
    mistakes = list(_mistakes_in(config, known, f"pipeline {pipeline!r}", but=_GROUP_IDS))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def warn_of_unknown_ids(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], result: ExecutionResult, warned: set[str]
) -> None:
    """Warn once of ids in a config that neither a node of this process nor any call of a complete run has.

    For groups, and for flows and agent frameworks, whose steps are known when they are called. A resumed run
    has not called all of them. ``warned`` has the warnings of earlier runs.
    """
    session = ctx.session
    if not _names_ids(ctx.config) or result.status is not RunStatus.COMPLETED:
        return
    if session.continued or session.finished is not None:
        return
    known = ctx.registry.known_ids.union(ids_in(nodes), (event.node_id for event in result.trace.walk()))
    for mistake in _mistakes_in(ctx.config, known, f"a run of {ctx.pipeline!r}"):
        if mistake not in warned:
            warned.add(mistake)
            ctx.run_logger.warning("%s", mistake)


def _names_ids(config: RunConfig) -> bool:
    # Not any() over _BY_NODE: two calls of it took 4 of the 48 us of a run of one node.
    by_node = config.node_policies or config.node_timeouts or config.contract_retries or config.node_limits
    return bool(by_node or config.limits)


def _mistakes_in(config: RunConfig, known: set[str], where: str, but: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a message for each id in a config that is not known, and for limits that none of the known ids has.

    ``but``: beginnings of ids that are not looked at.
    """
    named: dict[str, list[str]] = {}
    for field in _BY_NODE:
        for node_id in getattr(config, field):
            if node_id not in known and not node_id.startswith(but):
                named.setdefault(node_id, []).append(field)
    in_process = {node.node_id for node in marked_nodes()} if named or config.limits else set[str]()
    named = {node_id: fields for node_id, fields in named.items() if node_id not in in_process}
    for node_id, fields in named.items():
        fix = did_you_mean(node_id, known) or "correct the id, or register the contract of that node"
        names = " and ".join(filter(None, (", ".join(fields[:-1]), fields[-1])))
        verb = "names" if len(fields) == 1 else "name"
        yield f"{names} {verb} {node_id!r}, which no node of {where} has; {fix}"
    if config.limits and not any(map(config.limit_of, known | in_process)):
        limits = ", ".join(map(repr, config.limits))
        yield f"no node of {where} uses any of the limits ({limits}); assign them with node_limits={{node id: name}}"
