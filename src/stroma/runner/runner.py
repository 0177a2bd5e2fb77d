"""StromaRunner: runs sequences of nodes in this process."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeAlias, TypeVar, cast, overload

from pydantic import BaseModel

from stroma.checkpoint import (
    AsyncCheckpointStore,
    CheckpointManager,
    CheckpointStore,
    PipelineChanged,
    RunBusy,
    RunExists,
    StoreError,
)
from stroma.checkpoint.entries import MAX_DELAY_SECONDS, RunRequest
from stroma.checkpoint.events import EventPlace, parse_cursor
from stroma.checkpoint.queue import ServedCode
from stroma.contracts.contract import ContractRegistry, Reconcile, Role, check_id
from stroma.contracts.node import (
    AnnotatedNodeDecorator,
    DepsT,
    FlowNode,
    NodeDecorator,
    ResultT,
    mark_annotated,
)
from stroma.cost.budget import ExecutionBudget
from stroma.cost.fallback import FallbackPolicy
from stroma.engine.config import RunConfig, default_config
from stroma.engine.config import new_run_id as fresh_run_id
from stroma.engine.context import BY_HAND, Dispatch, ReliabilityContext
from stroma.engine.tasks import has_running_loop
from stroma.failures.failure import Classifier
from stroma.hooks.sets import NodeHooks, check_plain, distinct, flatten
from stroma.runner.flows.body_loop import refuse_in_body
from stroma.runner.flows.suspension import now_ms
from stroma.runner.live_runs import Batch, LiveRuns
from stroma.runner.pipeline import (
    AnyState,
    Pipeline,
    RunKeywords,
    check_config,
    check_keywords,
    check_state,
    code_of,
    find_position,
    input_schema_of,
    list_nodes,
    nodes_of,
    override_config,
    queue_entry,
    refuse_unknown_ids,
    require_runnable,
    steps_of,
    warn_of_unknown_ids,
    with_hooks,
)
from stroma.runner.run import RunExecution, set_traceparent
from stroma.runner.stored_runs import ServedPipeline, StoredRuns, limits_of
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from typing import Unpack

    from stroma.contracts.checks.types import Finding
    from stroma.engine.config import NodeTimeout, OtherFields, Policies
    from stroma.runner.drive import DriveOutcome, RunDriver
    from stroma.runner.events import StreamEvent
    from stroma.runner.flows.flow import AnnotatedFlowDecorator, Flow, FlowDecorator, FlowFunction, FlowLimits
    from stroma.runner.pipeline import SubmitOptions
    from stroma.runner.rehearsal import Answers
    from stroma.runner.stream import RunStream
    from stroma.runner.submission import EndWaits, RunHandle
    from stroma.runner.worker import WorkerHealth


In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)
#: The calls of a body in place of a run.
_STEPS: Final = "await flow.step(node, state), or flow.run(flow_or_pipeline, state)"
#: What a run executes; type checkers know the classes of the states of flows only.
Nodes: TypeAlias = Pipeline | Iterable[Any]
OtherNodes: TypeAlias = AnyState | Iterable[Any]

#: Warning, given once, of a submission to a runner without a store.
_MEMORY: Final = "is only in the memory of this process, which must serve it; pass store= to keep it"


class StromaRunner(Generic[DepsT]):
    """Runs sequences of nodes under one configuration. Tasks, threads and event loops may share it.

    ``StromaRunner[Deps]`` tells type checkers the class of the context, which nodes receive as ``ctx``; a
    plain dict by default.
    """

    def __init__(
        self,
        registry: ContractRegistry,
        checkpoint_manager: CheckpointManager,
        config: RunConfig | None = None,
    ) -> None:
        if not isinstance(registry, ContractRegistry):
            raise TypeError(f"registry must be a ContractRegistry, got {type(registry).__name__}")
        if not isinstance(checkpoint_manager, CheckpointManager):
            raise TypeError(
                f"checkpoint_manager must be a CheckpointManager, got {type(checkpoint_manager).__name__}; "
                "pass CheckpointManager(store)"
            )
        check_config(config)
        self.registry = registry
        self.checkpoint_manager = checkpoint_manager
        self._live = LiveRuns()
        self._waits: dict[asyncio.AbstractEventLoop, EndWaits] = {}
        self._caller: Any = None  # Calls nodes with a place.
        self._flows: dict[str, Pipeline] = {}  # By id.
        self.warned: set[str] = set()  # Warnings that were logged.
        self._exporters: list[NodeHooks] = []  # Of pipelines and runs with hooks of their own.
        self.config = config if config is not None else default_config()

    @classmethod
    def quick(
        cls,
        *,
        store: CheckpointStore | AsyncCheckpointStore | str | os.PathLike[str] | None = None,
        budget: ExecutionBudget | None = None,
        policy_map: Policies | None = None,
        classifiers: list[Classifier] | None = None,
        hooks: NodeHooks | Sequence[NodeHooks] | None = None,
        **config: Unpack[OtherFields[DepsT]],
    ) -> StromaRunner[DepsT]:
        """Create a runner, with an in-memory store by default; further keywords are fields of RunConfig.

        ``store``: a store, or the URL or path of one, see :func:`stroma.open_store`. Raises pydantic's
        ValidationError for a keyword that is not a field of RunConfig, TypeError for an object that is not a
        store, ValueError for an unknown URL, StoreError for a file in a directory that does not exist.
        """
        named = {"budget": budget, "policy_map": policy_map, "classifiers": classifiers, "hooks": hooks}
        fields: dict[str, Any] = {**config}
        for name, value in named.items():
            if value is not None:
                fields[name] = value
        if store is None:
            from stroma.checkpoint.memory.store import AsyncInMemoryStore  # Not loaded by other runners.

            store = AsyncInMemoryStore()
            store.is_default = True
        elif isinstance(store, (str, os.PathLike)):
            from stroma.checkpoint import open_store

            store = open_store(store)
        return cls(ContractRegistry(), CheckpointManager(store), RunConfig(**fields) if fields else None)

    # ------------------------------------------------------------------ builders

    def _replace(self, **fields: Any) -> Self:
        # A new config object: the old one may be shared with another runner.
        valid = RunConfig(**fields)
        changed = self.config.model_copy(update={name: getattr(valid, name) for name in fields})
        changed.__pydantic_fields_set__ = self.config.model_fields_set | fields.keys()
        self.config = changed
        return self

    def with_redis(self, redis_url: str, ttl_seconds: int = 3600) -> Self:
        """Store checkpoints in Redis. Raises ImportError without its driver."""
        from stroma.checkpoint.redis.store import RedisStore

        self.checkpoint_manager = CheckpointManager(RedisStore(redis_url, ttl_seconds))
        return self

    def with_budget(
        self, *, tokens: int | None = None, cost_usd: float | None = None, latency_ms: int | None = None
    ) -> Self:
        """Limit each run: tokens (input + output), US dollars, milliseconds of attempts."""
        limits = ExecutionBudget(max_tokens_total=tokens, max_cost_usd=cost_usd, max_latency_ms=latency_ms)
        return self._replace(budget=limits)

    def with_model_fallback(self, model: str, *, to: str, at_budget_pct: float = 0.80) -> Self:
        """Signal a cheaper model once a share (0 to 1) of the cost limit is spent. Earlier fallbacks stay."""
        added = FallbackPolicy(model, to, at_budget_pct)
        return self._replace(model_fallbacks=[*self.config.model_fallbacks, added])

    def with_classifiers(self, classifiers: list[Classifier]) -> Self:
        """Replace the classifiers of exceptions."""
        return self._replace(classifiers=classifiers)

    def with_hooks(self, hooks: NodeHooks | Sequence[NodeHooks]) -> Self:
        """Replace the hooks."""
        return self._replace(hooks=hooks)

    def with_context(self, context: DepsT) -> Self:
        """Replace the object that each node receives as ``ctx``."""
        return self._replace(context=context)

    def with_policy_map(self, policy_map: Policies) -> Self:
        """Replace the retry policies by failure class."""
        return self._replace(policy_map=policy_map)

    def with_node_policies(self, node_policies: Mapping[str, Policies]) -> Self:
        """Replace the retry policies of single nodes, by node id."""
        return self._replace(node_policies=node_policies)

    def with_node_timeouts(self, node_timeouts: Mapping[str, int | NodeTimeout]) -> Self:
        """Replace the time limits of nodes: milliseconds or a NodeTimeout by node id."""
        return self._replace(node_timeouts=node_timeouts)

    @overload
    def node(self, func: Callable[[In], ResultT], /) -> Callable[[In], ResultT]: ...
    @overload
    def node(self, func: Callable[[In, DepsT], ResultT], /) -> Callable[[In, DepsT], ResultT]: ...
    @overload
    def node(
        self,
        node_id: str | None = None,
        *,
        input: type[In],
        output: type[Out],
        upcast: Callable[[Any], Any] | None = None,
        effect: bool = False,
        reconcile: Reconcile[In, Out] | None = None,
        role: Role | None = None,
        place: str | None = None,
    ) -> NodeDecorator[In, Out, DepsT]: ...
    @overload
    def node(
        self,
        node_id: str | None = None,
        *,
        upcast: Callable[[Any], Any] | None = None,
        effect: bool = False,
        reconcile: Reconcile[Any, Any] | None = None,
        role: Role | None = None,
        place: str | None = None,
    ) -> AnnotatedNodeDecorator[DepsT]: ...
    def node(
        self,
        node_id: str | Callable[..., Any] | None = None,
        *,
        input: type[BaseModel] | None = None,
        output: type[BaseModel] | None = None,
        upcast: Callable[[Any], Any] | None = None,
        effect: bool = False,
        reconcile: Reconcile[Any, Any] | None = None,
        role: Role | None = None,
        place: str | None = None,
    ) -> Any:
        """Mark a function as a node, and register its contract with this runner. Other runners take it too.

        The id is the function's name and the models are those of its annotations, unless they are passed:
        ``@runner.node`` needs no parentheses. ``stroma_node`` does the same without a runner, and describes
        what the function takes and returns. ``upcast``: for outputs recorded with an earlier class,
        ``effect``, ``reconcile``: for a node that must not be called twice blindly, ``role``: for traces,
        ``place``: for a node that a worker of a Temporal task queue calls (experimental); see NodeContract.
        It raises TypeError for a function whose annotations name other models or none, ValueError if another
        function has the id.
        """
        options = {"upcast": upcast, "effect": effect, "reconcile": reconcile, "role": role, "place": place}

        def register(func: Any, node_id: str | None, scope: FrameType) -> Any:
            node = mark_annotated(func, node_id, scope, (input, output), **options)
            self.registry.decorate(func, node._stroma_contract)
            return node

        if node_id is not None and not isinstance(node_id, str):
            return register(node_id, None, sys._getframe(1))
        return lambda func: register(func, node_id, sys._getframe(1))

    @overload
    def flow(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...
    @overload
    def flow(
        self, name: str | None = None, *, input: type[In], output: type[Out], **limits: Unpack[FlowLimits]
    ) -> FlowDecorator[In, Out]: ...
    @overload
    def flow(self, name: str | None = None, **limits: Unpack[FlowLimits]) -> AnnotatedFlowDecorator: ...
    def flow(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        input: type[BaseModel] | None = None,
        output: type[BaseModel] | None = None,
        **limits: Unpack[FlowLimits],
    ) -> Any:
        """Make a flow of an async function, and register its contract. See ``stroma_flow``."""
        from stroma.runner.flows.flow import define_flow  # Not loaded by runs without flows.

        def register(body: Any, name: str | None, scope: FrameType) -> Any:
            flow = define_flow(name, body, (input, output), limits, scope)
            contract = flow.node.contract
            assert contract is not None
            self.registry.decorate(body, contract)
            self._flows[flow.node.node_id] = flow
            return flow

        if name is not None and not isinstance(name, str):
            return register(name, None, sys._getframe(1))
        return lambda body: register(body, name, sys._getframe(1))

    # ------------------------------------------------------------------ checking

    def check(self, node_sequence: Nodes, *, input_schema: type[BaseModel] | None = None) -> list[Finding]:
        """Check, field by field, that each node's output can satisfy the next node's input.

        Nothing is called. An error can never work; a warning may fail, or cannot be decided. Nodes without a
        contract accept and return anything. ``input_schema``: the class of the initial state, to be checked
        too. Raises TypeError for anything that is not a node, ValueError for a function whose id was later
        assigned to another one with another contract.
        """
        from stroma.contracts.checks.check import check_nodes  # Not loaded by runs that check nothing.

        nodes = nodes_of(node_sequence)
        require_runnable(nodes, self.registry)
        retried = self._config_of(node_sequence).retried_ids
        return check_nodes(nodes, self.registry, input_schema, retried=retried, steps=steps_of(nodes))

    async def check_deterministic(
        self,
        flow: FlowFunction[In, Out],
        initial_state: In,
        *,
        answers: Answers = (),
        messages: Sequence[Any] = (),
    ) -> ExecutionResult[Out]:
        """Run a flow once in memory, calling its steps, then replay it at another time of day without a call.

        Returns the result of the run. Raises PipelineChanged if the replay makes other calls or ends
        otherwise: if ``time.time()``, ``datetime.now()`` or ``random`` decide what the flow does, say. Hooks
        are not called, and timers pass at once.

        ``answers``: of questions, in the order in which they are asked, or a function of the Question that
        returns the answer. ``messages``: to the run, each sent when it waits; (topic, message) for a topic. A
        wait without a reply ends with its time limit; None as an answer leaves it to that. Raises ValueError
        for a wait without a reply that has none.
        """
        from stroma.runner.rehearsal import Rehearsal, check_flow  # Not loaded by runs.

        return await check_flow(self, flow, initial_state, Rehearsal(answers, messages))

    # ------------------------------------------------------------------ running

    @overload
    async def run(
        self, node_sequence: FlowFunction[In, Out], initial_state: In, **options: Unpack[RunKeywords[DepsT]]
    ) -> ExecutionResult[Out]: ...
    @overload
    async def run(
        self, node_sequence: OtherNodes, initial_state: BaseModel, **options: Unpack[RunKeywords[DepsT]]
    ) -> ExecutionResult: ...
    async def run(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]
        self, node_sequence: Nodes, initial_state: BaseModel, **options: Unpack[RunKeywords[DepsT]]
    ) -> ExecutionResult[Any]:
        """Run nodes one after the other, each on the output of the one before.

        ``options`` override the config's fields, see :class:`RunKeywords`. A failure inside the pipeline is a
        result: FAILED or PARTIAL, with ``result.failure``. Raises TypeError for anything that is not a node
        and for a hook that is not async, ValueError for an unknown resume target, an id in the config that
        neither the pipeline nor the registry has, or a function whose id was later assigned to another one
        with another contract, StoreError (CheckpointNotFound, PipelineChanged ...) if the run cannot start,
        CheckFailed with ``RunConfig(check=True)``.
        """
        return await self._run(node_sequence, initial_state, options)

    async def _run(
        self,
        node_sequence: Nodes,
        initial_state: BaseModel,
        options: RunKeywords[Any],
        dispatch: Dispatch = BY_HAND,
        watch: NodeHooks | None = None,
    ) -> ExecutionResult:
        """Implement :meth:`run`. ``dispatch``: how a dispatcher opens the run; ``watch``: further hooks."""
        refuse_in_body("runner.run()", _STEPS)
        config = self._config_of(node_sequence)
        if options:
            config = override_config(config, options)
        nodes = nodes_of(node_sequence)
        check_state("the initial state", initial_state, nodes[0] if nodes else None)
        if dispatch.if_exists == "read":
            require_runnable(nodes, self.registry)
        else:
            require_runnable(nodes, self.registry, self._caller)
        target = config.resume_from
        if target is not None and options.get("retry_failed_items"):
            raise ValueError("retry_failed_items and resume_from exclude each other; pass one")
        start = None if target is None else find_position(nodes, target, "resume_from")
        if config.check:
            from stroma.contracts.checks.check import raise_errors

            raise_errors(nodes, self.registry)
        if config.hooks is not self.config.hooks:
            exporters = [one for one in flatten(config.hooks) if hasattr(one, "flush")]
            if exporters:  # For flush(): one for each destination.
                self._exporters[:] = distinct((*self._exporters, *exporters))
        if watch is not None:
            config = with_hooks(config, watch)
        if config.events == "store":
            from stroma.runner.follow import with_event_log  # Not loaded by most runs.

            config = with_event_log(config)
        ctx = ReliabilityContext.for_run(config, self.registry, self.checkpoint_manager)
        if isinstance(node_sequence, Pipeline):
            ctx.pipeline, ctx.journal.versions = node_sequence.name, node_sequence.versions
        names_ids = config.names_ids
        if names_ids:
            refuse_unknown_ids(config, nodes, self.registry, ctx.pipeline)
        if (traceparent := options.get("traceparent")) is not None:
            set_traceparent(ctx, traceparent)
        ctx.journal.dispatch, ctx.journal.caller = dispatch, self._caller
        execution = RunExecution(ctx, nodes, initial_state, start)
        self._live.runs.add(execution)
        try:
            result = await execution.run()
        finally:
            self._live.runs.discard(execution)  # Until then a shutdown includes it.
            if execution.ended is not None and not execution.ended.done():
                execution.ended.set_result(None)
        if names_ids:
            warn_of_unknown_ids(ctx, nodes, result, self.warned)
        return result

    @overload
    async def resume(
        self, node_sequence: FlowFunction[Any, Out], run_id: str, **options: Any
    ) -> ExecutionResult[Out]: ...
    @overload
    async def resume(
        self,
        node_sequence: Nodes,
        run_id: str,
        *,
        input_schema: type[BaseModel] | None = None,
        **options: Any,
    ) -> ExecutionResult: ...
    async def resume(
        self,
        node_sequence: Nodes,
        run_id: str,
        *,
        input_schema: type[BaseModel] | None = None,
        **options: Any,
    ) -> ExecutionResult[Any]:
        """Resume a run of the store where it stopped, in any process; committed nodes are not called again.

        ``input_schema``: the class of the run's original input; by default the input of the first node.
        Further keywords are those of :meth:`run`. Raises CheckpointNotFound, PipelineChanged, RunBusy while
        another process owns the run, StoreError if the store has no journal, TypeError if the pipeline starts
        with a group and ``input_schema`` is missing.
        """
        nodes = _listed(node_sequence)
        schema = input_schema_of(nodes_of(nodes), self.registry, input_schema)
        state = await self._stored.read_input(run_id, schema)
        fixed: RunKeywords[Any] = {"run_id": run_id, "resume": True}
        dispatch = Dispatch(if_exists="continue")
        return await self._run(nodes, state, cast("RunKeywords[Any]", options | fixed), dispatch)

    def stream(
        self,
        node_sequence: Nodes,
        initial_state: BaseModel,
        *,
        buffer: int = 1000,
        **options: Unpack[RunKeywords[DepsT]],
    ) -> RunStream:
        """Return the events of :meth:`run` as an async iterator, while they happen; see :class:`RunStream`.

        The run starts with the first event that is read, or with ``async with``. If the reader leaves before
        its end, it is CANCELLED. ``buffer``: events that may be pending for the reader; with more of them the
        run waits. ``options`` are those of :meth:`run`. The iterator raises what ``run()`` would raise.
        Raises ValueError for an invalid ``buffer``.
        """
        from stroma.runner.stream import RunStream

        nodes = _listed(node_sequence)
        return RunStream(lambda watch: self._run(nodes, initial_state, options, watch=watch), buffer)

    def follow(self, run_id: str, after: str | None = None) -> AsyncIterator[StreamEvent]:
        """Yield the events of a run of the store to its end; needs ``RunConfig(events="store")``.

        The run may be in any process. ``after``: the cursor of the last event that was seen, in place of the
        start. The follow goes on over suspensions ("run_suspended" for each) and processes that die, and ends
        with "run_end". No event comes twice, and none of a process whose run another one has taken over.
        Ending the iteration changes nothing. All followers in an event loop share the reads of a run, up to
        10 a second. A run without stored events has suspensions and an end only.

        Raises ValueError for a text that is not a cursor; while it is iterated, CheckpointNotFound for an
        unknown run, and for one that is deleted or restarted meanwhile, StoreError.
        """
        from stroma.runner.follow import follow  # Not loaded by runs.

        place = EventPlace(0, 0) if after is None else parse_cursor(after)
        return follow(self._stored, check_id(run_id, "run id"), place, self.config.redact)

    def map_outputs(self, run_id: str, node: Any) -> AsyncIterator[tuple[int, Any]]:
        """Yield (index, output) of each finished item of a map, in order, with a few in memory at a time.

        ``node``: the ``map_over(...)`` itself, with ``into=Journal()`` or a file. An output is a model, or
        plain data of a node without a contract; an item that failed is an ItemFailure. Raises
        CheckpointNotFound, CorruptCheckpoint, StoreError, TypeError for anything but such a map.
        """
        return self._stored.read_map(run_id, node)

    @overload
    def run_sync(
        self, node_sequence: FlowFunction[In, Out], initial_state: In, **options: Unpack[RunKeywords[DepsT]]
    ) -> ExecutionResult[Out]: ...
    @overload
    def run_sync(
        self, node_sequence: OtherNodes, initial_state: BaseModel, **options: Unpack[RunKeywords[DepsT]]
    ) -> ExecutionResult: ...
    def run_sync(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]
        self, node_sequence: Nodes, initial_state: BaseModel, **options: Unpack[RunKeywords[DepsT]]
    ) -> ExecutionResult[Any]:
        """Call :meth:`run` without an event loop. Raises RuntimeError where one is running.

        At its end the file of an SQLiteStore is whole without its ``-wal`` file, unless another process uses
        it.
        """
        refuse_in_body("runner.run_sync()", _STEPS)
        if has_running_loop():
            fix = "use `await runner.run(...)` in place of run_sync(...)"
            raise RuntimeError(f"an event loop is already running; {fix}")

        async def run_and_merge() -> ExecutionResult[Any]:
            try:
                return await self._run(node_sequence, initial_state, options)
            finally:
                merge_log = getattr(self.checkpoint_manager.store, "merge_log", None)
                if merge_log is not None:
                    with suppress(StoreError):  # It stays in the -wal file.
                        await merge_log()

        return asyncio.run(run_and_merge())

    @overload
    async def run_many(
        self,
        node_sequence: FlowFunction[In, Out],
        inputs: Iterable[In],
        *,
        max_concurrency: int = 10,
        run_ids: Callable[[int, In], str] | None = None,
        recover: bool = False,
        on_result: Callable[[int, ExecutionResult[Out] | Exception], None] | None = None,
        **options: Unpack[RunKeywords[DepsT]],
    ) -> list[ExecutionResult[Out] | Exception]: ...
    @overload
    async def run_many(
        self,
        node_sequence: OtherNodes,
        inputs: Iterable[In],
        *,
        max_concurrency: int = 10,
        run_ids: Callable[[int, In], str] | None = None,
        recover: bool = False,
        on_result: Callable[[int, ExecutionResult | Exception], None] | None = None,
        **options: Unpack[RunKeywords[DepsT]],
    ) -> list[ExecutionResult | Exception]: ...
    async def run_many(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]
        self,
        node_sequence: Nodes,
        inputs: Iterable[Any],
        *,
        max_concurrency: int = 10,
        run_ids: Callable[[int, Any], str] | None = None,
        recover: bool = False,
        on_result: Callable[[int, Any], None] | None = None,
        **options: Unpack[RunKeywords[DepsT]],
    ) -> list[Any]:
        """Call :meth:`run` for each input, at most ``max_concurrency`` at once; return the outcomes in order.

        An exception of ``run()`` takes the place of its result, and stops no other run. ``inputs`` is read
        only as runs start, so it may be a long iterator. ``run_ids`` returns the id of each run for its
        0-based number and input; ``on_result`` is called with each outcome as it arrives. ``recover``: first
        resume the interrupted runs of this pipeline, whose outcomes are not returned; a pipeline that starts
        with a group needs :meth:`recover` with ``input_schema`` in its place. After a :meth:`shutdown` no
        further run starts, and only the outcomes of those that did are returned. An exception of ``inputs``,
        ``run_ids`` or ``on_result`` cancels the runs in flight and is raised.
        """
        check_keywords("run_many", options, RunKeywords)
        if run_ids is not None:
            check_plain("run_ids", run_ids, ("number", "state"))
        if on_result is not None:
            check_plain("on_result", on_result, ("number", "outcome"))
        nodes = _listed(node_sequence)

        def runs() -> Iterator[tuple[int, Callable[[], Coroutine[Any, Any, ExecutionResult]]]]:
            for number, state in enumerate(inputs):
                own = {} if run_ids is None else {"run_id": run_ids(number, state)}
                yield number, partial(self.run, nodes, state, **{**options, **own})

        with self._live.batch() as batch:
            if recover:
                await self._recover(nodes, batch, max_concurrency, None, options)
            outcomes = await batch.run_each(runs(), max_concurrency, on_result)
            return [outcomes[number] for number in sorted(outcomes)]

    async def recover(
        self,
        node_sequence: Nodes,
        *,
        max_concurrency: int = 10,
        input_schema: type[BaseModel] | None = None,
        **options: Unpack[RunKeywords[DepsT]],
    ) -> dict[str, ExecutionResult | Exception]:
        """Resume every run of this pipeline whose process died or shut down; return the outcomes by run id.

        Runs that another process owns are skipped. Runs are found by the pipeline's name. ``input_schema``:
        the class of their original inputs; by default the input of the first node. Raises StoreError if the
        store has no journal, TypeError if the pipeline starts with a group and ``input_schema`` is missing.
        """
        nodes = _listed(node_sequence)
        with self._live.batch() as batch:
            return await self._recover(nodes, batch, max_concurrency, input_schema, options)

    async def _recover(
        self,
        nodes: Pipeline | list[Any],
        batch: Batch,
        max_concurrency: int,
        input_schema: type[BaseModel] | None,
        options: RunKeywords[Any],
    ) -> dict[str, ExecutionResult | Exception]:
        name = nodes.name if isinstance(nodes, Pipeline) else self.config.pipeline
        schema = input_schema_of(nodes_of(nodes), self.registry, input_schema)
        code = code_of(nodes) if isinstance(nodes, Pipeline) else ServedCode()
        served = ServedPipeline(nodes, schema, code=code)
        run_ids = await self._stored.find_interrupted(name, code.versions)
        # The delay of a dispatcher after a setback does not bind a program that starts.
        due = Dispatch(now_ms() + int(1000 * MAX_DELAY_SECONDS))
        resume = partial(self._driver(batch, options).resume, served=served, dispatch=due)
        runs = ((run_id, partial(resume, run_id)) for run_id in run_ids)
        outcomes = await batch.run_each(runs, max_concurrency)
        # Without runs that another process has taken meanwhile.
        return {key: one for key, one in outcomes.items() if not isinstance(one, (RunBusy, RunExists))}

    async def serve(
        self,
        *pipelines: Pipeline,
        max_concurrency: int = 10,
        poll_seconds: float = 1.0,
        health: WorkerHealth | None = None,
        on_result: Callable[[str, ExecutionResult | Exception], None] | None = None,
    ) -> None:
        """Continue the runs of these flows and pipelines that are due, until :meth:`shutdown`.

        Due are submitted runs, runs whose process died or shut down, suspended runs whose sleep or timeout is
        over, and runs with a new answer. Any number of processes may serve one store: each run is continued
        by one of them, at most ``max_concurrency`` at once in this one. The store is queried every
        ``poll_seconds``, varied by half of it. ``on_result`` is called with the id and the outcome of each
        run; ``health`` has the condition of the worker. A run that cannot be resumed is logged and tried
        again later.
        Cancelling the call ends its runs as INTERRUPTED.

        Raises ValueError for two pipelines of one name, for invalid numbers and for a config with ids of
        unknown nodes, TypeError for anything but flows and Pipelines and for one that starts with a group,
        StoreError if the store has no journal or cannot be used.
        """
        from stroma.runner.worker import (
            RunWorker,
            readers_of,  # Not loaded by runs, like the next.
        )

        if on_result is not None:
            check_plain("on_result", on_result, ("run_id", "outcome"))
        served = [one for one in pipelines if isinstance(one, Pipeline)]  # The worker refuses anything else.
        for one in served:
            refuse_unknown_ids(self._config_of(one), nodes_of(one), self.registry, one.name)
            require_runnable(nodes_of(one), self.registry, self._caller)
        with self._live.batch() as batch:
            readers = {one.name: readers_of(self._config_of(one).hooks) for one in served}
            worker = RunWorker(self._stored, self._driver(batch, {}), batch, self._live, health, readers)
            await worker.serve(pipelines, max_concurrency, poll_seconds, on_result)

    async def drive(
        self, run_id: str, *, pipelines: Sequence[Pipeline] = (), max_seconds: float | None = 900.0
    ) -> DriveOutcome:
        """Continue a run of the store as far as possible, if it is due. Safe to call at any time.

        This is what a dispatcher calls: a worker, Temporal, a job of Kubernetes or Celery. The outcome is a
        value:

        - ``Ended``: the run has ended, with its status;
        - ``Suspended``: it waits until a time, or for answers to its questions;
        - ``Yielded``: ``max_seconds`` were over, or :meth:`shutdown` was called; it was interrupted at a step
          boundary, and is due at once;
        - ``Busy``: another process owns it, at least until the time that it names;
        - ``Blocked``: this code cannot continue it, for the reason that it names: its calls or nodes are
          others than those that are recorded, or it has another version. The run stays as it was, with a mark
          of that.

        ``pipelines``: flows and Pipelines, in addition to the flows of this runner. The nodes of the run are
        those of the pipeline with its name. ``max_seconds``: None for no limit. Raises CheckpointNotFound for
        an unknown run, StoreError if the store has no journal or fails; TypeError for a pipeline that starts
        with a group. Cancelling the call leaves the run INTERRUPTED, and due.
        """
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, got {max_seconds!r}")
        served = self._stored.served([*self._flows.values(), *pipelines])
        with self._live.batch() as batch:
            return await self._driver(batch, {}).drive(run_id, served.get, max_seconds)

    @overload
    async def submit(
        self, pipeline: FlowFunction[In, Out], initial_state: In, **options: Unpack[SubmitOptions]
    ) -> RunHandle[Out]: ...
    @overload
    async def submit(
        self, pipeline: AnyState, initial_state: BaseModel, **options: Unpack[SubmitOptions]
    ) -> RunHandle[BaseModel]: ...
    async def submit(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]
        self, pipeline: Pipeline, initial_state: BaseModel, **options: Unpack[SubmitOptions]
    ) -> RunHandle[Any]:
        """Create a run with status QUEUED, which a worker starts (see :meth:`serve`), and return its handle.

        Once this returns, the run is stored. A run of that id with the same pipeline and input gives its
        handle, whatever its status; nothing is restarted. For the keywords see :class:`SubmitOptions`. Raises
        pydantic's ValidationError for an input that breaks the contract, TypeError for anything but a flow or
        Pipeline, one that starts with a group, and an unknown keyword, RunExists for a run of that id with
        another pipeline or input, ValueError for an invalid value, StoreError.
        """
        refuse_in_body("runner.submit()", "await flow.submit(flow_or_pipeline, state)")
        served = self._stored.served([pipeline])[pipeline.name]
        check_state("the initial state", initial_state, next(iter(nodes_of(pipeline)), None))
        entry, given_id = queue_entry(options, now_ms()), options.get("run_id")
        config = self._config_of(pipeline)
        run_id = config.take_run_id() if given_id is None else check_id(given_id, "run id")
        state = served.schema.convert(initial_state)
        version = pipeline.version or ""
        request = RunRequest(run_id, pipeline.name, state, served.schema, tags=config.tags, version=version)
        await self._stored.journal("submit").submit(request, entry)
        if getattr(self.checkpoint_manager.store, "is_default", False) and _MEMORY not in self.warned:
            self.warned.add(_MEMORY)
            # Not a log record: without a handler for logs, nobody would learn that no worker sees the run.
            warnings.warn(f"run {run_id!r} {_MEMORY}", UserWarning, stacklevel=2)
        return self.handle(run_id, pipeline)

    @overload
    def handle(self, run_id: str, pipeline: FlowFunction[Any, Out]) -> RunHandle[Out]: ...
    @overload
    def handle(self, run_id: str, pipeline: Pipeline | None = None) -> RunHandle[Any]: ...
    def handle(self, run_id: str, pipeline: Pipeline | None = None) -> RunHandle[Any]:
        """Return the handle of a run of any origin.

        ``pipeline``: the flow or Pipeline of the run, for its result; by default the flow of this runner with
            its name.
        """
        from stroma.runner.submission import HandleCalls, RunHandle  # Not loaded by runs.

        async def read(run_id: str) -> ExecutionResult[Any]:
            served = self._stored.served([*self._flows.values()] if pipeline is None else [pipeline])
            record = await self._stored.get(run_id)
            if record.pipeline not in served:
                name = record.pipeline
                raise PipelineChanged(
                    f"run {run_id!r} is of pipeline {name!r}, which is not known here; pass it to handle()"
                )
            # Without hooks: the process that executes the run calls them.
            reader = StromaRunner(self.registry, self.checkpoint_manager, RunConfig(run_id=run_id))
            nodes, schema, *_ = served[record.pipeline]
            state = await self._stored.read_input(run_id, schema)
            return await reader._run(nodes, state, {}, Dispatch(if_exists="read"))

        calls = HandleCalls(read, self.follow, self.send, self.cancel)
        return RunHandle(run_id, self._stored, self._waits_here, calls)

    def _driver(self, batch: Batch, options: RunKeywords) -> RunDriver:
        from stroma.runner.drive import RunDriver  # Not loaded by runs.

        async def run(
            nodes: Pipeline | list[Any], state: BaseModel, run_id: str, dispatch: Dispatch
        ) -> ExecutionResult:
            fixed: RunKeywords[Any] = {"run_id": run_id, "resume": True, "if_running": "error"}
            return await self._run(nodes, state, {**options, **fixed}, dispatch)

        return RunDriver(self._stored, batch, run)

    async def fork(
        self,
        run_id: str,
        node_sequence: Nodes,
        *,
        at: str,
        state: BaseModel | None = None,
        output: BaseModel | None = None,
        new_run_id: str | None = None,
        input_schema: type[BaseModel] | None = None,
        **options: Any,
    ) -> ExecutionResult:
        """Start a new run that continues another one from a node, and records where it came from.

        ``at``: the first position with this id runs next; or the first call of this node in a flow, or the
        call at this place, such as "write#4": the flow gets again what it got before the end of that call.
        ``state``: the input of the position, in place of the recorded one, or of an output of the node before
        that is missing because that node failed. ``output``: the output of the node or call ``at`` itself,
        which is not called: if it failed, and nothing else can produce its output. Of several calls of a node
        it is that of the one whose failure stopped the run. The other run stays as it is.
        ``input_schema``: the class of its input, if the pipeline starts with a group. Raises
        CheckpointNotFound, RunExists, ValueError for an unknown node and for both ``state`` and ``output``,
        TypeError for one that is not a model.
        """
        if state is not None and output is not None:
            raise ValueError("state= and output= exclude each other; pass one")
        for model in (state, output):
            if model is not None:
                check_state("the state of a fork", model)
        if options.get("retry_failed_items"):
            raise ValueError("a fork retries no failed items; resume the run with retry_failed_items first")
        nodes = _listed(node_sequence)
        records = nodes_of(nodes)
        flow = next((one for one in records if isinstance(one, FlowNode)), None)
        call = None if flow is None or at in [one.node_id for one in records] else at
        if call is not None and state is not None:
            why = f"{at!r} is a call of a flow, which makes its inputs"
            raise ValueError(
                f"state= replaces the input of a position, and {why}; output= gives the output of that call"
            )
        before = find_position(records, at if flow is None or call is None else flow.node_id, "at")
        if output is not None:  # The run continues after it.
            state, before = output, before + (call is None)
        config = self._config_of(nodes)
        refuse_unknown_ids(config, records, self.registry, config.pipeline)  # Before the fork is stored.
        fork_id = new_run_id or fresh_run_id()
        # The input of the new run, if it is not that of the other one.
        initial = None if before or call is not None else state
        of_state = None if initial is None else type(initial)
        original = input_schema_of(records, self.registry, input_schema or of_state)
        await self._stored.fork(run_id, fork_id, records, before, state, call)
        if initial is None:
            initial = await self._stored.read_input(fork_id, original)
        is_resume = call is not None or output is not None
        start: RunKeywords[Any] = {"resume": True} if is_resume else {"resume_from": at}
        fixed: RunKeywords[Any] = {"run_id": fork_id, "retry_failed_items": False}
        return await self._run(nodes, initial, cast("RunKeywords[Any]", {**options, **start, **fixed}))

    async def signal(
        self, run_id: str, answer: Any, *, question: str | None = None, schema: type[BaseModel] | None = None
    ) -> None:
        """Store the answer to a question of a suspended run; resuming the run is another step.

        ``answer``: a model or JSON data, validated by the class of the question. For an effect whose call is
        unknown: the output of that call, or NotDone() to have it called again. ``question``: the id of the
        question, from ``result.questions``. It may be left out while exactly one question is open, except for
        an effect. ``schema``: the class of the answer, if it is not imported in this process under the name
        that it had when the question was asked.

        An accepted answer cannot be changed; the same answer to the same question may be sent again. Raises
        pydantic's ValidationError, CheckpointNotFound, RequestRefused if the question is not open, ValueError
        if ``question`` is needed, StoreError.
        """
        await self._stored.answer(run_id, answer, question, schema)

    async def send(self, run_id: str, message: Any, *, topic: str = "", id: str | None = None) -> None:
        """Store a message to a run, which ``flow.receive`` takes. It makes a suspended run due for workers.

        ``message``: a model or JSON data. ``topic``: that of the receiver. ``id``: identifies the message in
        the run; sending it again changes nothing. By default each call sends a message of its own. Messages
        of a topic are received in the order in which they were stored; the class of the receiver validates
        them when it takes them. Raises CheckpointNotFound, RequestRefused if the run has ended or was
        sent another message with this id, NotSerialisable for a message that is not JSON, StoreError.
        """
        await self._stored.send(run_id, message, topic, id)

    async def cancel(self, run_id: str) -> bool:
        """End a run as CANCELLED, in any process. Raises CheckpointNotFound.

        Returns False if the run had ended, or completed before its owner read the request; a PARTIAL run,
        which could be resumed, is CANCELLED. After True, which takes up to a second, no attempt begins; those
        at work are cancelled. A last attempt that was just ending may still complete the run: see its status.
        An owner that does not read the request within 10 seconds is not waited for, with a warning: its
        process is stopped, or it is plain code without ``async with ctx:``. The request is stored, and holds
        when the run is opened again.
        """
        return await self._stored.request(run_id, "cancel")

    async def pause(self, run_id: str) -> bool:
        """Suspend a run with reason "paused", in whatever process it is, until somebody resumes it.

        Once this returns, which takes up to a second, no attempt begins: not of children of groups, items,
        steps or retries. Those at work finish, and are committed. Workers and ``recover()`` leave the run
        alone, even if its process dies before it has read the request; :meth:`resume` and :meth:`unpause`
        take the pause back. An owner that reads no requests is not waited for, as in :meth:`cancel`. Returns
        False if the run had ended. Raises CheckpointNotFound, StoreError.
        """
        return await self._stored.request(run_id, "pause")

    async def unpause(self, run_id: str) -> bool:
        """Take a pause back, so that a worker continues the run; :meth:`resume` continues it here.

        A run that was paused before it started is queued again, with its due time and its latest start.
        Returns False if the run was not paused, or has ended. Raises CheckpointNotFound, StoreError.
        """
        return await self._stored.request(run_id, "unpause")

    async def set_budget(
        self,
        run_id: str,
        *,
        tokens: int | None = None,
        cost_usd: float | None = None,
        latency_ms: int | None = None,
    ) -> bool:
        """Change limits of a run, in whatever process it is, from the next attempt on; others stay.

        They are those of :meth:`with_budget`, and replace the limits of the config in this execution of the
        run, in every process that continues it. A run that waits for its budget
        (``RunConfig(on_budget="wait")``) is due at once. An owner that reads no requests is not waited for,
        as in :meth:`cancel`. Returns False if the run is complete. Raises CheckpointNotFound, StoreError,
        ValueError without a limit, pydantic's ValidationError for one that is not valid.
        """
        return await self._stored.request(run_id, "set_budget", limits_of(tokens, cost_usd, latency_ms))

    async def shutdown(self, *, drain_seconds: float = 30.0) -> None:
        """End the runs of this runner in the running event loop after their current node, as INTERRUPTED.

        Runs that have not ended after ``drain_seconds`` are cancelled; their committed outputs remain. All of
        them are released, so that another process can :meth:`recover` them.
        """
        await self._live.shut_down(drain_seconds)

    async def flush(self, *, timeout_seconds: float = 5.0) -> bool:
        """Send what the exporters hold: of the runner's hooks, and of pipelines and runs that it has run.

        Return True if all of it was sent in time, and nothing was lost since the last call. Never raises.
        """
        return await self._call_exporters("flush", timeout_seconds)

    async def aclose(self, *, timeout_seconds: float = 5.0) -> bool:
        """Flush, and close what the exporters opened themselves. The store and what you created stay open."""
        return await self._call_exporters("aclose", timeout_seconds)

    async def _call_exporters(self, method: str, timeout_seconds: float) -> bool:
        sets = distinct((*flatten(self.config.hooks), *self._exporters))
        methods = [getattr(hooks, method, None) for hooks in sets]
        calls = [call(timeout_seconds=timeout_seconds) for call in methods if call is not None]
        return all(await asyncio.gather(*calls))

    def _waits_here(self) -> EndWaits:
        """Return the waits for ends of runs in the running event loop."""
        from stroma.runner.submission import EndWaits  # Not loaded by runs.

        loop = asyncio.get_running_loop()
        if loop not in self._waits:
            self._waits = {one: waits for one, waits in self._waits.items() if not one.is_closed()}
            self._waits[loop] = EndWaits(lambda: self._stored)
        return self._waits[loop]

    @property
    def _stored(self) -> StoredRuns:
        return StoredRuns(self.registry, self.checkpoint_manager)

    def _config_of(self, nodes: Any) -> RunConfig:
        if isinstance(nodes, Pipeline) and nodes.config is not None:
            return nodes.config.with_settings_of(self.config)
        return self.config

    def _twin(self, target: Any, store: Any, **changes: Any) -> StromaRunner[Any]:
        """Return a runner of another store with the contracts and the config that a target has here.

        ``changes``: further fields of the config. Shared budgets are skipped.
        """
        fields = {"resume_from": None, "if_exists": "restart", "if_running": "error", "shared_budgets": ()}
        config = self._config_of(target).model_copy(update=fields | changes)
        return StromaRunner(self.registry, CheckpointManager(store), config)


def _listed(node_sequence: Nodes) -> Pipeline | list[Any]:
    return node_sequence if isinstance(node_sequence, Pipeline) else list_nodes(node_sequence)


def with_settings_of(module: ModuleType, pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with the settings that the runner of its module gives it, to run it with another.

    A pipeline whose module has no runner with settings stays as it is. Raises LookupError if the module has
    several and the pipeline has no config.
    """
    named = {name: value for name, value in vars(module).items() if isinstance(value, StromaRunner)}
    runners = {id(runner): name for name, runner in named.items() if runner.config.model_fields_set}
    names = list(runners.values())
    if not names or (len(names) > 1 and pipeline.config is not None):
        return pipeline
    if len(names) > 1:
        raise LookupError(
            f"pipeline {pipeline.name!r} has no config, and {len(names)} runners beside it have settings: "
            f"{', '.join(names)}; pass one: Pipeline({pipeline.name!r}, nodes, config={names[0]}.config)"
        )
    return pipeline.with_config(named[names[0]]._config_of(pipeline))
