"""The flow of values through a pipeline, derived from the contracts alone: nothing runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from stroma._utils.access import error_text
from stroma.contracts.checks.records import Record, record_of_class
from stroma.contracts.checks.types import Finding, Giver, Side
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import Group, Node, contract_of_node, first_in
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState

Contract = NodeContract[Any, Any]


class _Anything(BaseModel):
    """A state of which nothing is known."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True, slots=True)
class FlowState:
    """The value between two nodes, as far as the contracts describe it.

    Attributes:
        model: its class; None if nothing is known of it, or if it is an ``item`` alone.
        giver: who made it last.
        origins: who gave each of its fields, by name.
        apart: models inside come as dicts: it is an item of a list.
        loose: a node without a contract had a part in it, so that it may hold more than the class says.
        item: the type of the items of a list, for the node that ``map_over`` runs.
        bare: the item goes through a group.
        list_at: the field that the items stand in.
        earlier: the outputs before this one, the last first, for telling who dropped a field.
    """

    model: type[BaseModel] | None
    giver: Giver
    origins: Mapping[str, Giver] = field(default_factory=dict)
    apart: bool = False
    loose: bool = False
    item: Side | None = None
    bare: bool = False
    list_at: str = ""
    earlier: tuple[tuple[Giver, type[BaseModel]], ...] = ()


@dataclass(frozen=True, slots=True)
class Crossing:
    """A state on its way into a node or group. ``contract``: None without one, and for groups."""

    node: Node | Group
    to: Giver
    state: FlowState
    contract: Contract | None
    output: type[BaseModel] | None


#: What is checked, and what is found on the way.
Step = Crossing | Finding


def flow_of(
    nodes: Sequence[Node | Group], registry: ContractRegistry, initial: type[BaseModel] | None = None
) -> Iterator[Step]:
    """Yield each crossing, and each finding that needs no comparison; a group before its children."""
    start = Giver("input", "input")
    if initial is not None and (error := _unreadable(initial)):
        yield _broken(start, start, initial, error)
        initial = None
    state = FlowState(initial, start, _origins(initial, start))
    yield from _Walk(registry).in_turn(nodes, state, "")


def _unreadable(model: Any) -> str:
    """Return why a class cannot be read; "" if it can."""
    try:
        schema_of(model)
    except Exception as error:  # Whatever pydantic, or code of the user's, raises.
        return error_text(error).partition("\n")[0]
    return ""


def _broken(by: Giver, to: Giver, model: Any, error: str) -> Finding:
    """Return the finding about a class that cannot be read; nothing else is claimed of it."""
    is_output = by == to
    name = str(getattr(model, "__name__", model))
    return Finding.between(
        by,
        to,
        kind="broken",
        types=(name, "") if is_output else ("", name),
        message=f"the {'output' if is_output else 'input'} of {to.node_id!r} cannot be read: {error}",
        fix="correct its class; if it names classes that are defined later, call model_rebuild() after them",
    )


def _collision(first: Giver, second: Giver, name: str, types: tuple[str, str]) -> Finding:
    """Return the finding about two outputs with the same field of a merged state."""
    one, two = repr(first.node_id), repr(second.node_id)
    return Finding.between(
        first,
        second,
        kind="collision",
        path=name,
        types=types,
        message=f"{one} and {two} both give {name}; that of {two} wins, since it comes later",
        fix="remove it from one of the outputs, or use two names; if the later one should win, leave it so",
    )


def _origins(model: type[BaseModel] | None, giver: Giver) -> dict[str, Giver]:
    return {} if model is None else dict.fromkeys(record_of_class(model).fields, giver)


