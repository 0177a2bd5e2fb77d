"""Groups: several nodes side by side, and one node, or several in turn, over many items."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, Literal, cast

from pydantic import BaseModel

from stroma.checkpoint import inside_of
from stroma.checkpoint.identity import sequence_id
from stroma.contracts.copying import isolate
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.loop import execute, execute_in_turn
from stroma.engine.merged_models import merged_model, own_fields_of, with_list
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.engine.tasks import gather
from stroma.runner.items import (
    FileSource,
    ItemsFunction,
    IterableSource,
    Journal,
    JsonLines,
    LinesFile,
    ListSource,
    Source,
)
from stroma.runner.map import DEFAULT_CONCURRENCY, ChildEnds, MapItem, MapRun, item_output
from stroma.runner.pipeline import check_bound


def parallel(*nodes: Any, max_concurrency: int | None = None) -> Group:
    """Run nodes side by side on copies of one state; their outputs merge in argument order, later ones win.

    A map adds its outputs only: what it passes on unchanged replaces no output of another child. Each child
    is a full node: contracts, timeout, retries, usage, hooks, a record of its own. The first that stops for
    good cancels its siblings, and the group fails with that child's exception; an effect that is being called
    runs to its end first. Groups nest.

    Args:
        nodes: the children: nodes or groups.
        max_concurrency: maximum number of children that run at the same time; None: no maximum.

    Raises ValueError without children, TypeError for an argument that is not a node.
    """
    if not nodes:
        raise ValueError("parallel() needs at least one node")
    check_bound(max_concurrency)
    return ParallelGroup(tuple(_child_of(node) for node in nodes), max_concurrency)


def map_over(
    items: str | JsonLines | ItemsFunction,
    node: Any,
    *,
    into: str | JsonLines | Journal,
    max_concurrency: int | None = None,
    on_item_failure: Literal["stop", "collect"] = "stop",
) -> Group:
    """Run one node, or several in turn, for each of many items; each item is recorded and resumed on its own.

    ``items``: the name of a list field of the state; a file of :class:`JsonLines`; or a function of the state
    that returns an iterable or an async iterable. Every process that resumes the run calls that function
    again: it must return the same items. An item is the node's input: a model or dict as it is, anything else
    as the value of a root model, or of the node's only required field.

    ``node``: the node or group to run for each item; or a list or tuple of them, to run in turn, each on the
    output of the one before. Items do not wait for each other between two nodes. An item has the output of
    its last node, and fails if one of its nodes does.

    ``into``: the name of a field that receives the list of outputs, in the order of the items; or a file of
    :class:`JsonLines`, or the :class:`Journal`. With the last two the state does not change, and any number
    of items needs no more memory than a few.

    ``max_concurrency``: how many run at once; None is all of a list of the state, and else 64.

    ``on_item_failure``: "stop" ends the group with the first item that fails for good. "collect" continues
    with the others; each that failed becomes an ItemFailure, in the field ``<into>_failures`` or the file
    ``<into>.failures.jsonl``, and the run counts them in ``result.failed_items``. A resume runs them again if
    ``retry_failed_items`` is set.

    Raises TypeError for an argument that is not a node, ValueError for one that is not the name of a field,
    or for an empty sequence of nodes.
    """
    check_bound(max_concurrency)
    child = _child_of_map(node)
    _name_of_items(items)
    for field in (items, into):
        if isinstance(field, str) and not field.isidentifier():
            raise ValueError(f"{field!r} is not the name of a field")
    if on_item_failure not in ("stop", "collect"):
        raise ValueError(f'on_item_failure must be "stop" or "collect", got {on_item_failure!r}')
    if not isinstance(into, (str, JsonLines, Journal)):
        raise TypeError(f"into must be the name of a field, JsonLines(path) or Journal(), got {into!r}")
    _check_inside_map(child, outputs_in_state=isinstance(into, str))
    if max_concurrency is None and not (isinstance(items, str) and isinstance(into, str)):
        max_concurrency = DEFAULT_CONCURRENCY
    return MapGroup(items, child, into, max_concurrency, collects_failures=on_item_failure == "collect")


class ParallelGroup(Group):
    """Nodes side by side on copies of one state."""

    def __init__(self, children: tuple[Node | Group, ...], max_concurrency: int | None) -> None:
        node_id = f"parallel({', '.join(child.node_id for child in children)})"
        super().__init__(node_id, children, max_concurrency)

    async def run(self, ctx: ReliabilityContext, execution: RunningNode, value: BaseModel) -> dict[str, Any]:
        """Execute the children; raise GroupStopped for the first that stopped for good."""
        ends = ChildEnds()
        prefix = f"{execution.branch}." if execution.branch else ""
        inside_step = None if execution.step is None else inside_of(execution.step)

        async def run_child(index: int, child: Node | Group) -> BaseModel | None:
            if ends.stopped is not None:
                return None
            place = Place(execution.position, f"{prefix}{index}", "node", execution, step=inside_step)
            outcome = await execute_in_turn(ctx, (child,), value, place)
            if isinstance(outcome, BaseModel):
                return outcome
            assert isinstance(outcome, Halt)  # There is no further node.
            ends.note(outcome)
            return None

        run = self._bounded(run_child)
        outputs = await gather([run(index, child) for index, child in enumerate(self.children)])
        ends.check()
        return self._merge(value, cast("list[BaseModel]", outputs))

    def _merge(self, value: BaseModel, outputs: Sequence[BaseModel]) -> dict[str, Any]:
        """Return the fields of all outputs, as plain data where the merged class cannot declare them."""
        own = self._own_fields([type(output) for output in outputs])
        last_open = max((index for index, names in enumerate(own) if names is None), default=-1)
        merged: dict[str, Any] = {}
        for child, output in zip(self.children, outputs, strict=True):
            if isinstance(child, Group):  # What a map passes on replaces no output of another child.
                merged.update(_fields_of_output(output, Schema.values if last_open < 0 else Schema.fields))
        for index, (child, output, names) in enumerate(zip(self.children, outputs, own, strict=True)):
            fields = _fields_of_output(output, Schema.fields if index < last_open else Schema.values)
            if names is None and _has_map(child):  # A field as the group received it may be of its map.
                names = _changed(fields, _fields_of_state(value, Schema.fields))
            merged.update(fields if names is None else {name: fields[name] for name in names})
        return merged

    async def call_directly(self, state: BaseModel) -> dict[str, Any]:
        call = self._bounded(lambda child: _call_directly(child, schema_of(type(state)).copy(state)))
        merged: dict[str, Any] = {}
        for fields in await gather([call(child) for child in self.children]):
            merged.update(fields)
        return merged

    def _bounded(
        self, call: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a function that waits while as many children run as may at the same time."""
        if self.max_concurrency is None:
            return call  # 2 us less for each child.
        gate = asyncio.Semaphore(self.max_concurrency)

        async def wait_and_call(*arguments: Any) -> Any:
            async with gate:
                return await call(*arguments)

        return wait_and_call

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        return merged_model(self.node_id, tuple(child_classes), self._own_fields(child_classes))

    def _own_fields(self, classes: Sequence[type[BaseModel]]) -> tuple[frozenset[str] | None, ...]:
        """Return the fields that each child sets, by the class of its output; None for any."""
        children = zip(self.children, classes, strict=True)
        return tuple(
            child.own_fields(cls) if isinstance(child, Group) else own_fields_of(cls)
            for child, cls in children
        )

    def own_fields(self, output_class: type[BaseModel]) -> frozenset[str] | None:
        return own_fields_of(output_class)


