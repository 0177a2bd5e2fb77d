"""Comparison of a recorded run with the nodes of today: the changes that prevent a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stroma.checkpoint import CheckpointManager, Committed, InMemoryStore, PipelineChanged
from stroma.checkpoint.identity import child_indexes, is_called
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import describe_error, schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.restore import check_place, read_output

__all__ = ["Incompatibility", "changes_since"]


@dataclass(frozen=True, slots=True)
class Incompatibility:
    """A reason that an output cannot be restored. ``at``: its position, and place in groups: "2.0"."""

    at: str
    node_id: str
    message: str


def changes_since(
    run_id: str,
    commits: Mapping[tuple[int, str], Committed],
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    config: RunConfig | None = None,
) -> list[Incompatibility]:
    """Return the changes that prevent a resume of committed outputs by (position, branch).

    Decides as a resume does. Nothing is written, and no user code is called but validators and upcasts.
    """
    config = (config or RunConfig()).model_copy(update={"run_id": run_id})
    ctx = ReliabilityContext.for_run(config, registry, CheckpointManager(InMemoryStore()))
    changes: list[Incompatibility] = []
    for (position, branch), committed in sorted(commits.items()):
        at = f"{position}.{branch}" if branch else str(position)
        try:
            check_place(ctx, nodes, committed, position, branch)
            _read(ctx, nodes, committed, position, branch)
        except Exception as error:  # A validator or an upcast may raise anything.
            message = str(error)
            if not isinstance(error, PipelineChanged):
                message = (
                    f"the output of node {committed.node_id!r} cannot be read back: {type(error).__name__}: "
                    f"{describe_error(error)[0]}; restore its schema, add an upcast to the contract, or "
                    "resume from there to run it again"
                )
            changes.append(Incompatibility(at, committed.node_id, message))
    return changes


def _read(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], committed: Committed, position: int, branch: str
) -> None:
    """Read an output back as a resume does; raises what prevents it. That of a group is merged."""
    if position >= len(nodes):
        return  # Changes are allowed.
    node = nodes[position]
    if is_called(branch):
        return  # The schema of a called step is known when it is called.
    for index in child_indexes(branch):
        if not isinstance(node, Group) or (not node.is_map and index >= len(node.children)):
            return
        node = node.children[0 if node.is_map else index]
    if isinstance(node, Group) or committed.is_failed_item:
        return
    contract = ctx.contract_of(node)
    schema = schema_of(UntypedState if contract is None else contract.output_schema)
    changed = committed.contract.partition(":")[0] != schema.fingerprint
    read_output(schema, committed, contract.upcast if changed and contract is not None else None)
