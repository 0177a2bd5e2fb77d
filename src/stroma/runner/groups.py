"""Groups: several nodes side by side, or one node over many items."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from operator import attrgetter, itemgetter
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from stroma._utils.models import LazyModel
from stroma.checkpoint import inside_of
from stroma.contracts.copying import isolate
from stroma.contracts.node import Group, Node, find_node, make_node
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.untyped import Kept
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import Kind, NodeExecution
from stroma.engine.loop import execute_in_turn
from stroma.engine.merged_models import merged_model, with_list
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.engine.restore import output_schema
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

__all__ = ["as_state", "map_over", "parallel"]


def parallel(*nodes: Any, max_concurrency: int | None = None) -> Group:
    """Run nodes side by side on copies of the same state; their outputs merge in argument order, later ones win.

    Each child is a full node: contracts, timeout, retries, usage, hooks, a record of its own. The first that stops
    for good cancels its siblings, and the group fails with that child's exception. ``max_concurrency`` bounds how
    many run at once. Groups nest. Raises ValueError without children, TypeError for what is no node.
    """
    if not nodes:
        raise ValueError("parallel() needs at least one node")
    limit = _check_limit(max_concurrency)
    children = tuple(find_node(node) for node in nodes)

    def output(ctx: ReliabilityContext, value: BaseModel) -> type[BaseModel]:
        return merged_model(group.node_id, tuple(_output_class(ctx, child, value) for child in children))

    async def run(ctx: ReliabilityContext, execution: NodeExecution, value: BaseModel) -> dict[str, Any]:
        outputs = await _side_by_side(ctx, execution, [(child, value) for child in children], limit, "node")
        return merge(value, outputs, ())

    def merge(
        value: BaseModel, outputs: Sequence[BaseModel], failures: Sequence[ItemFailure]
    ) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for out in outputs:
            merged.update(_contents(out))
        return merged

    async def by_hand(state: BaseModel) -> dict[str, Any]:
        gate = _gate(limit)

        async def one(child: Node | Group) -> dict[str, Any]:
            async with gate():
                return await _call_by_hand(child, schema_of(type(state)).copy(state))

        merged: dict[str, Any] = {}
        for out in await gather([one(child) for child in children]):
            merged.update(out)
        return merged

    def joined(given: type[BaseModel], outputs: Sequence[type[BaseModel]]) -> type[BaseModel]:
        return merged_model(group.node_id, tuple(outputs))

    group = Group(
        f"parallel({', '.join(child.node_id for child in children)})",
        children,
        run,
        output,
        by_hand,
        joined,
        merge=merge,
        limit=limit,
    )
    return group


def map_over(
    items: str | JsonLines | ItemsFunction,
    node: Any,
    *,
    into: str | JsonLines | Journal,
    max_concurrency: int | None = None,
    on_item_failure: Literal["stop", "collect"] = "stop",
) -> Group:
    """Run one node for each of many items; each is retried, recorded and resumed on its own.

    ``items``: the name of a list field of the state; a file of :class:`JsonLines`; or a function of the state that gives
    an iterable or an async iterable, which every process that goes on with the run asks anew: it must give the same. An
    item is the node's input: a model or dict as it is, anything else as the value of a root model, or of the node's only
    required field.

    ``into``: the name of a field that gets the list of outputs, in the order of the items, beside the other fields of the
    state; or a file of :class:`JsonLines`, or the :class:`Journal`: then the state stays as it is, and any number of
    items takes no more memory than a few.

    ``max_concurrency``: how many run at once; None is all of a list of the state, and else 64.

    ``on_item_failure``: "stop" ends the group with the first item that fails for good. "collect" goes on with the others;
    each that failed becomes an ItemFailure, in the field ``<into>_failures`` or the file ``<into>.failures.jsonl``, and
    the run counts them in ``result.failed_items``. A resume runs them again if ``retry_failed_items`` says so.

    Raises TypeError for what is no node, ValueError for what is no field.
    """
    limit = _check_limit(max_concurrency)
    child = find_node(node)
    name = _name_of_items(items)
    for field in (items, into):
        if isinstance(field, str) and not field.isidentifier():
            raise ValueError(f"{field!r} is not the name of a field")
    if on_item_failure not in ("stop", "collect"):
        raise ValueError(f'on_item_failure is {on_item_failure!r}; give "stop" or "collect"')
    if not isinstance(into, (str, JsonLines, Journal)):
        raise TypeError(f"into is {into!r}; give the name of a field, JsonLines(path) or Journal()")
    _check_inside(child, apart=not isinstance(into, str))
    target = into if isinstance(into, str) else ""
    collect = on_item_failure == "collect"
    failed = f"{target}_failures" if target and collect else ""
    if limit is None and not (isinstance(items, str) and target):
        limit = DEFAULT_CONCURRENCY

    def output(ctx: ReliabilityContext, value: BaseModel) -> type[BaseModel]:
        if not target:
            return type(value)
        return with_list(group.node_id, type(value), target, _output_class(ctx, child, value), failed)

    def source_of(state: BaseModel) -> Source:
        if isinstance(items, str):
            return ListSource(_items(state, items))
        if isinstance(items, JsonLines):
            return FileSource(items.find(schema_of(type(state)).fields(state)))
        return IterableSource(items(schema_of(type(state)).copy(state)), name)

    async def run(ctx: ReliabilityContext, execution: NodeExecution, value: BaseModel) -> dict[str, Any]:
        state = _by_name(value, Schema.values)
        files = _files_of(into, state, ctx.run_id, collect=collect)
        for file in files:
            file.check(items.find(state) if isinstance(items, JsonLines) else None)
        work = MapRun(
            ctx,
            execution,
            child,
            source_of(value),
            lambda item: _item_state(ctx, child, item),
            limit=limit,
            collect=collect,
            keep=bool(target),
        )
        await work.go()
        if files:
            await work.write(*files)
        if work.outputs is None:
            return state
        return with_outputs(
            state, [out for _, out in sorted(work.outputs.items(), key=itemgetter(0))], work.failures
        )

    def with_outputs(
        state: dict[str, Any], outputs: Sequence[BaseModel], failures: Sequence[ItemFailure]
    ) -> dict[str, Any]:
        made: dict[str, Any] = {target: [_item_value(out) for out in outputs]}
        if failed:
            made[failed] = sorted(failures, key=attrgetter("index"))
        return {**state, **made}

    def merge(
        value: BaseModel, outputs: Sequence[BaseModel], failures: Sequence[ItemFailure]
    ) -> dict[str, Any]:
        return with_outputs(_by_name(value, Schema.values), outputs, failures)

    def some_items(ctx: ReliabilityContext, value: BaseModel, wanted: slice) -> tuple[int, list[BaseModel]]:
        found = _items(value, cast("str", items))
        return len(found), [_item_state(ctx, child, item) for item in found[wanted]]

    async def by_hand(state: BaseModel) -> dict[str, Any]:
        if not target or collect:
            raise TypeError(
                f"{group.node_id} keeps its items in the journal of a run: run it with a runner, not by hand"
            )
        gate = _gate(limit)

        async def one(item: Any) -> dict[str, Any]:
            async with gate():
                return await _call_by_hand(child, _item_state(None, child, item))

        outputs = await gather([one(item) for item in await values_of(source_of(state))])
        return {**_by_name(state, Schema.fields), target: outputs}

    def joined(given: type[BaseModel], outputs: Sequence[type[BaseModel]]) -> type[BaseModel]:
        return with_list(group.node_id, given, target, outputs[0], failed) if target else given

    group = Group(
        f"map_over({name}, {child.node_id})",
        (child,),
        run,
        output,
        by_hand,
        joined,
        name,
        target,
        not isinstance(items, str),
        merge if target else None,
        some_items if isinstance(items, str) else None,
        limit,
        collect,
    )
    return group


def _name_of_items(items: Any) -> str:
    if isinstance(items, str):
        return items
    if isinstance(items, JsonLines):
        return items.name
    if not callable(items):
        raise TypeError(
            f"map_over cannot take its items from {items!r}; give the name of a list field, JsonLines(path), or a function "
            "of the state that gives them"
        )
    return str(getattr(items, "__name__", type(items).__name__))


def _check_inside(node: Node | Group, *, apart: bool) -> None:
    """Refuse maps inside of a map that could not be told apart from one another."""
    if not isinstance(node, Group):
        return
    if node.each and (apart or not node.into):
        raise ValueError(
            f"{node.node_id} cannot stand inside of a map: the outputs of only one of them can be kept out of the state, "
            "and of none that runs many times; give it a field as into=, or call it in a node"
        )
    for child in node.children:
        _check_inside(child, apart=apart)


def _files_of(into: Any, state: Mapping[str, Any], run_id: str, *, collect: bool) -> list[LinesFile]:
    """The file of the outputs and that of the failures."""
    if not isinstance(into, JsonLines):
        return []
    path = into.find(state)
    paths = [path, path.with_name(f"{path.stem}.failures.jsonl")] if collect else [path]
    return [LinesFile(path, run_id) for path in paths]


# ---------------------------------------------------------------------- running


async def _side_by_side(
    ctx: ReliabilityContext,
    group: NodeExecution,
    jobs: Sequence[tuple[Node | Group, BaseModel]],
    limit: int | None,
    kind: Kind,
) -> list[BaseModel]:
    """Execute jobs concurrently; raises GroupStopped for the first that stopped for good, its siblings awaited."""
    gate = None if limit is None else asyncio.Semaphore(limit)
    stopped: list[Halt] = []
    waiting: list[Halt] = []
    prefix = f"{group.branch}." if group.branch else ""
    inside_step = None if group.step is None else inside_of(group.step)

    async def one(index: int, node: Node | Group, value: BaseModel) -> BaseModel | None:
        if stopped:
            return None
        place = Place(group.position, f"{prefix}{index}", kind, group, step=inside_step)
        outcome = await execute_in_turn(ctx, (node,), value, place)
        if isinstance(outcome, BaseModel):
            return outcome
        assert isinstance(outcome, Halt)  # There is no further node.
        if outcome.suspended:  # Its siblings need not wait: all that can be done is done.
            waiting.append(outcome)
            return None
        stopped.append(outcome)
        # A crossed limit cancels nobody: siblings in flight were paid for, they finish, and nothing new is called.
        if not stopped[0].spent:
            raise GroupStopped(outcome)
        return None

    async def one_in_turn(index: int, node: Node | Group, value: BaseModel) -> BaseModel | None:
        assert gate is not None
        async with gate:
            return await one(index, node, value)

    work = one if gate is None else one_in_turn
    outputs = await gather([work(i, node, value) for i, (node, value) in enumerate(jobs)])
    for halt in (*stopped, *waiting):
        raise GroupStopped(halt)
    return cast("list[BaseModel]", outputs)


def _gate(limit: int | None) -> Callable[[], AbstractAsyncContextManager[Any]]:
    if limit is None:
        return nullcontext
    semaphore = asyncio.Semaphore(limit)
    return lambda: semaphore


def _check_limit(limit: int | None) -> int | None:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"max_concurrency is {limit!r}; give a whole number from 1 up, or None for no bound")
    return limit


async def _call_by_hand(node: Node | Group, state: BaseModel) -> dict[str, Any]:
    if isinstance(node, Group):
        return await node(state)
    returned = node.call(state, {})
    output = await returned if inspect.isawaitable(returned) else returned
    if isinstance(output, tuple):
        output = output[0]
    return schema_of(type(output)).fields(output) if isinstance(output, BaseModel) else output


# ---------------------------------------------------------------------- shapes


def _contents(output: Any) -> dict[str, Any]:
    """What a child adds to the merged state."""
    held = output.root if isinstance(output, Kept) else output
    if isinstance(held, dict):
        return _named(held)
    if isinstance(held, BaseModel):
        return _by_name(held, Schema.values)
    raise TypeError(
        f"a child of parallel() returned {type(held).__name__}; only dicts and models can be merged"
    )


def _by_name(state: Any, values: Callable[[Schema, BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """The fields of a state, as ``values`` takes them; of a root model those of the dict or model that it holds."""
    if isinstance(state, Kept) and isinstance(state.root, (BaseModel, dict)):
        state = state.root
    if isinstance(state, dict):
        return _named(cast("dict[Any, Any]", isolate(state)))
    schema = schema_of(type(state))
    found = values(schema, state)
    return _named(found["root"]) if schema.is_root and isinstance(found["root"], dict) else found


def _named(fields: dict[Any, Any]) -> dict[str, Any]:
    """A dict whose keys are names of fields; anything else would not be read back."""
    odd = next((key for key in fields if not isinstance(key, str)), None)
    if odd is not None:
        raise TypeError(
            f"a group needs fields with names, and there is the key {odd!r}; use text for all keys"
        )
    return fields


def _item_value(output: BaseModel) -> Any:
    return output.root if isinstance(output, Kept) else schema_of(type(output)).clone(output)


def _output_class(ctx: ReliabilityContext, node: Node | Group, value: BaseModel) -> type[BaseModel]:
    return output_schema(ctx, node, value).model


def _items(value: BaseModel, field: str) -> list[Any]:
    fields = _by_name(value, Schema.fields)
    items = fields.get(field)
    if not isinstance(items, (list, tuple)):
        have = ", ".join(map(str, fields)) or "none"
        raise TypeError(
            f"map_over needs a list in field {field!r}, and there is {type(items).__name__}; fields: {have}"
        )
    return list(items)


def _item_state(ctx: ReliabilityContext | None, node: Node | Group, item: Any) -> BaseModel:
    """An item as a state that the node's input contract can be asked about."""
    if isinstance(item, BaseModel):
        return item
    if isinstance(item, dict):
        return _item(item) if all(isinstance(k, str) for k in item) else Kept(item)
    contract = (
        None if isinstance(node, Group) else ((ctx and ctx.registry.find(node.node_id)) or node.contract)
    )
    if contract is not None and not contract.input_schema.__pydantic_root_model__:
        required = [n for n, info in contract.input_schema.model_fields.items() if info.is_required()]
        if len(required) == 1:
            return _item({required[0]: item})
    return Kept(item)


def as_state(raw: Any) -> BaseModel:
    """Plain data as a state that a node's input contract can be asked about."""
    return _item_state(None, _ANY, raw)


def _item(fields: dict[str, Any]) -> BaseModel:
    return schema_of(_Item).construct(fields)


class _Item(LazyModel):
    """A dict on its way to a node: open to any field, validated by the node's own contract."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


#: A node that asks for nothing.
_ANY = make_node("any", _item, None)
