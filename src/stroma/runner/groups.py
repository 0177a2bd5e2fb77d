"""Groups: several nodes side by side, and one node, or several in turn, over many items."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, Literal, cast

from pydantic import BaseModel

from stroma.checkpoint import inside_of
from stroma.checkpoint.identity import sequence_id
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.engine.loop import execute, execute_in_turn
from stroma.engine.merged_models import merged_model, with_list
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.engine.tasks import gather
from stroma.failures.errors import ItemFailure
from stroma.runner.items import (
    FileSource,
    ItemsFunction,
    IterableSource,
    Journal,
    JsonLines,
    LinesFile,
    ListSource,
    Source,
    values_of,
)
from stroma.runner.map import DEFAULT_CONCURRENCY, MapRun
from stroma.runner.states import (
    as_state,
    fields_of_output,
    fields_of_state,
    item_output,
    item_state,
    items_in,
)

__all__ = ["map_over", "parallel"]


def parallel(*nodes: Any, max_concurrency: int | None = None) -> Group:
    """Run nodes side by side on copies of the same state; their outputs merge in argument order, later ones win.

    Each child is a full node: contracts, timeout, retries, usage, hooks, a record of its own. The first that
    stops for good cancels its siblings, and the group fails with that child's exception; an effect that is
    being called runs to its end first. Groups nest.

    Args:
        nodes: the children: nodes or groups.
        max_concurrency: maximum number of children that run at the same time; None: no maximum.

    Raises ValueError without children, TypeError for an argument that is not a node.
    """
    if not nodes:
        raise ValueError("parallel() needs at least one node")
    _check_limit(max_concurrency)
    return ParallelGroup(tuple(_child_of(node) for node in nodes), max_concurrency)


def map_over(
    items: str | JsonLines | ItemsFunction,
    node: Any,
    *,
    into: str | JsonLines | Journal,
    max_concurrency: int | None = None,
    on_item_failure: Literal["stop", "collect"] = "stop",
) -> Group:
    """Run one node, or several in turn, for each of many items; each is retried, recorded and resumed on its own.

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
    _check_limit(max_concurrency)
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

    async def run(
        self, ctx: ReliabilityContext, execution: NodeExecution, value: BaseModel
    ) -> dict[str, Any]:
        """Execute the children; raise GroupStopped for the first that stopped for good, its siblings awaited."""
        gate = _gate(self.max_concurrency)
        stopped: list[Halt] = []
        suspended: list[Halt] = []
        prefix = f"{execution.branch}." if execution.branch else ""
        inside_step = None if execution.step is None else inside_of(execution.step)

        async def run_child(index: int, child: Node | Group) -> BaseModel | None:
            if stopped:
                return None
            place = Place(execution.position, f"{prefix}{index}", "node", execution, step=inside_step)
            outcome = await execute_in_turn(ctx, (child,), value, place)
            if isinstance(outcome, BaseModel):
                return outcome
            assert isinstance(outcome, Halt)  # There is no further node.
            if outcome.suspended:
                # Its siblings go on, so that only the suspended nodes remain to be run.
                suspended.append(outcome)
                return None
            stopped.append(outcome)
            # A spent budget cancels no sibling in flight: those are paid for. No further one starts.
            if not stopped[0].spent:
                raise GroupStopped(outcome)
            return None

        async def wait_and_run(index: int, child: Node | Group) -> BaseModel | None:
            async with gate:
                return await run_child(index, child)

        run = run_child if self.max_concurrency is None else wait_and_run  # 2 us less for each child.
        outputs = await gather([run(index, child) for index, child in enumerate(self.children)])
        for halt in (*stopped, *suspended):
            raise GroupStopped(halt)
        merged: dict[str, Any] = {}
        for output in cast("list[BaseModel]", outputs):
            merged.update(fields_of_output(output))
        return merged

    async def call_directly(self, state: BaseModel) -> dict[str, Any]:
        gate = _gate(self.max_concurrency)

        async def call_child(child: Node | Group) -> dict[str, Any]:
            async with gate:
                return await _call_directly(child, schema_of(type(state)).copy(state))

        merged: dict[str, Any] = {}
        for fields in await gather([call_child(child) for child in self.children]):
            merged.update(fields)
        return merged

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        return merged_model(self.node_id, tuple(child_classes))


