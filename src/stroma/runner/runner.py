"""StromaRunner: the driver that moves a run from node to node in this process."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel

from stroma.checkpoint import (
    AsyncCheckpointStore,
    AsyncInMemoryStore,
    CheckpointManager,
    CheckpointNotFound,
    CheckpointStore,
    RunBusy,
    RunExists,
    StoreError,
    Waiting,
    resolve_schema,
)
from stroma.contracts.contract import ContractRegistry, Decorated, NodeContract, check_id
from stroma.contracts.node import (
    Group,
    Node,
    NodeDecorator,
    find_node,
    mark,
    output_class,
)
from stroma.contracts.schema import Schema, schema_of
from stroma.cost.budget import ExecutionBudget
from stroma.cost.fallback import FallbackPolicy
from stroma.engine.config import RunConfig
from stroma.engine.config import new_run_id as fresh_run_id
from stroma.engine.context import ReliabilityContext
from stroma.engine.restore import value_of
from stroma.failures.failure import Classifier
from stroma.failures.policy import PolicyMap
from stroma.hooks.sets import NodeHooks, flatten
from stroma.runner.batch import Batch, outcome_of
from stroma.runner.run import OneRun
from stroma.runner.sequence import check_owners, ids_in, warn_of_unknown_ids
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.contracts.checks.finding import Finding
    from stroma.runner.stream import RunStream

__all__ = ["Pipeline", "StromaRunner"]


logger = logging.getLogger("stroma")

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)


@dataclass(frozen=True, slots=True, init=False)
class Pipeline:
    """A named sequence of nodes, with the configuration it likes to run under.

    The name is what metrics and spans are labelled with. Raises TypeError for what is no node, ValueError for a name that
    no store can keep.
    """

    name: str
    nodes: tuple[Any, ...]
    config: RunConfig | None

    def __init__(self, name: str, nodes: Iterable[Any], *, config: RunConfig | None = None) -> None:
        object.__setattr__(self, "name", check_id(name, "pipeline name"))
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "config", config)
        for node in self.nodes:
            find_node(node)


class StromaRunner:
    """Runs sequences of nodes under one configuration. Safe to share between tasks, threads and event loops."""

    def __init__(
        self,
        registry: ContractRegistry,
        checkpoint_manager: CheckpointManager,
        config: RunConfig | None = None,
    ) -> None:
        self.registry = registry
        self.checkpoint_manager = checkpoint_manager
        self._own_config = config
        self._live: set[OneRun] = set()
        self._batches: dict[Batch, None] = {}
        #: Node ids of the config that no node had, and that a warning was given for.
        self._warned: set[str] = set()
        self.config = config if config is not None else RunConfig()

    @classmethod
    def quick(
        cls,
        *,
        store: CheckpointStore | AsyncCheckpointStore | str | os.PathLike[str] | None = None,
        budget: ExecutionBudget | None = None,
        policy_map: PolicyMap | None = None,
        classifiers: list[Classifier] | None = None,
        hooks: NodeHooks | Sequence[NodeHooks] | None = None,
        **config: Any,
    ) -> StromaRunner:
        """A runner with an in-memory store unless told otherwise; further keywords are fields of RunConfig.

        ``store``: one, or the URL or path of one, see :func:`stroma.open_store`. Raises pydantic's ValidationError for a
        keyword that RunConfig does not know, TypeError for what is no store, ValueError for what no URL of one is.
        """
        given = {"budget": budget, "policy_map": policy_map, "classifiers": classifiers, "hooks": hooks}
        config.update({name: value for name, value in given.items() if value is not None})
        if store is None:
            store = AsyncInMemoryStore()
        elif isinstance(store, (str, os.PathLike)):
            from stroma.checkpoint import open_store

            store = open_store(store)
        return cls(ContractRegistry(), CheckpointManager(store), RunConfig(**config) if config else None)

    # ------------------------------------------------------------------ builders

    def _replace(self, **fields: Any) -> StromaRunner:
        # A new config object: the old one may be shared with another runner.
        changed = self.config.model_copy(update=fields)
        changed.__pydantic_fields_set__ = self.config.model_fields_set | fields.keys()
        self.config = self._own_config = changed
        return self

    def with_redis(self, redis_url: str, ttl_seconds: int = 3600) -> StromaRunner:
        """Keep checkpoints in Redis. Raises ImportError, with the line that installs it, without the driver."""
        from stroma.checkpoint.redis.store import RedisStore

        self.checkpoint_manager = CheckpointManager(RedisStore(redis_url, ttl_seconds))
        return self

    def with_budget(
        self, *, tokens: int | None = None, cost_usd: float | None = None, latency_ms: int | None = None
    ) -> StromaRunner:
        """Limit each run: tokens (input + output), US dollars, milliseconds of attempts."""
        return self._replace(
            budget=ExecutionBudget(max_tokens_total=tokens, max_cost_usd=cost_usd, max_latency_ms=latency_ms)
        )

    def with_model_fallback(self, model: str, *, to: str, at_budget_pct: float = 0.80) -> StromaRunner:
        """Signal a cheaper model once a share (0 to 1) of the cost limit is spent. Appends to the earlier ones."""
        return self._replace(
            model_fallbacks=[*self.config.model_fallbacks, FallbackPolicy(model, to, at_budget_pct)]
        )

    def with_classifiers(self, classifiers: list[Classifier]) -> StromaRunner:
        return self._replace(classifiers=RunConfig(classifiers=classifiers).classifiers)

    def with_hooks(self, hooks: NodeHooks | Sequence[NodeHooks]) -> StromaRunner:
        return self._replace(hooks=RunConfig(hooks=hooks).hooks)

    def with_context(self, context: dict[str, Any]) -> StromaRunner:
        return self._replace(context=context)

    def with_policy_map(self, policy_map: PolicyMap) -> StromaRunner:
        return self._replace(policy_map=RunConfig(policy_map=policy_map).policy_map)

    def with_node_policies(self, node_policies: dict[str, PolicyMap]) -> StromaRunner:
        return self._replace(node_policies=RunConfig(node_policies=node_policies).node_policies)

    def with_node_timeouts(self, node_timeouts: dict[str, int]) -> StromaRunner:
        """Milliseconds by node id."""
        return self._replace(node_timeouts=RunConfig(node_timeouts=node_timeouts).node_timeouts)

    def node(self, node_id: str, *, input: type[In], output: type[Out]) -> NodeDecorator[In, Out]:
        """Mark a function as a node, and register its contract with this runner. See ``stroma_node``."""
        contract: NodeContract[In, Out] = NodeContract(
            node_id=node_id, input_schema=input, output_schema=output
        )
        self.registry.register(contract)

        def decorate(func: Any) -> Any:
            self.registry.decorated[node_id] = Decorated(contract, repr(func))
            return mark(func, node_id, contract)

        return decorate

    # ------------------------------------------------------------------ checking

    def check(
        self, node_sequence: Pipeline | Iterable[Any], *, input_schema: type[BaseModel] | None = None
    ) -> list[Finding]:
        """Prove, field by field, that each node's output can satisfy the next node's input. Nothing is called.

        Errors can never work; warnings may fail, or cannot be told. Nodes without a contract take and give anything.
        ``input_schema``: what runs begin with, to be looked at, too. Raises TypeError for what is no node, ValueError for
        a function whose id was given to another one with another contract since.
        """
        from stroma.contracts.checks.check import check_nodes  # Only who asks pays for it.

        nodes = _records(node_sequence.nodes if isinstance(node_sequence, Pipeline) else node_sequence)
        check_owners(nodes, self.registry)
        return check_nodes(nodes, self.registry, input_schema)

    def _refuse_what_cannot_work(self, nodes: list[Node | Group]) -> None:
        from stroma.contracts.checks.check import check_nodes
        from stroma.contracts.checks.finding import CheckFailed

        errors = [found for found in check_nodes(nodes, self.registry) if found.severity == "error"]
        if errors:
            raise CheckFailed(errors)

    # ------------------------------------------------------------------ running

    async def run(
        self,
        node_sequence: Pipeline | Iterable[Any],
        initial_state: BaseModel,
        *,
        run_id: str | None = None,
        context: dict[str, Any] | None = None,
        resume: bool | None = None,
        resume_from: str | None = None,
        retry_failed_items: bool | None = None,
        if_exists: Literal["restart", "resume", "return", "error"] | None = None,
        if_running: Literal["error", "attach", "take_over"] | None = None,
        traceparent: str | None = None,
    ) -> ExecutionResult:
        """Run nodes one after the other, each on the output of the one before.

        The keywords override the config's fields. ``traceparent`` is a W3C trace context that the run's spans shall
        belong to, in place of the caller's current span; one that is none is ignored. What goes wrong inside the pipeline is a result: FAILED or PARTIAL,
        with ``result.failure``. Raises TypeError for what is no node or a hook that is not async, ValueError for an
        unknown resume target or a function whose id was given to another one with another contract since, StoreError (CheckpointNotFound, PipelineChanged ...) if the run cannot begin, CheckFailed
        with ``RunConfig(check=True)``.
        """
        given = {
            "context": context,
            "resume": resume,
            "resume_from": resume_from,
            "retry_failed_items": retry_failed_items,
            "if_exists": if_exists,
            "if_running": if_running,
        }
        return await self._run(node_sequence, initial_state, run_id, given, traceparent)

    async def _run(
        self,
        node_sequence: Pipeline | Iterable[Any],
        initial_state: BaseModel,
        run_id: str | None,
        given: dict[str, Any],
        traceparent: str | None = None,
        *,
        recovers: bool = False,
    ) -> ExecutionResult:
        """:meth:`run`. ``recovers``: RunExists for a run that has ended, or waits."""
        config = self._config_for(node_sequence, run_id, given)
        nodes = _records(node_sequence.nodes if isinstance(node_sequence, Pipeline) else node_sequence)
        if not isinstance(initial_state, BaseModel):
            raise TypeError(f"the initial state must be a pydantic model, not {type(initial_state).__name__}")
        check_owners(nodes, self.registry)
        start = _resume_position(nodes, config.resume_from)
        if config.check:
            self._refuse_what_cannot_work(nodes)
        ctx = ReliabilityContext.for_run(config, self.registry, self.checkpoint_manager)
        ctx.recovers = recovers
        if isinstance(node_sequence, Pipeline):
            ctx.pipeline = node_sequence.name
        warn_of_unknown_ids(
            config, nodes, self.registry, ctx.pipeline, warn=ctx.run_logger.warning, warned=self._warned
        )
        if traceparent is not None:
            ctx.traceparent = _checked(ctx, traceparent)
        if config.limits and not any(config.limit_of(node_id) for node_id in ids_in(nodes)):
            ctx.run_logger.warning(
                "no node of pipeline %r goes by any of the limits (%s); say which does with node_limits={node id: name}",
                ctx.pipeline, ", ".join(map(repr, config.limits)),
            )  # fmt: skip
        run = OneRun(ctx, nodes, initial_state, start)
        self._live.add(run)
        try:
            return await run.go()
        finally:
            self._live.discard(run)
            if run.ended is not None and not run.ended.done():
                run.ended.set_result(None)

    async def resume(
        self,
        node_sequence: Pipeline | Iterable[Any],
        run_id: str,
        *,
        input_schema: type[BaseModel] | None = None,
        **options: Any,
    ) -> ExecutionResult:
        """Go on with a run of the store where it stopped, in any process: what is committed is not called again.

        It goes on with the input that it was begun with: an ``input_schema``, or else what the first node takes; further
        keywords are those of :meth:`run`. Raises CheckpointNotFound, PipelineChanged, RunBusy while somebody is at work
        on it, StoreError if the store keeps no journal, TypeError if the pipeline begins with a group and no
        ``input_schema`` is given.
        """
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        state = await self._input_of(run_id, self._input_schema(records_of(nodes), input_schema))
        return await self.run(nodes, state, **{**options, "run_id": run_id, "resume": True})

    def stream(
        self,
        node_sequence: Pipeline | Iterable[Any],
        initial_state: BaseModel,
        *,
        on_leave: Literal["cancel", "detach"] = "cancel",
        buffer: int = 1000,
        **options: Any,
    ) -> RunStream:
        """:meth:`run` as an async iterator of what happens, as it happens; see :class:`RunStream`.

        The run begins when the first event is asked for, or with ``async with``. ``on_leave``: what becomes of a run
        whose reader leaves before its end: "cancel" ends it as CANCELLED, "detach" lets it go on in the background.
        ``buffer``: events that may wait for the reader; with more of them the run waits. ``options`` are those of
        :meth:`run`. What ``run()`` would raise comes out of the iterator. Raises ValueError for what is no option here.
        """
        from stroma.runner.stream import RunStream

        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        config = self._config_of(nodes)

        def begin(watch: NodeHooks) -> Coroutine[Any, Any, ExecutionResult]:
            watched = config.model_copy(update={"hooks": [*flatten(config.hooks), watch]})
            watched.__pydantic_fields_set__ = config.model_fields_set | {"hooks"}
            twin = StromaRunner(self.registry, self.checkpoint_manager, watched)
            twin._live = self._live  # A shutdown of this runner is one of its streams, too.
            twin._warned = self._warned
            return twin.run(nodes, initial_state, **options)

        return RunStream(begin, on_leave, buffer)

    async def map_outputs(self, run_id: str, node: Any) -> AsyncIterator[tuple[int, Any]]:
        """(index, output) of each item of a map that is done, in order, a few in memory at a time.

        ``node``: the ``map_over(...)`` itself, with ``into=Journal()`` or a file. An output is a model, or plain data of a
        node without a contract; an item that failed is an ItemFailure. Raises CheckpointNotFound, CorruptCheckpoint,
        StoreError, TypeError for what is no map.
        """
        group = find_node(node)
        if not isinstance(group, Group) or not group.each or group.into:
            raise TypeError(
                f"{group.node_id!r} is no map whose outputs are in the journal; give the map_over() with into=Journal() or "
                "JsonLines(path)"
            )
        store = self._journal("map_items")
        first = 0
        while page := await asyncio.to_thread(store.map_items, run_id, group.node_id, first, _PAGE):
            for index, committed in page:
                yield index, value_of(self.registry, group.children[0], committed)
            first += _PAGE

    def run_sync(
        self, node_sequence: Pipeline | Iterable[Any], initial_state: BaseModel, **options: Any
    ) -> ExecutionResult:
        """:meth:`run` for code without an event loop. Raises RuntimeError where one is running: use ``await run()``."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.run(node_sequence, initial_state, **options))
        raise RuntimeError(
            "an event loop is running here; use `await runner.run(...)` in place of run_sync(...)"
        )

    async def run_many(
        self,
        node_sequence: Pipeline | Iterable[Any],
        inputs: Iterable[BaseModel],
        *,
        max_concurrency: int = 10,
        run_ids: Callable[[int, BaseModel], str] | None = None,
        recover: bool = False,
        on_result: Callable[[int, ExecutionResult | Exception], None] | None = None,
        **options: Any,
    ) -> list[ExecutionResult | Exception]:
        """:meth:`run` for each input, at most ``max_concurrency`` at once; the outcomes in the order of the inputs.

        What ``run()`` would raise stands in the place of its result, and stops no other run. ``inputs`` is read as far
        as there is room, so it may be endless in all but its results. ``run_ids`` names each run by its number (from 0)
        and input; ``on_result`` is told each outcome as it comes. ``recover``: first go on with the interrupted runs
        of this pipeline (see :meth:`recover`); their outcomes are not among those that are returned. After a
        :meth:`shutdown` no further run begins, and only the outcomes of those that did are returned. What ``inputs``,
        ``run_ids`` or ``on_result`` raises cancels the runs in flight and comes out.
        """
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        run = partial(self.run, nodes, **options)
        with self._batch() as batch:
            if recover:
                await self._recover(nodes, batch, max_concurrency, None, options)
            return await batch.run_each(run, inputs, max_concurrency, run_ids, on_result)

    async def recover(
        self,
        node_sequence: Pipeline | Iterable[Any],
        *,
        max_concurrency: int = 10,
        input_schema: type[BaseModel] | None = None,
        **options: Any,
    ) -> dict[str, ExecutionResult | Exception]:
        """Go on with every run of this pipeline whose process died or was told to stop; the outcomes by run id.

        Runs that are somebody else's are left alone. Runs are found by the pipeline's name, and go on with the input
        that they were begun with: an ``input_schema``, or else what the first node takes. Raises StoreError if the
        store keeps no journal, TypeError if the pipeline begins with a group and no ``input_schema`` is given.
        """
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        with self._batch() as batch:
            return await self._recover(nodes, batch, max_concurrency, input_schema, options)

    async def _recover(
        self,
        nodes: Pipeline | list[Any],
        batch: Batch,
        max_concurrency: int,
        input_schema: type[BaseModel] | None,
        options: dict[str, Any],
    ) -> dict[str, ExecutionResult | Exception]:
        name = nodes.name if isinstance(nodes, Pipeline) else self.config.pipeline
        if name == RunConfig.model_fields["pipeline"].default:
            logger.warning(
                "recover() finds runs by the name of their pipeline, and this one has none of its own: runs of other "
                "unnamed ones are taken for its own; give it a name with Pipeline(name, nodes) or RunConfig(pipeline=...)"
            )
        store = self._journal("list_runs")
        schema = self._input_schema(records_of(nodes), input_schema)
        outcomes: dict[str, ExecutionResult | Exception] = {}

        given = {**options, "resume": True}
        traceparent = given.pop("traceparent", None)

        async def go_on(run_id: str) -> ExecutionResult:
            state = await self._input_of(run_id, schema)
            return await self._run(nodes, state, run_id, given, traceparent, recovers=True)

        async def one(run_id: str) -> None:
            outcome = await outcome_of(go_on(run_id))
            if not isinstance(outcome, (RunBusy, RunExists)):  # Somebody else was faster.
                outcomes[run_id] = outcome

        found = []
        if not getattr(store, "exists", lambda: True)():  # The first run of all makes it.
            return outcomes
        for status in ("RUNNING", RunStatus.INTERRUPTED.value):
            runs = await asyncio.to_thread(store.list_runs, limit=_ALL, pipeline=name, status=status)
            found += [run.run_id for run in runs if run.holder is None]
        await batch.go((one(run_id) for run_id in found), max_concurrency)
        return outcomes

    @contextmanager
    def _batch(self) -> Iterator[Batch]:
        batch = Batch()
        self._batches[batch] = None
        try:
            yield batch
        finally:
            self._batches.pop(batch, None)

    async def fork(
        self,
        run_id: str,
        node_sequence: Pipeline | Iterable[Any],
        *,
        at: str,
        state: BaseModel | None = None,
        new_run_id: str | None = None,
        input_schema: type[BaseModel] | None = None,
        **options: Any,
    ) -> ExecutionResult:
        """Run on from a node of another run, as a new run that remembers where it came from.

        ``at``: the first position with this id runs next. ``state``: its input, in place of what the run had there.
        The other run stays as it is. ``input_schema``: what its input is, if the pipeline begins with a group.
        Raises CheckpointNotFound, RunExists, ValueError for an unknown node, TypeError for a state that is no model.
        """
        from stroma.contracts.untyped import Kept

        if state is not None and not isinstance(state, BaseModel):
            raise TypeError(f"the state of a fork must be a pydantic model, not {type(state).__name__}")
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        records = records_of(nodes)
        before = _resume_position(records, at, "at")
        assert before is not None
        store = self._journal("fork")
        fork_id = new_run_id or fresh_run_id()
        wanted = self._input_schema(records, input_schema or (type(state) if state and not before else None))
        given: dict[str, tuple[Schema, BaseModel]] = {}
        if state is not None:
            schema = schema_of(type(state))
            last = records[before - 1] if before else None
            if isinstance(last, Node):
                contract = self.registry.find(last.node_id) or last.contract
                schema = schema_of(output_class(contract))
            kept = Kept(schema_of(type(state)).raw(state)) if schema.model is Kept else schema.convert(state)
            given["edited" if before else "state"] = (schema, kept)
        await store.fork(run_id, fork_id, before, **given)
        initial = state
        if initial is None or before:
            initial = await self._input_of(fork_id, wanted)
        return await self.run(nodes, initial, run_id=fork_id, resume_from=at, **options)

    async def signal(
        self,
        run_id: str,
        answer: Any,
        *,
        node_id: str | None = None,
        branch: str | None = None,
        schema: type[BaseModel] | None = None,
    ) -> None:
        """Give a suspended run the answer that it waits for; resuming it is another step.

        ``answer``: a model or JSON data, validated by the schema that the node asked for. ``node_id`` and ``branch``
        say which node, where several wait. ``schema``: where the node's own is not imported in this process.

        Raises pydantic's ValidationError, CheckpointNotFound, StoreError if the run waits for nothing, ValueError if
        several wait.
        """
        store = self._journal("signal")
        all_of_them: list[Waiting] = await asyncio.to_thread(store.waiting, run_id)
        if not all_of_them and await asyncio.to_thread(store.get_run, run_id) is None:
            raise CheckpointNotFound(f"there is no run {run_id!r} in the store; check the id and the store")
        answered = answer_to(all_of_them, run_id, answer, node_id=node_id, branch=branch, schema=schema)
        await store.signal(run_id, answered)

    async def cancel(self, run_id: str) -> bool:
        """Ask whoever is at work on a run, in any process, to end it as CANCELLED; within about a second they do.

        A run that nobody is at work on is CANCELLED at once. False if it had ended. Raises CheckpointNotFound.
        """
        cancelled: bool = await self._journal("cancel").cancel(run_id)
        return cancelled

    async def shutdown(self, *, drain_seconds: float = 30.0) -> None:
        """Let the runs of this runner in the running event loop end after the node they are in, as INTERRUPTED.

        Those that are not there after ``drain_seconds`` are cut short; what they committed is kept. All of them give
        up their runs, so that another process can :meth:`recover` them.
        """
        loop = asyncio.get_running_loop()
        for batch in list(self._batches):
            batch.draining = batch.draining or batch.loop is loop
        runs = [
            run for run in list(self._live) if run.loop is loop and run.task is not asyncio.current_task()
        ]
        # Of the runs, not of their tasks: those may have other things to do afterwards.
        ends = {run: run.drain() for run in runs}
        if ends:
            _, late = await asyncio.wait(ends.values(), timeout=drain_seconds)
            for run, end in ends.items():
                if end in late:
                    run.cancel(RunStatus.INTERRUPTED)
            if late:
                await asyncio.wait(late)

    async def flush(self, *, timeout_seconds: float = 5.0) -> bool:
        """Have the exporters among the hooks send what they hold; whether all did within the limit. Never raises."""
        return await self._of_exporters("flush", timeout_seconds)

    async def aclose(self, *, timeout_seconds: float = 5.0) -> bool:
        """The same, and have them give up what they opened by themselves. The store and what you made stay open."""
        return await self._of_exporters("aclose", timeout_seconds)

    async def _of_exporters(self, method: str, timeout_seconds: float) -> bool:
        found = [getattr(hooks, method, None) for hooks in flatten(self.config.hooks)]
        calls = [call(timeout_seconds=timeout_seconds) for call in found if call is not None]
        return all(await asyncio.gather(*calls))

    def _journal(self, needed: str) -> Any:
        store = self.checkpoint_manager.store
        if not hasattr(store, needed):
            raise StoreError(
                f"{type(store).__name__} keeps no journal of runs; use a journal store such as SQLiteStore"
            )
        return store

    def _input_schema(self, nodes: list[Node | Group], given: type[BaseModel] | None) -> Schema:
        """What the input of a run of these nodes is."""
        if given is not None:
            return schema_of(given)
        first = nodes[0] if nodes else None
        if isinstance(first, Group):
            raise TypeError(
                f"the pipeline begins with {first.node_id!r}; say what its input is with input_schema="
            )
        contract = None if first is None else self.registry.find(first.node_id) or first.contract
        return schema_of(output_class(None) if contract is None else contract.input_schema)

    async def _input_of(self, run_id: str, schema: Schema) -> BaseModel:
        data: bytes = await asyncio.to_thread(self._journal("input_of").input_of, run_id)
        return schema.decode(data)

    def _config_of(self, nodes: Any) -> RunConfig:
        if isinstance(nodes, Pipeline) and nodes.config is not None and self._own_config is None:
            return nodes.config
        return self.config

    def _config_for(self, nodes: Any, run_id: str | None, given: dict[str, Any]) -> RunConfig:
        config = self._config_of(nodes)
        changes = {name: value for name, value in given.items() if value is not None}
        if run_id is None and (taken := config.take_run_id()) != config.run_id:
            run_id = taken
        if not changes:
            return config if run_id is None else config.with_run_id(run_id)
        if run_id is not None:
            changes["run_id"] = run_id
        RunConfig(**changes)  # Validates what was given.
        return config.model_copy(update=changes)


