"""A pipeline as a frozen plan, and a plan's nodes as those that a process has."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import resolve_schema
from stroma.checkpoint.identity import child_indexes, is_called
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.drivers.remote.flow_nodes import nodes_of_flow
from stroma.drivers.remote.wire import CONTEXT, ClassName, NodeSpec, Plan, fit_context
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.failures.classes import FailureClass
from stroma.failures.policy import FailurePolicy, PolicyMap
from stroma.runner.groups import SequenceGroup, map_over, parallel
from stroma.runner.pipeline import Pipeline
from stroma.runner.sequence import check_owners
from stroma.runner.states import as_state

__all__ = ["KnownNodes", "MissingNode", "freeze", "policies_of", "settings_of", "spec_of"]

#: Fields of RunConfig that are frozen with a run. What is no data (hooks, classifiers, redact, shared budgets, limits and
#: breakers) is the worker's own.
FROZEN = (
    "budget",
    "node_timeouts",
    "contract_retries",
    "model_fallbacks",
    "unknown_model",
    "tags",
    "conversation",
    "user",
)


class MissingNode(LookupError):
    """A worker does not have a node as the run knows it.

    Where: the log of the worker; ``result.failure`` of a PARTIAL run, once no worker that was asked had it.
    Cause: the worker runs other code than the run was started with: the node was removed, renamed, or its contract changed.
    Fix: run a worker with the code that the message describes on this task queue, then resume the run.
    """


def spec_of(node: Node | Group, registry: ContractRegistry) -> NodeSpec:
    """Return a node as plain data. Raises ValueError for a map that only one process can run."""
    if isinstance(node, Node):
        contract = registry.find(node.node_id) or node.contract
        spec: NodeSpec = {"id": node.node_id, "kind": "flow" if isinstance(node, FlowNode) else "node"}
        if contract is not None:
            if contract.effect:
                spec["effect"] = True
            spec["input"] = schema_of(contract.input_schema).fingerprint
            spec["output"] = schema_of(contract.output_schema).fingerprint
        return spec
    if node.is_map and (node.has_external_items or not node.output_field):
        raise ValueError(
            f"{node.node_id} takes its items from, or puts its outputs into, something that only one machine has; "
            "give it the name of a list field, and the name of a field as into="
        )
    spec = {
        "id": node.node_id,
        "kind": "map" if node.is_map else "sequence" if node.is_sequence else "parallel",
        "children": [spec_of(child, registry) for child in node.children],
        "limit": node.max_concurrency,
    }
    if node.is_map:
        spec["over"], spec["into"] = node.items_field, node.output_field
        spec["collect"] = node.collects_failures
    return spec


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the fields of a config that are frozen with the run."""
    settings: dict[str, Any] = config.model_dump(mode="json", include=set(FROZEN), exclude_defaults=True)
    return settings


def _policies(policies: PolicyMap) -> dict[str, dict[str, Any]]:
    return {FailureClass(kind).value: policy.model_dump(mode="json") for kind, policy in policies.items()}


def policies_of(data: dict[str, dict[str, Any]]) -> PolicyMap:
    """Decode the retry policies of a plan."""
    return {FailureClass(kind): FailurePolicy(**policy) for kind, policy in data.items()}