class _Walk:
    """Goes through nodes; what each of them makes of a state is what its generator returns."""

    def __init__(self, registry: ContractRegistry) -> None:
        self._registry = registry

    def through(self, node: Node | Group, state: FlowState, at: str) -> Generator[Step, None, FlowState]:
        giver = Giver(node.node_id, at)
        if isinstance(node, Node):
            contract = contract_of_node(node, self._registry)
            output = None
            if contract is not None:
                output = contract.output_schema
                if error := _unreadable(output):
                    yield _broken(giver, giver, output, error)
                    output = None
                if error := _unreadable(contract.input_schema):
                    yield _broken(state.giver, giver, contract.input_schema, error)
                    contract = None
            yield Crossing(node, giver, state, contract, output)
            return FlowState(output, giver, _origins(output, giver), loose=output is None)
        if node.is_map:
            return (yield from self._each(node, state, giver))
        if node.is_sequence:
            yield Crossing(node, giver, state, None, None)
            return (yield from self.in_turn(node.children, state, f"{at}."))
        return (yield from self._side_by_side(node, state, giver))

    def in_turn(
        self, nodes: Sequence[Node | Group], state: FlowState, prefix: str
    ) -> Generator[Step, None, FlowState]:
        for index, node in enumerate(nodes):
            passed = yield from self.through(node, state, f"{prefix}{index}")
            earlier = state.earlier if state.model is None else ((state.giver, state.model), *state.earlier)
            state = FlowState(passed.model, passed.giver, passed.origins, loose=passed.loose, earlier=earlier)
        return state

    def _side_by_side(self, node: Group, state: FlowState, giver: Giver) -> Generator[Step, None, FlowState]:
        yield Crossing(node, giver, state, None, None)
        outputs: list[FlowState] = []
        for index, child in enumerate(node.children):
            outputs.append((yield from self.through(child, state, f"{giver.at}.{index}")))
        origins: dict[str, Giver] = {}
        sides: dict[str, Side] = {}
        for one in outputs:
            if one.model is None:
                origins = {}  # It may have given any of them anew.
                sides = {}
                continue
            for name, side in record_of_class(one.model).fields.items():
                by = one.origins.get(name, one.giver)
                if by == state.origins.get(name):  # As a map received it.
                    origins.setdefault(name, by)
                    continue
                if name in sides:
                    yield _collision(origins[name], by, name, (str(sides[name]), str(side)))
                origins[name], sides[name] = by, side
        model = node.output_class(_Anything, [one.model or UntypedState for one in outputs])
        return FlowState(model, giver, origins, loose=any(one.loose for one in outputs))

    def _each(self, node: Group, state: FlowState, giver: Giver) -> Generator[Step, None, FlowState]:
        yield Crossing(node, giver, state, None, None)
        record = Record("", {}) if state.model is None else record_of_class(state.model)
        fields = record.fields
        origin = giver if node.has_external_items else state.origins.get(node.items_field, state.giver)
        over = None if node.has_external_items else fields.get(node.items_field, record.others)
        item = None if over is None else items_of(over)
        model = None
        if item is not None:
            inner = item.resolved()
            model = inner.node["cls"] if inner.kind == "model" and not inner.node.get("root_model") else None
        # Into a node: an item of any type. Into a group: what its own children are given, if that is a
        # record.
        child = node.children[0]
        bare = isinstance(first_in(child), Group)
        loose = state.loose or node.has_external_items
        item_state = FlowState(
            model, origin, _origins(model, origin), True, loose, item, bare, node.items_field
        )
        output = yield from self.through(child, item_state, f"{giver.at}.0")
        if node.output_field in fields and node.output_field != node.items_field:
            item_name = "Any" if output.model is None else output.model.__name__
            types = str(fields[node.output_field]), f"list[{item_name}]"
            by = state.origins.get(node.output_field, state.giver)
            yield _collision(by, output.giver, node.output_field, types)
        if not node.output_field:  # What was given goes on as it is.
            return FlowState(state.model, giver, state.origins, loose=state.loose)
        joined = node.output_class(state.model or _Anything, [output.model or UntypedState])
        origins = {**state.origins, node.output_field: output.giver}
        # What the items are made by is no concern of the other fields.
        return FlowState(joined, giver, origins, loose=state.loose or state.model is None)


def items_of(side: Side) -> Side | None:
    """Return the item type of a list or tuple, for ``map_over``; None for any other type."""
    side = side.unwrapped()
    if side.kind == "list":
        return side.part("items_schema")
    if side.kind == "tuple":
        items = side.node["items_schema"]
        return side.to(items[0] if len(items) == 1 else {"type": "union", "choices": items})
    return None
