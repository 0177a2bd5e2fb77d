"""Pipelines: named sequences of nodes, the checks before they run, and the name of their code."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import FunctionType, NoneType
from typing import Any, Final, Generic, Literal, Protocol, TypedDict

from pydantic import BaseModel

from stroma._utils.text import did_you_mean
from stroma.checkpoint.flow_notes import LAST_MS
from stroma.checkpoint.queue import QueueEntry, RunLimits, ServedCode
from stroma.contracts.contract import ContractRegistry, Decorated, check_id
from stroma.contracts.node import (
    DepsT,
    FlowNode,
    Group,
    Node,
    contract_of_node,
    find_node,
    marked_nodes,
    output_class,
)
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.config import RunConfig, check_label
from stroma.engine.context import ReliabilityContext
from stroma.engine.placed_calls import place_error
from stroma.hooks.sets import NodeHooks, flatten
from stroma.trace.result import ExecutionResult, RunStatus

#: Beginnings of the ids of groups, which have one only when they are made.
_GROUP_IDS: Final = ("parallel(", "map_over(")
#: The fields of a config that are keyed by node id.
_BY_NODE: Final = ("node_policies", "node_timeouts", "contract_retries", "node_limits")


def find_position(nodes: Sequence[Node | Group], node_id: str, parameter: str) -> int:
    """Return the first position with a node id. Raises ValueError, naming the parameter, if there is none."""
    for position, node in enumerate(nodes):
        if node.node_id == node_id:
            return position
    known = ", ".join(repr(node.node_id) for node in nodes) or "none"
    raise ValueError(f"{parameter}={node_id!r} is not a node of this pipeline; its nodes are {known}")


def check_bound(max_concurrency: int | None, *, optional: bool = True) -> None:
    """Raise ValueError for a bound that is not a whole number from 1 on, nor None if it is ``optional``."""
    if optional and max_concurrency is None:
        return
    if not isinstance(max_concurrency, int) or max_concurrency < 1:
        fix = ", or None for no bound" if optional else ""
        raise ValueError(f"max_concurrency must be at least 1{fix}, got {max_concurrency!r}")


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


#: In place of a caller of nodes with a place: places are not looked at.
_ANY_CALLER: Final = object()


def require_runnable(
    nodes: Sequence[Node | Group], registry: ContractRegistry, caller: Any = _ANY_CALLER
) -> None:
    """Raise ValueError for a node whose id was later assigned to another function with another contract.

    With a ``caller``, see :func:`place_error`, raise PlaceError for a node with a place that cannot be called
    in this process.
    """
    for node in nodes:
        if isinstance(node, Group):
            require_runnable(node.children, registry, caller)
            continue
        own, known, latest = node.contract, registry.find(node.node_id), registry.decorated.get(node.node_id)
        if (
            latest is not None
            and latest.contract is known
            and own is not None
            and own is not known
            and own != known
        ):
            func = Decorated.of(node.func, own).owner
            raise ValueError(
                f"{func} cannot run as node {node.node_id!r}: the id was later assigned to "
                f"{latest.owner}, with another contract; rename one of them"
            )
        contract = known or own
        if contract is not None and contract.place is not None and caller is not _ANY_CALLER:
            error = place_error(caller, contract)
            if error is not None:
                raise error


def refuse_unknown_ids(
    config: RunConfig, nodes: Sequence[Node | Group], registry: ContractRegistry, pipeline: str
) -> None:
    """Raise ValueError for ids in a config that nobody knows, and for limits and budgets that no node has.

    Known are the ids of the pipeline, of the registry, and of all nodes of this process: other pipelines may
    share the config. With a flow in it a pipeline may call any node, and groups have no id before they are
    made: see :func:`warn_of_unknown_ids`.
    """
    if FlowNode in set(map(type, nodes)):
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
    if result.status is not RunStatus.COMPLETED or session.continued or session.finished is not None:
        return
    known = ctx.registry.known_ids.union(ids_in(nodes), (event.node_id for event in result.trace.walk()))
    for mistake in _mistakes_in(ctx.config, known, f"a run of {ctx.pipeline!r}"):
        if mistake not in warned:
            warned.add(mistake)
            ctx.run_logger.warning("%s", mistake)


def _mistakes_in(config: RunConfig, known: set[str], where: str, but: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a message for each unknown id in a config, and for limits and budgets without a known one.

    ``but``: beginnings of ids that are not looked at.
    """
    named: dict[str, list[str]] = {}
    for field in _BY_NODE:
        for node_id in getattr(config, field):
            if node_id not in known and not node_id.startswith(but):
                named.setdefault(node_id, []).append(field)
    budgets = [one for one in config.budgets if one.node_ids and one.node_ids.isdisjoint(known)]
    looks_further = named or config.limits or budgets
    in_process = {node.node_id for node in marked_nodes()} if looks_further else set[str]()
    named = {node_id: places for node_id, places in named.items() if node_id not in in_process}
    for budget in budgets:
        # One known id is enough: a budget may name nodes of other processes.
        for node_id in sorted(budget.node_ids) if budget.node_ids.isdisjoint(in_process) else ():
            named.setdefault(node_id, []).append(budget.label)
    for node_id, places in named.items():
        fix = did_you_mean(node_id, known) or "correct the id, or register the contract of that node"
        names = " and ".join(filter(None, (", ".join(places[:-1]), places[-1])))
        verb = "names" if len(places) == 1 else "name"
        yield f"{names} {verb} {node_id!r}, which no node of {where} has; {fix}"
    if config.limits and not any(map(config.limit_of, known | in_process)):
        limits = ", ".join(map(repr, config.limits))
        fix = "assign them with node_limits={node id: name}"
        yield f"no node of {where} uses any of the limits ({limits}); {fix}"