class SequenceGroup(Group):
    """Nodes in turn, each on the output of the one before: the child of a map with several nodes."""

    is_sequence = True

    def __init__(self, children: tuple[Node | Group, ...]) -> None:
        super().__init__(sequence_id(child.node_id for child in children), children, None)

    async def run(
        self, ctx: ReliabilityContext, execution: NodeExecution, value: BaseModel
    ) -> dict[str, Any]:
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

    async def call_directly(self, state: BaseModel) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for index, child in enumerate(self.children):
            if index and isinstance(child, Node) and child.contract is not None:
                state = schema_of(child.contract.input_schema).prepare_input(state)[0]
            fields = await _call_directly(child, state)
            state = as_state(fields)
        return fields

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

    @property
    def _failures_field(self) -> str:
        return f"{self.output_field}_failures" if self.output_field and self.collects_failures else ""

    async def run(
        self, ctx: ReliabilityContext, execution: NodeExecution, value: BaseModel
    ) -> dict[str, Any]:
        state = fields_of_state(value, Schema.values)
        files = self._output_files(state, ctx.run_id)
        for file in files:
            file.check(self._items.find(state) if isinstance(self._items, JsonLines) else None)
        work = MapRun(ctx, execution, self, self._source(value))
        await work.run()
        if files:
            await work.write(*files)
        if work.outputs is None:
            return state
        return self._add_outputs(
            state, [work.outputs[index] for index in sorted(work.outputs)], work.failures
        )

    async def call_directly(self, state: BaseModel) -> dict[str, Any]:
        if not self.output_field or self.collects_failures:
            raise TypeError(
                f"{self.node_id} needs the journal of a run and cannot be called directly; run it with a runner"
            )
        gate = _gate(self.max_concurrency)
        child = self.children[0]

        async def call_item(item: Any) -> dict[str, Any]:
            async with gate:
                return await _call_directly(child, item_state(None, child, item))

        outputs = await gather([call_item(item) for item in await values_of(self._source(state))])
        return {**fields_of_state(state, Schema.fields), self.output_field: outputs}

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        if not self.output_field:
            return input_class
        return with_list(self.node_id, input_class, self.output_field, child_classes[0], self._failures_field)

    def _add_outputs(
        self, state: dict[str, Any], outputs: Sequence[BaseModel], failures: Sequence[ItemFailure]
    ) -> dict[str, Any]:
        fields = {**state, self.output_field: [item_output(output) for output in outputs]}
        if self._failures_field:
            fields[self._failures_field] = sorted(failures, key=attrgetter("index"))
        return fields

    def _source(self, state: BaseModel) -> Source:
        items = self._items
        if isinstance(items, str):
            return ListSource(items_in(state, items))
        if isinstance(items, JsonLines):
            return FileSource(items.find(schema_of(type(state)).fields(state)))
        return IterableSource(items(schema_of(type(state)).copy(state)), self.items_field)

    def _output_files(self, state: Mapping[str, Any], run_id: str) -> list[LinesFile]:
        """Return the file of the outputs and, if failures are collected, theirs; none for outputs kept elsewhere."""
        if not isinstance(self._into, JsonLines):
            return []
        path = self._into.find(state)
        paths = [path]
        if self.collects_failures:
            paths.append(path.with_name(f"{path.stem}.failures.jsonl"))
        return [LinesFile(path, run_id) for path in paths]


def _child_of(node: Any) -> Node | Group:
    child = find_node(node)
    if isinstance(child, FlowNode):
        raise TypeError(
            f"flow {child.node_id!r} cannot be in a group; call it in a flow, with flow.run under asyncio.gather()"
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
            "items must be the name of a list field, JsonLines(path), or a function of the state that returns them, "
            f"got {items!r}"
        )
    return str(getattr(items, "__name__", type(items).__name__))


def _check_inside_map(node: Node | Group, *, outputs_in_state: bool) -> None:
    """Raise ValueError for maps inside of a map whose items in the journal could not be distinguished."""
    if not isinstance(node, Group):
        return
    if node.is_map and not (outputs_in_state and node.output_field):
        raise ValueError(
            f"{node.node_id} cannot be nested in a map: only one of them can leave its outputs out of the state, and not "
            "the inner one; pass the name of a field as into=, or call it in a node"
        )
    for child in node.children:
        _check_inside_map(child, outputs_in_state=outputs_in_state)


def _check_limit(limit: int | None) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"max_concurrency must be at least 1, or None for no bound, got {limit!r}")


async def _count_cancellations() -> int:
    """Let in a cancellation of the task that is on its way, and return how many a node has left behind."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return 0
    await asyncio.sleep(0)
    return task.cancelling()


def _gate(limit: int | None) -> asyncio.Semaphore | nullcontext[None]:
    return nullcontext() if limit is None else asyncio.Semaphore(limit)


async def _call_directly(node: Node | Group, state: BaseModel) -> dict[str, Any]:
    if isinstance(node, Group):
        return await node(state)
    returned = node.call(state, {})
    output = await returned if inspect.isawaitable(returned) else returned
    if isinstance(output, tuple):
        output = output[0]
    return schema_of(type(output)).fields(output) if isinstance(output, BaseModel) else output
