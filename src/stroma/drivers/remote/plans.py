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
from stroma.contracts.node import Group, Node, find_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import Kept
from stroma.drivers.remote.wire import CONTEXT, ClassName, NodeSpec, Plan, fitting
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.failures.classes import FailureClass
from stroma.failures.policy import FailurePolicy, PolicyMap
from stroma.runner.groups import as_state, map_over, parallel
from stroma.runner.runner import Pipeline
from stroma.runner.sequence import check_owners

__all__ = ["Known", "MissingNode", "freeze", "policies_of", "settings_of", "spec_of"]

#: Fields of RunConfig that are frozen with a run. What is no data (hooks, classifiers, redact, shared budgets, limits and
#: breakers) is the worker's own.
FROZEN = ("budget", "node_timeouts", "contract_retries", "model_fallbacks", "unknown_model", "tags")


class MissingNode(LookupError):
    """A worker was asked for a node that it does not have as the run knows it.

    Where: the log of the worker; ``result.failure`` of a PARTIAL run, once no worker that was asked had it.
    Cause: the worker runs other code than the run was begun with: the node was removed, renamed, or its contract changed.
    Mend: run a worker with the code that the message describes on this task queue, then resume the run.
    """


def spec_of(node: Node | Group, registry: ContractRegistry) -> NodeSpec:
    """A node as plain data. Raises ValueError for a map that only one process can run."""
    if isinstance(node, Node):
        contract = registry.find(node.node_id) or node.contract
        spec: NodeSpec = {"id": node.node_id, "kind": "node"}
        if contract is not None:
            spec["input"] = schema_of(contract.input_schema).fingerprint
            spec["output"] = schema_of(contract.output_schema).fingerprint
        return spec
    if node.merge is None or (node.each and node.items is None):
        raise ValueError(
            f"{node.node_id} takes its items from, or puts its outputs into, something that only one machine has; "
            "give it the name of a list field, and the name of a field as into="
        )
    made: NodeSpec = {
        "id": node.node_id,
        "kind": "map" if node.each else "parallel",
        "children": [spec_of(child, registry) for child in node.children],
        "limit": node.limit,
    }
    if node.each:
        made["over"], made["into"], made["collect"] = node.over, node.into, node.collect
    return made


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What of a config goes with the run."""
    settings: dict[str, Any] = config.model_dump(mode="json", include=set(FROZEN), exclude_defaults=True)
    return settings


def _policies(given: PolicyMap) -> dict[str, dict[str, Any]]:
    return {FailureClass(kind).value: policy.model_dump(mode="json") for kind, policy in given.items()}


def policies_of(data: dict[str, dict[str, Any]]) -> PolicyMap:
    return {FailureClass(kind): FailurePolicy(**policy) for kind, policy in data.items()}


def freeze(
    pipeline: str,
    nodes: Sequence[Node | Group],
    config: RunConfig,
    registry: ContractRegistry,
    *,
    run_id: str,
    execution: int = 1,
    options: dict[str, Any] | None = None,
) -> Plan:
    """All that moves a run, as plain data. Raises ValueError for what no other process could run."""
    return {
        "run_id": run_id,
        "execution": execution,
        "pipeline": pipeline,
        "nodes": [spec_of(node, registry) for node in nodes],
        "policies": _policies(config.policy_map),
        "node_policies": {node: _policies(given) for node, given in config.node_policies.items()},
        "settings": settings_of(config),
        "options": options or {},
    }


class Known:
    """The nodes of a pipeline as this process has them, and the classes of states that are named by them."""

    def __init__(self, pipeline: str, nodes: Sequence[Node | Group], registry: ContractRegistry) -> None:
        check_owners(nodes, registry)
        self.pipeline = pipeline
        self.nodes = nodes
        self.registry = registry
        self._by_id: dict[str, list[Node | Group]] = {}
        for node in _all(nodes):
            self._by_id.setdefault(node.node_id, []).append(node)

    @classmethod
    def of(cls, pipeline: Pipeline, registry: ContractRegistry) -> Known:
        return cls(pipeline.name, [find_node(node) for node in pipeline.nodes], registry)

    def contract(self, node: Node) -> NodeContract[Any, Any] | None:
        return self.registry.find(node.node_id) or node.contract

    def find(self, spec: NodeSpec, path: Sequence[int] = ()) -> Node | Group:
        """The node of a plan, at the same place if it stands there, else wherever it is. Raises MissingNode."""
        candidates = [
            found for found in [self._at(path)] if found is not None and found.node_id == spec["id"]
        ]
        candidates += self._by_id.get(spec["id"], [])
        for node in candidates:
            if self._differs(node, spec) is None:
                return node
        if spec["kind"] != "node":
            # A group is what stands in it: it need not stand in this process's pipeline as a whole.
            children = [self.find(child) for child in spec["children"]]
            if spec["kind"] == "parallel":
                return parallel(*children, max_concurrency=spec["limit"])
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
                f"{self._differs(candidates[0], spec)} contract than the run was begun with; run a worker with the code of "
                "that time beside it until such runs have ended"
            )
        have = ", ".join(map(repr, self._by_id)) or "none"
        raise MissingNode(
            f"this worker lacks node {spec['id']!r} of pipeline {self.pipeline!r}; it has {have}: deploy the code with it "
            "on this task queue"
        )

    def _at(self, path: Sequence[int]) -> Node | Group | None:
        nodes: Sequence[Node | Group] = self.nodes
        found: Node | Group | None = None
        for index in path:
            if index >= len(nodes):
                return None
            found = nodes[index]
            nodes = found.children if isinstance(found, Group) else ()
        return found

    def _differs(self, node: Node | Group, spec: NodeSpec) -> str | None:
        """What of a node is not as the plan has it."""
        own = None
        try:
            own = spec_of(node, self.registry)
        except ValueError:
            return "kind"
        for what in ("kind", "input", "output", "children"):
            if own.get(what) != spec.get(what):
                return what
        return None

    def class_of(self, name: ClassName) -> type[BaseModel] | None:
        """The class that a name stands for; None for one that this process cannot know."""
        kind = name[0]
        try:
            if kind == "class":
                return resolve_schema(name[1])
            if kind in ("in", "out"):
                return self._of_node(kind, name[1], name[2] if len(name) > 2 else None)
            if kind == "group":
                group, base = self.find(name[1]), self.class_of(name[2])
                if isinstance(group, Group) and base is not None:
                    return group.joined(base, [self._output(child, base) for child in group.children])
        except (LookupError, TypeError, StopIteration):
            pass
        return None

    def _of_node(self, kind: str, node_id: str, fingerprint: str | None) -> type[BaseModel] | None:
        """The class that a node takes or gives: of those of one id, the one whose contract has that hash."""
        found: list[type[BaseModel]] = []
        for node in self._by_id.get(node_id, ()):
            contract = self.contract(node) if isinstance(node, Node) else None
            if contract is not None:
                found.append(contract.input_schema if kind == "in" else contract.output_schema)
            elif kind == "out":
                found.append(Kept)
        exact = [cls for cls in found if schema_of(cls).fingerprint == fingerprint]
        return next(iter(exact + found), None)

    def takes(self, node_id: str, position: int, branch: str) -> ClassName | None:
        """The name of the class that the input of a node is of; None for a group, or without a contract."""
        nodes, at = self.nodes, None
        for index in [] if is_called(branch) else [position, *child_indexes(branch)]:
            if isinstance(at, Group):
                nodes, index = at.children, 0 if at.each else index
            at = nodes[index] if index < len(nodes) else None
        if at is None or at.node_id != node_id:  # It stands elsewhere by now.
            at = next(iter(self._by_id.get(node_id, ())), None)
        contract = self.contract(at) if isinstance(at, Node) else None
        return None if contract is None else ["in", node_id, schema_of(contract.input_schema).fingerprint]

    def _output(self, node: Node | Group, base: type[BaseModel]) -> type[BaseModel]:
        if isinstance(node, Group):
            return node.joined(base, [self._output(child, base) for child in node.children])
        contract = self.contract(node)
        return Kept if contract is None else contract.output_schema

    def decode(self, text: str, name: ClassName) -> BaseModel:
        """The state of a text. One of an unknown class is an open model of its fields."""
        data = text.encode()
        cls = self.class_of(name)
        if cls is not None:
            return schema_of(cls).mark_exclusive(schema_of(cls).decode(data))
        return as_state(schema_of(Kept).decode_raw(data))


def _all(nodes: Iterable[Node | Group]) -> Iterable[Node | Group]:
    for node in nodes:
        yield node
        if isinstance(node, Group):
            yield from _all(node.children)


def plain_context(context: dict[str, Any]) -> dict[str, Any]:
    """A context dict that can be sent. Raises TypeError that names what cannot be."""
    for key, value in context.items():
        if not isinstance(key, str) or not is_json(value):
            raise TypeError(
                f"context[{key!r}] is {type(value).__name__}, which cannot be sent to a worker; give JSON values of at most "
                f"{CONTEXT} bytes, and let the worker's own config hold clients and other objects"
            )
    fits = fitting({}, context)
    for key in context:
        if key not in fits:
            raise TypeError(
                f"context has no room for {key!r}: all values together are too large to be sent with every attempt; keep "
                "them in a store of your own, and give their names"
            )
    return dict(context)


def is_json(value: Any) -> bool:
    """Whether JSON has a value exactly as it is, and it is small enough to go with every request."""
    try:
        text = json.dumps(value, allow_nan=False)
        return len(text) <= CONTEXT and bool(json.loads(text) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _differ(before: Any, now: Any) -> bool:
    """Whether a value was changed. Some cannot be compared: arrays, and tables of data."""
    if before is now:
        return False
    try:
        return bool(before != now)
    except Exception:
        return True


def context_of(ctx: ReliabilityContext, before: dict[str, Any]) -> tuple[list[Any] | None, list[str]]:
    """What nodes changed in the context dict: [what was set, what was deleted], and the keys that cannot be sent."""
    now = ctx.context
    made = {key: value for key, value in now.items() if key not in before or _differ(before[key], value)}
    gone = [key for key in before if key not in now]
    unsaid = [str(key) for key, value in made.items() if not (isinstance(key, str) and is_json(value))]
    said = {key: value for key, value in made.items() if str(key) not in unsaid}
    fits = fitting(
        {key: value for key, value in before.items() if isinstance(key, str) and is_json(value)}, said
    )
    unsaid += [key for key in said if key not in fits]
    said = fits
    return ([said, gone] if said or gone else None), unsaid
