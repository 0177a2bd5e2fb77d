"""StromaRunner: the driver that moves a run from node to node in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel

from stroma._engine import Halt, execute
from stroma._restore import check_committed, output_schema, restore
from stroma.checkpoint import (
    AsyncCheckpointStore,
    AsyncInMemoryStore,
    CheckpointManager,
    CheckpointNotFound,
    CheckpointStore,
    Committed,
    Finished,
    PipelineChanged,
)
from stroma.config import RunConfig
from stroma.context import ReliabilityContext
from stroma.contracts import ContractRegistry, NodeContract
from stroma.cost import ExecutionBudget, FallbackPolicy
from stroma.failures import (
    Classifier,
    Failure,
    FailureClass,
    NodeContext,
    PolicyMap,
    RunFailed,
    diagnose,
)
from stroma.groups import parallel
from stroma.hooks import HookError, HookNotAsync, NodeHooks, StepHooks
from stroma.nodes import Group, Node, NodeDecorator, find_node, mark, stroma_node, stroma_step
from stroma.schemas import NotSerialisable, schema_of
from stroma.trace import ExecutionResult, RunStatus

# The published module paths of what lives lower down.
__all__ = [
    "NodeHooks",
    "Pipeline",
    "RunConfig",
    "StepHooks",
    "StromaRunner",
    "parallel",
    "stroma_node",
    "stroma_step",
]

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)


@dataclass(frozen=True, slots=True, init=False)
class Pipeline:
    """A named sequence of nodes, with the configuration it likes to run under.

    The name is what metrics and spans are labelled with. Raises TypeError for what is no node.
    """

    name: str
    nodes: tuple[Any, ...]
    config: RunConfig | None

    def __init__(self, name: str, nodes: Iterable[Any], *, config: RunConfig | None = None) -> None:
        object.__setattr__(self, "name", name)
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
        self.config = config if config is not None else RunConfig()

    @classmethod
    def quick(
        cls,
        *,
        store: CheckpointStore | AsyncCheckpointStore | None = None,
        budget: ExecutionBudget | None = None,
        policy_map: PolicyMap | None = None,
        classifiers: list[Classifier] | None = None,
        hooks: NodeHooks | Sequence[NodeHooks] | None = None,
        **config: Any,
    ) -> StromaRunner:
        """A runner with an in-memory store unless told otherwise; further keywords are fields of RunConfig.

        Raises pydantic's ValidationError for a keyword that RunConfig does not know.
        """
        given = {"budget": budget, "policy_map": policy_map, "classifiers": classifiers, "hooks": hooks}
        config.update({name: value for name, value in given.items() if value is not None})
        store = AsyncInMemoryStore() if store is None else store
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
        from stroma.checkpoint.redis import RedisStore

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
        return self._replace(classifiers=classifiers)

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
            return mark(func, node_id, contract)

        return decorate

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
    ) -> ExecutionResult:
        """Run nodes one after the other, each on the output of the one before.

        The keywords override the config's fields. What goes wrong inside the pipeline is a result: FAILED or PARTIAL,
        with ``result.failure``. Raises TypeError for what is no node or a hook that is not async, ValueError for an
        unknown resume target, StoreError (CheckpointNotFound, PipelineChanged ...) if the run cannot begin.
        """
        config = self._config_for(node_sequence, run_id, context, resume, resume_from)
        nodes = _records(node_sequence.nodes if isinstance(node_sequence, Pipeline) else node_sequence)
        if not isinstance(initial_state, BaseModel):
            raise TypeError(f"the initial state must be a pydantic model, not {type(initial_state).__name__}")
        start = _resume_position(nodes, config.resume_from)
        ctx = ReliabilityContext.for_run(config, self.registry, self.checkpoint_manager)
        if isinstance(node_sequence, Pipeline):
            ctx.pipeline = node_sequence.name
        return await _Run(ctx, nodes, initial_state, start).go()

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

    def _config_for(
        self,
        nodes: Any,
        run_id: str | None,
        context: dict[str, Any] | None,
        resume: bool | None,
        resume_from: str | None,
    ) -> RunConfig:
        config = self.config
        if isinstance(nodes, Pipeline) and nodes.config is not None and self._own_config is None:
            config = nodes.config
        changes: dict[str, Any] = {}
        if run_id is not None:
            changes["run_id"] = run_id
        elif (taken := config.take_run_id()) != config.run_id:
            changes["run_id"] = taken
        if context is not None:
            changes["context"] = context
        if resume is not None:
            changes["resume"] = resume
        if resume_from is not None:
            changes["resume_from"] = resume_from
        if not changes:
            return config
        RunConfig(**changes)  # Validates what was given.
        return config.model_copy(update=changes)


def _records(nodes: Any) -> list[Node | Group]:
    if isinstance(nodes, Group) or not isinstance(nodes, Iterable):
        find_node(nodes)  # What is no node at all is told how to become one.
        raise TypeError(f"run() takes a sequence of nodes; put {nodes!r} in a list")
    return [find_node(node) for node in nodes]


def _resume_position(nodes: list[Node | Group], resume_from: str | None) -> int | None:
    if resume_from is None:
        return None
    for position, node in enumerate(nodes):
        if node.node_id == resume_from:
            return position
    known = ", ".join(repr(node.node_id) for node in nodes) or "none"
    raise ValueError(f"resume_from={resume_from!r} is not a node of this pipeline; its nodes are {known}")


class _Run:
    """One call of ``run``: the run's hooks and record around the loop over its nodes."""

    def __init__(
        self, ctx: ReliabilityContext, nodes: list[Node | Group], initial: BaseModel, start: int | None
    ) -> None:
        self.ctx = ctx
        self.nodes = nodes
        self.initial = initial
        self.start = start
        self.continued = False

    @property
    def state(self) -> BaseModel:
        """The last committed state, else the initial one."""
        return self.initial if self.ctx.last_state is None else self.ctx.last_state

    async def go(self) -> ExecutionResult:
        ctx = self.ctx
        status = RunStatus.INTERRUPTED
        failure: Failure | None = None
        result: ExecutionResult | None = None
        begun = False
        try:
            try:
                await self._open()
                begun = True
                await self._tell_start()
                if ctx.session.finished is None:
                    failure, status = await self._loop()
                else:
                    failure, status = await self._as_it_was(ctx.session.finished)
            except NotSerialisable as error:  # The input, in a store that outlives the process.
                failure = diagnose(error, NodeContext("input", 1, ctx.run_id))
                status = RunStatus.FAILED
                if not begun:
                    begun = True
                    await self._tell_start()
        except asyncio.CancelledError:
            status = RunStatus.CANCELLED
            raise
        except GeneratorExit:  # The coroutine is being closed: nothing may be awaited any more.
            ctx.session.abandon()
            begun = False
            raise
        except HookNotAsync as error:
            error.result = ctx.build_result(status, self.state)
            raise
        finally:
            if begun or failure is not None:
                result = await self._end(status, failure)
        assert result is not None
        return result

    async def _tell_start(self) -> None:
        ctx = self.ctx
        if ctx.fire.on_run_start is not None:
            await ctx.fire.fire(
                "on_run_start",
                ctx.fire.on_run_start,
                None,
                lambda: (
                    ctx.run_id,
                    ctx.pipeline,
                    ctx.shown(schema_of(type(self.initial)).state(self.initial)),
                ),
            )

    async def _open(self) -> None:
        ctx = self.ctx
        try:
            session = await ctx.open(self.initial, discard_from=self.start, accept=self._check_unchanged)
        except asyncio.CancelledError:
            await ctx.end(RunStatus.CANCELLED, None)  # The store may have begun it already.
            raise
        self.continued = session.continued or self.start is not None

    def _check_unchanged(self, position: int, branch: str, committed: Committed) -> None:
        """Refuse a changed pipeline before anything runs, what stands inside its groups included."""
        if position >= len(self.nodes):
            raise PipelineChanged(
                f"run {self.ctx.run_id!r} cannot go on: it has the output of node {committed.node_id!r} at position "
                f"{position}, and the pipeline has only {len(self.nodes)} nodes; restore it, or begin a new run"
            )
        node = self.nodes[position]
        group: str | None = None
        for index in map(int, branch.split(".") if branch else ()):
            children = node.children if isinstance(node, Group) else ()
            place = 0 if isinstance(node, Group) and node.each else index
            if place >= len(children):
                raise PipelineChanged(
                    f"run {self.ctx.run_id!r} cannot go on: it has the output of node {committed.node_id!r} inside "
                    f"position {position}, and {node.node_id!r} has no such child; restore it, or begin a new run"
                )
            node, group = children[place], node.node_id
        # What a group gives depends on its input, so its schema is checked when it is restored.
        schema = output_schema(self.ctx, node, self.initial) if isinstance(node, Node) else None
        check_committed(self.ctx, node, schema, committed, position, branch, group)

    async def _skip_to(self, start: int) -> None:
        """The published way of resuming: go on from the checkpoint of the node before, whatever lies further back."""
        ctx = self.ctx
        loaded = -1
        for position in range(start):
            state = await restore(ctx, self.nodes[position], self.state, position)
            if state is not None:
                loaded = position
        if loaded == start - 1:
            return
        before = self.nodes[start - 1]
        schema = output_schema(ctx, before, self.state).model
        saved = await ctx.checkpoint_manager.resume(ctx.run_id, before.node_id, schema)
        if saved is None:
            raise CheckpointNotFound(
                f"run {ctx.run_id!r} has no checkpoint of node {before.node_id!r}, which stands before "
                f"{self.nodes[start].node_id!r}; run the pipeline from its beginning, or resume from an earlier node"
            )
        ctx.last_state = saved

    async def _loop(self) -> tuple[Failure | None, RunStatus]:
        ctx = self.ctx
        if self.start:
            await self._skip_to(self.start)
        state = self.state
        task = asyncio.current_task()
        assert task is not None  # A coroutine of asyncio runs in one.
        cancelling = task.cancelling()
        for position in range(self.start or 0, len(self.nodes)):
            if task.cancelling() != cancelling:
                # Either a cancellation is on its way, and this lets it in; or a node's TaskGroup has left one behind.
                await asyncio.sleep(0)
                cancelling = task.cancelling()
            outcome = await execute(ctx, self.nodes[position], state, position, cancelling=cancelling)
            if isinstance(outcome, Halt):
                return outcome.failure, outcome.status
            state = outcome
        return None, RunStatus.RESUMED if self.continued else RunStatus.COMPLETED

    async def _as_it_was(self, finished: Finished) -> tuple[Failure | None, RunStatus]:
        """The outcome of an execution that is returned, not run."""
        ctx = self.ctx
        status = RunStatus(finished.status)
        completed = status in (RunStatus.COMPLETED, RunStatus.RESUMED)
        for position, node in enumerate(self.nodes):
            if await restore(ctx, node, self.state, position) is None:
                if not completed:
                    break
                raise PipelineChanged(
                    f"run {ctx.run_id!r} finished without node {node.node_id!r}, which the pipeline has at position "
                    f'{position}; continue it with if_exists="resume", or begin a new run'
                )
        if completed or status in _CUT_SHORT:
            return None, status
        error = RunFailed(finished.error or f"run {ctx.run_id!r} ended as {status}")
        failure = diagnose(error, NodeContext("run", 1, ctx.run_id))
        kind = FailureClass.TERMINAL if status is RunStatus.FAILED else FailureClass.RECOVERABLE
        return replace(failure, failure_class=kind), status

    async def _end(self, status: RunStatus, failure: Failure | None) -> ExecutionResult:
        """Close the record, build the result, tell the hooks: always, whichever way the run ended."""
        ctx = self.ctx
        result = ctx.build_result(status, self.state, failure)
        cancelled = await ctx.end(status, failure.message if failure is not None else None)
        if ctx.run_logger.isEnabledFor(logging.INFO):
            ctx.run_logger.info("run of %r ended: %s", ctx.pipeline, status)
        if ctx.fire.on_run_end is not None:
            try:
                await ctx.fire.fire(
                    "on_run_end", ctx.fire.on_run_end, None, lambda: (ctx.run_id, _own_copy(ctx, result))
                )
            except HookNotAsync as error:
                error.result = result
                if status is not RunStatus.CANCELLED:
                    raise
                # A cancellation is on its way out, and must come out as one.
                ctx.run_logger.warning("%s", error)
        if cancelled:
            raise asyncio.CancelledError
        if ctx.hook_failures and ctx.config.hook_errors == "raise" and status not in _CUT_SHORT:
            first = ctx.hook_failures[0]
            where = "" if first.node_id is None else f" of {first.node_id!r}"
            raise HookError(
                f"{len(ctx.hook_failures)} hook calls raised; the first, {first.hook}{where}: {first.exception!r}",
                result,
            ) from first.exception
        return result


def _own_copy(ctx: ReliabilityContext, result: ExecutionResult) -> ExecutionResult:
    """The result as one set of hooks may do with it what it likes; redacted, if the config says how."""
    state, trace, failure = result.final_state, result.trace.copy(), result.failure
    if isinstance(state, BaseModel):
        schema = schema_of(type(state))
        state = schema.copy(state)
        if ctx.config.redact is not None:
            # What is shown need not satisfy the schema.
            state = type(state).model_construct(**ctx.shown(schema.state(state)))
    if ctx.config.redact is not None:
        for event in trace.walk():
            event.input_state = ctx.shown(event.input_state)
            if event.output_state is not None:
                event.output_state = ctx.shown(event.output_state)
        if failure is not None:
            failure = replace(failure, exception=ctx.shown_error(failure.exception))
    return replace(
        result,
        final_state=state,
        trace=trace,
        failure=failure,
        hook_errors=list(result.hook_errors),
        unpriced_models=list(result.unpriced_models),
    )


_CUT_SHORT = (RunStatus.CANCELLED, RunStatus.INTERRUPTED)