def freeze(
    pipeline: str,
    nodes: Sequence[Node | Group],
    config: RunConfig,
    registry: ContractRegistry,
    *,
    run_id: str,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Return the plan of the first execution of a run as plain data. Raises ValueError for nodes that no other process could run."""
    for node in nodes:
        if isinstance(node, FlowNode):  # Refused here, before anything is called.
            for called in nodes_of_flow(node):
                spec_of(called, registry)
    return {
        "run_id": run_id,
        "execution": 1,
        "pipeline": pipeline,
        "nodes": [spec_of(node, registry) for node in nodes],
        "policies": _policies(config.policy_map),
        "node_policies": {node: _policies(policies) for node, policies in config.node_policies.items()},
        "settings": settings_of(config),
        "options": options or {},
    }


class KnownNodes:
    """The nodes of a pipeline in this process, and the classes that their states refer to."""

    def __init__(self, pipeline: str, nodes: Sequence[Node | Group], registry: ContractRegistry) -> None:
        check_owners(nodes, registry)
        self.pipeline = pipeline
        self.nodes = nodes
        self.registry = registry
        self._by_id: dict[str, list[Node | Group]] = {}
        for node in _all(nodes):
            self.add(node)

    @classmethod
    def of(cls, pipeline: Pipeline, registry: ContractRegistry) -> KnownNodes:
        return cls(pipeline.name, [find_node(node) for node in pipeline.nodes], registry)

    @property
    def has_flow(self) -> bool:
        """True if a node of the sequence is a flow."""
        return any(isinstance(node, FlowNode) for node in self.nodes)

    def add(self, node: Node | Group) -> None:
        """Add a node that a flow calls, with the nodes inside it."""
        for one in _all([node]):
            known = self._by_id.setdefault(one.node_id, [])
            if all(one is not other for other in known):
                known.append(one)

    def contract(self, node: Node) -> NodeContract[Any, Any] | None:
        return self.registry.find(node.node_id) or node.contract

    def find(self, spec: NodeSpec, path: Sequence[int] = ()) -> Node | Group:
        """Return the node of a plan, preferably at the same place. Raises MissingNode."""
        candidates = [node for node in [self._at(path)] if node is not None and node.node_id == spec["id"]]
        candidates += self._by_id.get(spec["id"], [])
        for node in candidates:
            if self._differs(node, spec) is None:
                return node
        if spec["kind"] in ("parallel", "sequence", "map"):
            # Built from its children: this process's pipeline may have the group in another form.
            children = [self.find(child) for child in spec["children"]]
            if spec["kind"] == "parallel":
                return parallel(*children, max_concurrency=spec["limit"])
            if spec["kind"] == "sequence":
                return SequenceGroup(tuple(children))
            return map_over(
                spec["over"],
                children[0],
                into=spec["into"],
                max_concurrency=spec["limit"],
                on_item_failure="collect" if spec["collect"] else "stop",
            )
        if candidates:
            raise MissingNode(
                f"this worker has node {spec['id']!r} of pipeline {self.pipeline!r} with another "
                f"{self._differs(candidates[0], spec)} contract than the run was started with; keep a worker with the earlier "
                "code until such runs have ended"
            )
        have = ", ".join(map(repr, list(self._by_id))) or "none"
        raise MissingNode(
            f"this worker lacks node {spec['id']!r} of pipeline {self.pipeline!r}; it has {have}: deploy the code with it "
            "on this task queue, and let a flow refer to its nodes by name"
        )

    def _at(self, path: Sequence[int]) -> Node | Group | None:
        nodes: Sequence[Node | Group] = self.nodes
        node: Node | Group | None = None
        for index in path:
            if index >= len(nodes):
                return None
            node = nodes[index]
            nodes = node.children if isinstance(node, Group) else ()
        return node

    def _differs(self, node: Node | Group, spec: NodeSpec) -> str | None:
        """Return the difference between a node and its plan, or None."""
        own = None
        try:
            own = spec_of(node, self.registry)
        except ValueError:
            return "kind"
        for what in ("kind", "input", "output", "effect", "children"):
            if own.get(what) != spec.get(what):
                return what
        return None

    def class_of(self, name: ClassName) -> type[BaseModel] | None:
        """Return the class of a name; None for one that this process does not have."""
        kind = name[0]
        try:
            if kind == "class":
                return resolve_schema(name[1])
            if kind in ("in", "out"):
                return self._of_node(kind, name[1], name[2] if len(name) > 2 else None)
            if kind == "group":
                group, base = self.find(name[1]), self.class_of(name[2])
                if isinstance(group, Group) and base is not None:
                    return self._output(group, base)
        except (LookupError, TypeError, StopIteration):
            pass
        return None

    def _of_node(self, kind: str, node_id: str, fingerprint: str | None) -> type[BaseModel] | None:
        """Return the input or output class of a node; of several with one id, that with the fingerprint."""
        classes: list[type[BaseModel]] = []
        for node in self._by_id.get(node_id, ()):
            contract = self.contract(node) if isinstance(node, Node) else None
            if contract is not None:
                classes.append(contract.input_schema if kind == "in" else contract.output_schema)
            elif kind == "out":
                classes.append(UntypedState)
        exact = [cls for cls in classes if schema_of(cls).fingerprint == fingerprint]
        return next(iter(exact + classes), None)

    def takes(self, node_id: str, position: int, branch: str) -> ClassName | None:
        """Return the class name of the input of a node; None for a group, or without a contract."""
        nodes, at = self.nodes, None
        for index in [] if is_called(branch) else [position, *child_indexes(branch)]:
            if isinstance(at, Group):
                nodes, index = at.children, 0 if at.is_map else index
            at = nodes[index] if index < len(nodes) else None
        if at is None or at.node_id != node_id:  # The node has moved.
            at = next(iter(self._by_id.get(node_id, ())), None)
        contract = self.contract(at) if isinstance(at, Node) else None
        return None if contract is None else ["in", node_id, schema_of(contract.input_schema).fingerprint]

    def _output(self, node: Node | Group, base: type[BaseModel]) -> type[BaseModel]:
        if isinstance(node, Group):
            return node.output_class(base, node.output_classes(base, self._output))
        contract = self.contract(node)
        return UntypedState if contract is None else contract.output_schema

    def decode(self, text: str, name: ClassName) -> BaseModel:
        """Return the state of a text; without its class, an open model of its fields."""
        data = text.encode()
        cls = self.class_of(name)
        if cls is not None:
            return schema_of(cls).mark_exclusive(schema_of(cls).decode(data))
        return as_state(schema_of(UntypedState).decode_raw(data))


def _all(nodes: Iterable[Node | Group]) -> Iterable[Node | Group]:
    for node in nodes:
        yield node
        if isinstance(node, Group):
            yield from _all(node.children)
        elif isinstance(node, FlowNode):
            yield from _all(nodes_of_flow(node))


def plain_context(context: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a context dict. Raises TypeError that names a value that cannot be sent."""
    for key, value in context.items():
        if not isinstance(key, str) or not is_json(value):
            raise TypeError(
                f"context[{key!r}] is {type(value).__name__}, which cannot be sent to a worker; pass JSON values of at most "
                f"{CONTEXT} bytes, and put clients and other objects into the worker's own config"
            )
    fits = fit_context({}, context)
    for key in context:
        if key not in fits:
            raise TypeError(
                f"context has no room for {key!r}: all values together are too large to be sent with every attempt; save "
                "them in another store, and pass their names"
            )
    return dict(context)


def is_json(value: Any) -> bool:
    """Return True if JSON represents a value exactly, and it is small enough for every request."""
    try:
        text = json.dumps(value, allow_nan=False)
        return len(text) <= CONTEXT and bool(json.loads(text) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _differ(before: Any, now: Any) -> bool:
    """Return True if a value was changed. Some cannot be compared: arrays, and tables of data."""
    if before is now:
        return False
    try:
        return bool(before != now)
    except Exception:
        return True


def context_of(ctx: ReliabilityContext, before: dict[str, Any]) -> tuple[list[Any] | None, list[str]]:
    """Return the changes of the context dict, [values set, keys deleted], and the keys that cannot be sent."""
    now = ctx.context
    changed = {key: value for key, value in now.items() if key not in before or _differ(before[key], value)}
    deleted = [key for key in before if key not in now]
    unsendable = [str(key) for key, value in changed.items() if not (isinstance(key, str) and is_json(value))]
    sendable = {key: value for key, value in changed.items() if str(key) not in unsendable}
    fits = fit_context(
        {key: value for key, value in before.items() if isinstance(key, str) and is_json(value)}, sendable
    )
    unsendable += [key for key in sendable if key not in fits]
    sendable = fits
    return ([sendable, deleted] if sendable or deleted else None), unsendable