def answer_to(
    all_of_them: Sequence[Waiting],
    run_id: str,
    answer: Any,
    *,
    node_id: str | None,
    branch: str | None,
    schema: type[BaseModel] | None,
) -> Waiting:
    """The one of the nodes that wait which an answer is for, with the answer as it asks for it."""
    found = [
        waiting
        for waiting in all_of_them
        if waiting.payload is None and node_id in (None, waiting.node_id) and branch in (None, waiting.branch)
    ]
    if not found:
        which = "" if node_id is None else f" at node {node_id!r}"
        raise StoreError(f"run {run_id!r} waits for no answer{which}; see its status and its attempts")
    if len(found) > 1:
        where = ", ".join(f"{w.node_id!r} (branch {w.branch!r})" for w in found)
        raise ValueError(f"run {run_id!r} waits at {where}; say which with node_id= and branch=")
    model = schema
    if model is None and found[0].schema_ref:
        try:
            model = resolve_schema(found[0].schema_ref)
        except (LookupError, TypeError) as error:
            raise StoreError(
                f"node {found[0].node_id!r} of run {run_id!r} asks for a {found[0].schema_ref}: {error}; "
                "or say which class that is with schema="
            ) from error
    wanted = schema_of(model or output_class(None))
    checked = wanted.convert(answer) if isinstance(answer, BaseModel) and model else wanted.validate(answer)
    return found[0]._replace(payload=wanted.encode(checked))