class SequenceGroup(Group):
    """Nodes in turn, each on the output of the one before: the child of a map with several nodes."""

    is_sequence = True

    def __init__(self, children: tuple[Node | Group, ...]) -> None:
        super().__init__(sequence_id(child.node_id for child in children), children, None)

    async def run(self, ctx: ReliabilityContext, execution: RunningNode, value: BaseModel) -> dict[str, Any]:
        """Execute the children; raise GroupStopped for the first that does not end with an output."""
        prefix = f"{execution.branch}." if execution.branch else ""
        inside_step = None if execution.step is None else inside_of(execution.step)
        for index, child in enumerate(self.children):
            place = Place(
                execution.position,
                f"{prefix}{index}",
                "node",
                execution,
                step=inside_step,
                cancelling=await _count_cancellations(),
            )
            outcome = await execute(ctx, child, value, place)
            if isinstance(outcome, Halt):
                try:
                    raise GroupStopped(outcome)
                finally:
                    del outcome  # As in execute_in_turn().
            value = outcome
        return schema_of(type(value)).values(value)

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        return child_classes[-1]


class MapGroup(Group):
    """One node over many items. :func:`map_over` checks the options."""

    is_map = True

    def __init__(
        self,
        items: str | JsonLines | ItemsFunction,
        child: Node | Group,
        into: str | JsonLines | Journal,
        max_concurrency: int | None,
        *,
        collects_failures: bool,
    ) -> None:
        name = _name_of_items(items)
        super().__init__(f"map_over({name}, {child.node_id})", (child,), max_concurrency)
        self._items = items
        self._into = into
        self.items_field = name
        self.output_field = into if isinstance(into, str) else ""
        self.has_external_items = not isinstance(items, str)
        self.collects_failures = collects_failures
        self._failures_field = (
            f"{self.output_field}_failures" if self.output_field and collects_failures else ""
        )
        self._own_fields = frozenset({self.output_field, self._failures_field} - {""})

    async def run(self, ctx: ReliabilityContext, execution: RunningNode, value: BaseModel) -> dict[str, Any]:
        state = _fields_of_state(value, Schema.values)
        files = self._output_files(state, ctx.run_id)
        for file in files:
            file.check(self._items.find(state) if isinstance(self._items, JsonLines) else None)
        work = MapRun(ctx, execution, self, self._source(value))
        await work.run()
        if files:
            await work.write(*files)
        if work.outputs is None:
            return state
        outputs = work.outputs
        fields = {**state, self.output_field: [item_output(outputs[index]) for index in sorted(outputs)]}
        if self._failures_field:
            fields[self._failures_field] = sorted(work.failures, key=attrgetter("index"))
        return fields

    def output_classes(
        self,
        input_class: type[BaseModel],
        class_of: Callable[[Node | Group, type[BaseModel]], type[BaseModel]],
    ) -> list[type[BaseModel]]:
        return super().output_classes(MapItem, class_of)

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        if not self.output_field:
            return input_class
        return with_list(self.node_id, input_class, self.output_field, child_classes[0], self._failures_field)

    def own_fields(self, output_class: type[BaseModel]) -> frozenset[str] | None:
        return self._own_fields

    def _source(self, state: BaseModel) -> Source:
        items = self._items
        if isinstance(items, str):
            return ListSource(_items_in(state, items))
        if isinstance(items, JsonLines):
            return FileSource(items.find(schema_of(type(state)).fields(state)))
        return IterableSource(items(schema_of(type(state)).copy(state)), self.items_field)

    def _output_files(self, state: Mapping[str, Any], run_id: str) -> list[LinesFile]:
        """Return the files of the outputs and of collected failures; none if they are stored elsewhere."""
        if not isinstance(self._into, JsonLines):
            return []
        path = self._into.find(state)
        paths = [path]
        if self.collects_failures:
            paths.append(path.with_name(f"{path.stem}.failures.jsonl"))
        return [LinesFile(path, run_id) for path in paths]