MAX_VERSION: Final = 100  # characters


@dataclass(frozen=True, init=False)
class Pipeline:
    """A named sequence of nodes, with an optional configuration.

    Metrics and spans are labelled with the name. Raises TypeError for anything that is not a node, ValueError
    for a name that a store cannot save, and for a limit below 1.

    Attributes:
        name: name of the pipeline in stores, metrics and spans.
        nodes: the nodes, groups and flows, in order.
        limits: ``max_runs`` and ``max_runs_per_key``.
        config: settings of its runs. A field that the runner was given has the runner's value. For commands
            that is the only StromaRunner with settings in the pipeline's file.
        versions: the versions of runs that it continues, its own first; () without a version.

    Args:
        version: version of the nodes. A run keeps the version that it started with, and only a pipeline that
            has it, or accepts it, continues the run.
        accepts: earlier versions whose runs it can continue, too.
        max_runs: how many of its runs may have an owner at once, in all workers together; None: no limit.
            Runs that ``run()`` starts count, and are not limited.
        max_runs_per_key: the same for the runs of one key, see :meth:`StromaRunner.submit`.
    """

    name: str
    nodes: tuple[Any, ...]
    config: RunConfig | None
    limits: RunLimits
    versions: tuple[str, ...]

    def __init__(
        self,
        name: str,
        nodes: Iterable[Any],
        *,
        config: RunConfig | None = None,
        version: str | None = None,
        accepts: Sequence[str] = (),
        max_runs: int | None = None,
        max_runs_per_key: int | None = None,
    ) -> None:
        for what, number in (("max_runs", max_runs), ("max_runs_per_key", max_runs_per_key)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{what} must be at least 1, or None for no limit, got {number!r}")
        check_config(config)
        vars(self).update(
            name=check_id(name, "pipeline name"),
            nodes=tuple(list_nodes(nodes)),
            config=config,
            limits=RunLimits(max_runs, max_runs_per_key),
            versions=_check_versions(version, accepts),
        )
        for node in self.nodes:
            find_node(node)

    def with_config(self, config: RunConfig) -> Pipeline:
        """Return the pipeline with another config."""
        accepts, limits = self.versions[1:], self.limits._asdict()
        return Pipeline(self.name, self.nodes, config=config, version=self.version, accepts=accepts, **limits)

    @property
    def version(self) -> str | None:
        """Version of the nodes; None without one."""
        return self.versions[0] if self.versions else None

    @property
    def _takes_any_state(self) -> Literal[True]:
        """For type checkers only: see AnyState."""
        return True


def _check_versions(version: str | None, accepts: Sequence[str]) -> tuple[str, ...]:
    """Return the versions of runs that a pipeline continues. Raises TypeError, ValueError."""
    if isinstance(accepts, str):
        raise TypeError(f"accepts must be a sequence of versions, got {accepts!r}; pass ({accepts!r},)")
    if version is None and accepts:
        raise ValueError("accepts needs version=, which new runs have in place of earlier versions")
    versions = () if version is None else tuple(dict.fromkeys((version, *accepts)))
    for one in versions:
        if not isinstance(one, str) or not one.isprintable() or " " in one or not 0 < len(one) <= MAX_VERSION:
            raise ValueError(
                f"a version must have 1 to {MAX_VERSION} printable characters without spaces, got {one!r}"
            )
    return versions


class AnyState(Protocol):
    """A pipeline that is not a flow: the class of its initial state is not known to type checkers."""

    @property
    def _takes_any_state(self) -> Literal[True]: ...


def nodes_of(pipeline: Pipeline | Iterable[Any]) -> list[Node | Group]:
    """Return the records of the nodes of a pipeline or sequence. Raises TypeError for anything else."""
    return list(map(find_node, pipeline.nodes if isinstance(pipeline, Pipeline) else list_nodes(pipeline)))


def list_nodes(nodes: Iterable[Any]) -> list[Any]:
    """Return the nodes of a sequence, which is read once. Raises TypeError for a node that is not in one."""
    if not hasattr(nodes, "__iter__"):
        node = find_node(nodes)  # Raises, with the fix, for an object that is not a node at all.
        raise TypeError(f"nodes must be a sequence of nodes, got node {node.node_id!r}; put it in a list")
    return list(nodes)


def input_schema_of(
    nodes: Sequence[Node | Group], registry: ContractRegistry, input_class: type[BaseModel] | None = None
) -> Schema:
    """Return the schema of the input of a run of these nodes. Raises TypeError if they start with a group.

    ``input_class``: the class of the input, where the caller knows it.
    """
    if input_class is not None:
        return schema_of(input_class)
    first = nodes[0] if nodes else None
    if isinstance(first, Group):
        raise TypeError(
            f"the pipeline starts with {first.node_id!r}; pass the class of its input as input_schema= to "
            "resume(), recover() or fork(); submit(), serve() and run_many(recover=True) need a node there"
        )
    contract = contract_of_node(first, registry)
    return schema_of(output_class(None) if contract is None else contract.input_schema)


class RunKeywords(TypedDict, Generic[DepsT], total=False):
    """Keywords of :meth:`StromaRunner.run`, which override those fields of the config; None: as configured.

    Attributes:
        traceparent: the W3C trace context that the run's spans belong to, in place of the caller's current
            span; an invalid one is ignored.
    """

    run_id: str | None
    context: DepsT | None
    resume: bool | None
    resume_from: str | None
    retry_failed_items: bool | None
    if_exists: Literal["new", "restart", "resume", "return", "error"] | None
    if_running: Literal["error", "attach", "take_over"] | None
    traceparent: str | None
    conversation: str | None
    user: str | None


def check_keywords(function: str, options: Mapping[str, Any], keywords: type) -> None:
    """Raise TypeError for a keyword that a function with these ``keywords`` (a TypedDict) does not take."""
    known = keywords.__annotations__
    for name in options:
        if name not in known:
            fix = did_you_mean(name, known) or f"see stroma.runner.{keywords.__name__}"
            if name in RunConfig.model_fields:
                fix = "it is a field of RunConfig"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {fix}")


def check_config(config: Any) -> None:
    """Raise TypeError for anything but a RunConfig or None."""
    if not isinstance(config, (RunConfig, NoneType)):
        raise TypeError(f"config must be a RunConfig, got {type(config).__name__}; pass RunConfig(...)")


def check_state(what: str, state: Any, node: Node | Group | None = None) -> None:
    """Raise TypeError for anything but an instance of a pydantic model. ``node``: receives the state."""
    if isinstance(state, type) and issubclass(state, BaseModel):
        name = state.__name__
        raise TypeError(f"{what} must be an instance, got the class {name}; pass {name}(...)")
    if not isinstance(state, BaseModel):
        contract = node.contract if isinstance(node, Node) else None
        fix = "" if contract is None else f"; pass {contract.input_schema.__name__}(...)"
        raise TypeError(f"{what} must be a pydantic model, got {type(state).__name__}{fix}")


def override_config(config: RunConfig, options: RunKeywords[Any]) -> RunConfig:
    """Return the config with the options that are not None. Raises TypeError, ValidationError."""
    check_keywords("run", options, RunKeywords)
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    changes.pop("traceparent", None)
    if changes.keys() <= {"run_id"}:
        return config.with_run_id(changes["run_id"]) if changes else config
    RunConfig(**changes)  # Validates the options.
    return config.model_copy(update=changes)


def with_hooks(config: RunConfig, hooks: NodeHooks) -> RunConfig:
    """Return the config with further hooks, which are called first at the end of a node."""
    return config.model_copy(update={"hooks": [*flatten(config.hooks), hooks]})


_NAME_DIGITS: Final = 12


def code_of(pipeline: Pipeline) -> ServedCode:
    """Return the versions that a pipeline serves, and a name that each process with the same code makes.

    The name is made of the version, the ids and schemas of the nodes, and the bodies of flows with the nodes
    that they name. Code of one name tries a blocked run again after a while, code of another name at once.
    """
    digest = hashlib.sha256()
    for part in _parts_of(nodes_of(pipeline), set()):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    name = digest.hexdigest()[:_NAME_DIGITS]
    version = pipeline.version
    return ServedCode(pipeline.versions, name if version is None else f"{version}+{name}")


def _parts_of(nodes: Iterable[Node | Group], seen: set[str]) -> Iterator[str]:
    """Yield what the code of nodes consists of. ``seen``: ids of flows, which may call each other."""
    for node in nodes:
        yield node.node_id
        if isinstance(node, Group):
            yield from _parts_of(node.children, seen)
            continue
        if node.contract is not None:
            yield schema_of(node.contract.input_schema).fingerprint
            yield schema_of(node.contract.output_schema).fingerprint
        if isinstance(node, FlowNode) and node.node_id not in seen:
            seen.add(node.node_id)
            flow: Any = node.func
            if isinstance(flow.body, FunctionType):
                with contextlib.suppress(Exception):  # Its file is gone or is another one.
                    yield inspect.getsource(flow.body)
                yield from _parts_of(_named_nodes(flow.body), seen)


def steps_of(nodes: Iterable[Node | Group]) -> list[Node | Group]:
    """Return the nodes that the bodies of flows among ``nodes`` name, and the flows which those call."""
    steps: dict[Node | Group, None] = {}
    remaining = list(nodes)
    while remaining:
        node = remaining.pop(0)
        if isinstance(node, Group):
            remaining += node.children
        flow: Any = node.func if isinstance(node, FlowNode) else None
        if isinstance(getattr(flow, "body", None), FunctionType):
            new = [one for one in _named_nodes(flow.body) if one not in steps]
            steps.update(dict.fromkeys(new))
            remaining += new
    return list(steps)


def _named_nodes(function: FunctionType) -> Iterator[Node | Group]:
    """Yield the nodes that a function finds by name: in its module, or in the function around it."""
    cells = function.__closure__ or ()
    values = [function.__globals__.get(name) for name in function.__code__.co_names]
    for cell in cells:
        with contextlib.suppress(ValueError):  # It is empty.
            values.append(cell.cell_contents)
    for value in values:
        is_marked = isinstance(value, (FunctionType, Pipeline)) and hasattr(value, "_stroma_node_id")
        if is_marked or isinstance(value, Group):
            yield find_node(value)


_MAX_PRIORITY: Final = 1_000_000_000  # Every store has such numbers exactly.
_MAX_SECONDS: Final = 100_000_000_000  # 3,168 years: a time that a datetime can have.


class SubmitOptions(TypedDict, total=False):
    """Keywords of :meth:`StromaRunner.submit`.

    Attributes:
        run_id: id of the run, any text; by default that of the config, else a new one.
        delay: earliest start: seconds from now, a timedelta, or a datetime with a time zone.
        priority: runs with a lower number start first; the default is 0.
        key: runs of one key share the workers fairly with those of other keys, for instance a customer's id.
        expires: latest start, as ``delay``. A run that no worker has started by then is FAILED with reason
            "expired".
    """

    run_id: str | None
    delay: float | timedelta | datetime | None
    priority: int
    key: str | None
    expires: float | timedelta | datetime | None


def to_ms(value: float | timedelta | datetime, now_ms: int, name: str) -> int:
    """Return a time in ms since the epoch: seconds from now, after a duration, or at a time with a zone.

    Raises ValueError for a negative or infinite number, a time without a zone, and one after the year 9999.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{name} must have a time zone, got {value!r}; use datetime.now(UTC) + ...")
        return min(round(value.timestamp() * 1000), LAST_MS)
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be seconds, a timedelta or a datetime, got {value!r}")
    if not 0 <= seconds < _MAX_SECONDS:
        raise ValueError(f"{name} must be from 0 to {_MAX_SECONDS:,} seconds, got {value!r}")
    return now_ms + round(seconds * 1000)


def queue_entry(options: SubmitOptions, now_ms: int) -> QueueEntry:
    """Return the place in the queue of a run that is submitted now. Raises TypeError, ValueError."""
    check_keywords("submit", options, SubmitOptions)
    delay, expires = options.get("delay"), options.get("expires")
    key, priority = options.get("key"), options.get("priority", 0)
    if not isinstance(priority, int) or abs(priority) > _MAX_PRIORITY:
        raise ValueError(
            f"priority must be a whole number from -{_MAX_PRIORITY} to {_MAX_PRIORITY}, got {priority!r}"
        )
    due_ms = to_ms(0 if delay is None else delay, now_ms, "delay")
    expires_ms = None if expires is None else to_ms(expires, now_ms, "expires")
    if expires_ms is not None and delay is not None and expires_ms < due_ms:
        raise ValueError(f"expires must not be before delay, or the run can never start, got {expires!r}")
    # A member of an IntEnum is stored as its number.
    return QueueEntry(due_ms, int(priority), None if key is None else check_label(key, "key"), expires_ms)