_ALL = 1_000_000  # runs: more than anybody recovers at once
_PAGE = 200  # outputs of a map that are read at once


# Of any version but ff, with ids that are not all zeros; 00 has no more fields; https://www.w3.org/TR/trace-context/
_TRACEPARENT = re.compile(
    r"(?!ff|00.{53}-)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def _checked(ctx: ReliabilityContext, traceparent: str) -> str | None:
    if _TRACEPARENT.fullmatch(traceparent):
        return traceparent
    # It comes from whoever called us, over the network perhaps: no reason not to run.
    ctx.run_logger.warning("traceparent %r is no W3C trace context; it is ignored", traceparent[:200])
    return None


def records_of(nodes: Pipeline | list[Any]) -> list[Node | Group]:
    return _records(nodes.nodes if isinstance(nodes, Pipeline) else nodes)


def _records(nodes: Any) -> list[Node | Group]:
    if type(nodes) is not list and (isinstance(nodes, Group) or not isinstance(nodes, Iterable)):
        find_node(nodes)  # What is no node at all is told how to become one.
        raise TypeError(f"run() takes a sequence of nodes; put {nodes!r} in a list")
    return [find_node(node) for node in nodes]


def _resume_position(
    nodes: list[Node | Group], resume_from: str | None, given_as: str = "resume_from"
) -> int | None:
    if resume_from is None:
        return None
    for position, node in enumerate(nodes):
        if node.node_id == resume_from:
            return position
    known = ", ".join(repr(node.node_id) for node in nodes) or "none"
    raise ValueError(f"{given_as}={resume_from!r} is not a node of this pipeline; its nodes are {known}")