def _fields_of_output(output: Any, read: Callable[[Schema, BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """Return the fields that a child adds to the merged state. Raises TypeError if there are none."""
    value = output.root if isinstance(output, UntypedState) else output
    if isinstance(value, dict):
        return _check_names(value)
    if isinstance(value, BaseModel):
        return _fields_of_state(value, read)
    raise TypeError(
        f"a child of parallel() returned {type(value).__name__}; only dicts and models can be merged"
    )


def _has_map(node: Node | Group) -> bool:
    """Return True for a map, and for a group with one inside, which may pass on what it received."""
    return isinstance(node, Group) and (node.is_map or any(map(_has_map, node.children)))


def _changed(fields: Mapping[str, Any], received: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields of a group's output that differ from those of its input."""

    def is_same(name: str) -> bool:
        with suppress(Exception):  # Arrays, say, cannot be compared.
            return bool(Schema.to_plain(fields[name]) == Schema.to_plain(received[name]))
        return False

    return frozenset(name for name in fields if not is_same(name))


def _fields_of_state(state: Any, read: Callable[[Schema, BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a state as ``read`` takes them; of a root model, those of its dict or model."""
    if isinstance(state, UntypedState) and isinstance(state.root, (BaseModel, dict)):
        state = state.root
    if isinstance(state, dict):
        return _check_names(cast("dict[Any, Any]", isolate(state)))
    schema = schema_of(type(state))
    fields = read(schema, state)
    return _check_names(fields["root"]) if schema.is_root and isinstance(fields["root"], dict) else fields


def _check_names(fields: dict[Any, Any]) -> dict[str, Any]:
    """Return a dict as it is; raise TypeError for a key that is not a text, which would not be read back."""
    odd = next((key for key in fields if not isinstance(key, str)), None)
    if odd is not None:
        raise TypeError(
            f"fields of a group must have text as their names, got the key {odd!r}; use text for all keys"
        )
    return fields


def _items_in(value: BaseModel, field: str) -> list[Any]:
    """Return the items in the list field of a state. Raises TypeError if there is no list."""
    fields = _fields_of_state(value, Schema.fields)
    items = fields.get(field)
    if not isinstance(items, (list, tuple)):
        known = ", ".join(map(str, fields)) or "none"
        raise TypeError(
            f"map_over needs a list in field {field!r}, got {type(items).__name__}; "
            f"the state has the fields: {known}"
        )
    return list(items)


def _child_of(node: Any) -> Node | Group:
    child = find_node(node)
    if isinstance(child, FlowNode):
        raise TypeError(
            f"flow {child.node_id!r} cannot be in a group; call it in a flow with flow.run and gather()"
        )
    return child


def _child_of_map(node: Any) -> Node | Group:
    if not isinstance(node, (list, tuple)):
        return _child_of(node)
    if not node:
        raise ValueError(f"map_over() needs at least one node, got {node!r}")
    children = tuple(map(_child_of, node))
    return children[0] if len(children) == 1 else SequenceGroup(children)


def _name_of_items(items: Any) -> str:
    if isinstance(items, str):
        return items
    if isinstance(items, JsonLines):
        return items.name
    if not callable(items):
        raise TypeError(
            "items must be the name of a list field, JsonLines(path), or a function of the state that returns"
            f" them, got {items!r}"
        )
    return str(getattr(items, "__name__", type(items).__name__))


def _check_inside_map(node: Node | Group, *, outputs_in_state: bool) -> None:
    """Raise ValueError for maps inside of a map whose items in the journal could not be distinguished."""
    if not isinstance(node, Group):
        return
    if node.is_map and not (outputs_in_state and node.output_field):
        raise ValueError(
            f"{node.node_id} cannot be nested in a map: only one of them can leave its outputs out of the "
            "state, and not the inner one; pass the name of a field as into=, or call it in a node"
        )
    for child in node.children:
        _check_inside_map(child, outputs_in_state=outputs_in_state)


async def _count_cancellations() -> int:
    """Let in a cancellation of the task that is on its way, and return how many a node has left behind."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return 0
    await asyncio.sleep(0)
    return task.cancelling()


async def _call_directly(node: Node | Group, state: BaseModel) -> dict[str, Any]:
    if isinstance(node, Group):
        return await node(state)
    returned = node.call(state, {})
    output = await returned if inspect.isawaitable(returned) else returned
    if isinstance(output, tuple):
        output = output[0]
    return schema_of(type(output)).fields(output) if isinstance(output, BaseModel) else output
