"""Flows: plain Python as a durable pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import random
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from time import perf_counter_ns
from typing import Any, Generic, TypeVar, cast, overload
from uuid import UUID

from pydantic import BaseModel

from stroma.checkpoint import StepCall, Waiting, schema_ref
from stroma.checkpoint.identity import SCOPE, quoted
from stroma.checkpoint.protocols import OF_FLOW
from stroma.contracts.contract import NodeContract, check_id
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import schema_of
from stroma.engine.current import CURRENT
from stroma.engine.outcome import Halt
from stroma.engine.tasks import gather
from stroma.failures.failure import Failure
from stroma.runner.flow_errors import FlowClosed, StepFailed
from stroma.runner.flow_journal import encode_input, read_failure
from stroma.runner.flow_run import EndKey, FlowRun, as_output
from stroma.runner.flow_time import EXPIRED, OpenWait, now_ms, text_of_time
from stroma.runner.pipeline import Pipeline

__all__ = ["Flow", "FlowClosed", "FlowFunction", "StepFailed", "define_flow", "stroma_flow"]

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class Flow:
    """The handle with which the body of a flow calls its steps. Each call is numbered when it is made."""

    __slots__ = ("_run",)

    def __init__(self, run: FlowRun) -> None:
        self._run = run

    def __repr__(self) -> str:
        return f"<flow {self._run.node.node_id!r} of run {self.run_id!r}>"

    @property
    def run_id(self) -> str:
        return self._run.driver.ctx.run_id

    @property
    def is_closing(self) -> bool:
        """True while the body is being cancelled because the run is suspended or stopped."""
        return self._run.driver.closing

    # ------------------------------------------------------------------ steps

    @overload
    def step(
        self, node: Callable[[In], Coroutine[Any, Any, Out]], state: In, *, key: str | None = None
    ) -> Coroutine[Any, Any, Out]: ...
    @overload
    def step(
        self,
        node: Callable[[In, dict[str, Any]], Coroutine[Any, Any, Out]],
        state: In,
        *,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Out]: ...
    @overload
    def step(
        self,
        node: Callable[[In], Coroutine[Any, Any, Mapping[str, Any] | tuple[Any, ...]]],
        state: In,
        *,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Any]: ...
    @overload
    def step(
        self,
        node: Callable[[In, dict[str, Any]], Coroutine[Any, Any, Mapping[str, Any] | tuple[Any, ...]]],
        state: In,
        *,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Any]: ...
    @overload
    def step(
        self, node: Callable[[In], Out], state: In, *, key: str | None = None
    ) -> Coroutine[Any, Any, Out]: ...
    @overload
    def step(
        self, node: Callable[[In], Mapping[str, Any] | tuple[Any, ...]], state: In, *, key: str | None = None
    ) -> Coroutine[Any, Any, Any]: ...
    @overload
    def step(self, node: Group, state: BaseModel, *, key: str | None = None) -> Coroutine[Any, Any, Any]: ...
    def step(self, node: Any, state: Any, *, key: str | None = None) -> Coroutine[Any, Any, Any]:
        """Run a node on a state and return its output: a full node, with contract, retries, hooks and a commit.

        ``key`` names the call, in place of its number in its task. Raises StepFailed once the node has stopped for good.
        """
        run = self._run
        # Looking at a node and at the class of a state takes 2 us, and most steps are of the same ones.
        try:
            known = run.known.get(node) if type(state) in run.state_classes else None
        except TypeError:  # It cannot be hashed.
            known = None
        if known is None:
            known = _learn(run, node, state)
        record, name, label = known
        scope = run.begin_call("flow.step")
        if key is None and not scope.path:
            count = scope.counts[name]
            scope.counts[name] = count + 1
            identity = f"{name}#{count}"
        else:
            identity = run.identify(scope, record.node_id, key)
        coroutine = run.step(record, state, identity, run.driver.activity, not scope.path)
        coroutine.__qualname__ = label  # type: ignore[attr-defined]  # Python's warning of a coroutine that is never awaited shows it.
        return coroutine

    @overload
    def map(
        self,
        node: Callable[[In], Coroutine[Any, Any, Out]],
        items: Iterable[In],
        *,
        max_concurrency: int | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, list[Out]]: ...
    @overload
    def map(
        self,
        node: Callable[[In, dict[str, Any]], Coroutine[Any, Any, Out]],
        items: Iterable[In],
        *,
        max_concurrency: int | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, list[Out]]: ...
    @overload
    def map(
        self,
        node: Callable[[In], Out],
        items: Iterable[In],
        *,
        max_concurrency: int | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, list[Out]]: ...
    @overload
    def map(
        self,
        node: Callable[[In], Coroutine[Any, Any, Mapping[str, Any] | tuple[Any, ...]]] | Group,
        items: Iterable[In],
        *,
        max_concurrency: int | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, list[Any]]: ...
    def map(
        self, node: Any, items: Iterable[Any], *, max_concurrency: int | None = None, key: str | None = None
    ) -> Coroutine[Any, Any, list[Any]]:
        """Run a node on each of many items, each a step of its own, and return the outputs in order.

        The first item that stops for good cancels the others, and its StepFailed is raised.
        """
        run = self._run
        record = _node_of(node, "flow.map")
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(
                f"max_concurrency must be at least 1, or None for no bound, got {max_concurrency!r}"
            )
        states = list(items)
        for state in states:
            if not isinstance(state, BaseModel):
                raise TypeError(
                    f"the items of {record.node_id!r} must be pydantic models, got {type(state).__name__}"
                )
        scope = run.begin_call("flow.map")
        identity = run.identify(scope, record.node_id, key, "*")
        return self._map(record, states, max_concurrency, identity, run.driver.activity, not scope.path)

    async def _map(
        self,
        node: Node | Group,
        states: list[BaseModel],
        limit: int | None,
        identity: str,
        number: int,
        in_main: bool,
    ) -> list[Any]:
        run = self._run
        driver = run.driver

        async def work() -> tuple[list[Any], bool]:
            # The items are the steps of a part of the flow, by their indexes.
            items = FlowRun(
                driver, run, _part_of(run, limit), run.position, run.prefix + identity, is_map=True
            )
            items.path = run.path
            beyond = [
                int(index)
                for index in items.records
                if int(index) >= len(states) and index not in items.optional
            ]
            if beyond:
                await driver.stop_here(
                    driver.changed(
                        f"flow {run.node.node_id!r} has {len(states)} items for {node.node_id!r}, and had {max(beyond) + 1}"
                    )
                )
            failed = [int(at) for at, record in items.records.items() if record.kind == "failure"]
            if failed:  # Its siblings were cancelled, or are of no use any more.
                failure = read_failure(items.records[str(min(failed))].data)
                await items.end()
                raise items.step_failed(failure, str(min(failed)), 0)
            is_recorded = len(items.records) == len(states)
            try:
                outputs = await gather(
                    [items.step(node, state, str(index), index, False) for index, state in enumerate(states)]
                )
            finally:
                await items.end()
            driver.flows.remove(items)
            return outputs, is_recorded

        return cast("list[Any]", await self._compose(work, identity, number, in_main, None))

    # ------------------------------------------------------------------ flows and pipelines inside

    @overload
    def run(
        self, flow: FlowFunction[In, Out], state: In, *, key: str | None = None
    ) -> Coroutine[Any, Any, Out]: ...
    @overload
    def run(
        self, flow: Pipeline, state: BaseModel, *, key: str | None = None
    ) -> Coroutine[Any, Any, Any]: ...
    def run(self, flow: Any, state: Any, *, key: str | None = None) -> Coroutine[Any, Any, Any]:
        """Run another flow, or a pipeline, inside this one: under its budget, in its trace. Return the output.

        Raises StepFailed if it failed.
        """
        run = self._run
        if not isinstance(flow, Pipeline):
            raise TypeError(
                f"flow.run takes a flow or a Pipeline, got {flow!r}; call a single node with flow.step"
            )
        if not isinstance(state, BaseModel):
            raise TypeError(
                f"the input of {flow.name!r} must be a pydantic model, got {type(state).__name__}"
            )
        scope = run.begin_call("flow.run")
        identity = run.identify(scope, flow.name, key)
        node = flow.node if isinstance(flow, FlowFunction) else None
        if node is None:
            return self._run_pipeline(flow, state, identity, run.driver.activity, not scope.path)
        return self._run_flow(node, state, identity, run.driver.activity, not scope.path)

    async def _run_flow(
        self, node: FlowNode, state: BaseModel, identity: str, number: int, in_main: bool
    ) -> Any:
        run = self._run
        driver, ctx = run.driver, run.driver.ctx
        input_key = encode_input(ctx, node, state) if run.stores_inputs or run.records else None

        async def work() -> tuple[Any, bool]:
            contract = ctx.contract_of(node)
            assert contract is not None
            if (run.position, run.prefix + identity) in ctx.restored:
                return as_output(cast("BaseModel", await run.restore(node, state, identity))), True
            child = FlowRun(driver, run, node, run.position, run.prefix + identity)
            begin = perf_counter_ns()
            try:
                prepared, snapshot = schema_of(contract.input_schema).prepare_input(state)
                returned = await child.call_body(node, prepared)
            except Exception as error:
                raise _InnerFailed(driver.halt_of(error, node.node_id).failure) from error
            target = schema_of(contract.output_schema)
            call = StepCall(OF_FLOW, input_key)
            outcome = await driver.commit(child, node, target, snapshot, returned, begin, call)
            driver.flows.remove(child)
            if isinstance(outcome, Halt):
                if outcome.partial or outcome.spent:
                    await driver.stop_here(outcome)
                raise _InnerFailed(outcome.failure) from outcome.failure.exception
            return as_output(outcome), False

        return await self._compose(work, identity, number, in_main, input_key)

    async def _run_pipeline(
        self, pipeline: Pipeline, state: BaseModel, identity: str, number: int, in_main: bool
    ) -> Any:
        run = self._run
        driver = run.driver

        async def work() -> tuple[Any, bool]:
            child = FlowRun(
                driver, run, _part_of(run, None, pipeline.name), run.position, run.prefix + identity
            )
            is_recorded = len(child.records) == len(pipeline.nodes)
            inside = Flow(child)
            value: Any = state
            scope = SCOPE.get()
            child.calls.scope()
            try:
                for node in pipeline.nodes:
                    is_flow = isinstance(node, FlowFunction)
                    value = await (inside.run(node, value) if is_flow else inside.step(node, value))
            finally:
                await child.end()
                SCOPE.set(scope)
            driver.flows.remove(child)
            return value, is_recorded

        return await self._compose(work, identity, number, in_main, None)

    async def _compose(
        self,
        work: Callable[[], Coroutine[Any, Any, tuple[Any, bool]]],
        identity: str,
        number: int,
        in_main: bool,
        input_key: bytes | None,
    ) -> Any:
        """Make a call that is made of other calls, and hand out its result in turn.

        ``work`` returns the result, and True if it was all recorded.
        """
        run = self._run
        driver = run.driver
        task = asyncio.current_task()
        assert task is not None
        if driver.closing or run.has_ended:
            run.refuse(identity)
        run.alive += 1
        token, begin, scope = object(), perf_counter_ns(), SCOPE.get()
        run.open[token] = task
        result: Any = None
        failure: Failure | None = None
        cause: BaseException | None = None
        inside: tuple[EndKey, ...] = ()
        try:
            recorded = await run.find_recorded(identity, input_key) if run.records else None
            is_recorded = recorded is not None
            if recorded is not None and recorded.kind == "failure":
                failure = read_failure(recorded.data)
                cause = failure.exception
                inside = tuple(EndKey(*key) for key in recorded.data["inside"])
            else:
                try:
                    result, is_recorded = await work()
                except StepFailed as error:
                    failure, cause = error.failure, error
                except _InnerFailed as error:
                    failure, cause = error.failure, error.__cause__
                if failure is not None:
                    run.note_failure(identity, failure, input_key, cause)
            index = await run.take_turn(identity, is_recorded, number, in_main)
            if failure is None:
                return result
            raise run.step_failed(failure, identity, index, cause, inside) from cause
        except asyncio.CancelledError:
            run.note_cancelled(identity, begin, input_key)
            raise
        finally:
            cause = None  # Its traceback references this frame.
            run.alive -= 1
            del run.open[token]
            SCOPE.set(scope)
            CURRENT.set(None)

    # ------------------------------------------------------------------ time and people

    def sleep(
        self,
        seconds: float = 0,
        *,
        minutes: float = 0,
        hours: float = 0,
        days: float = 0,
        until: datetime | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, None]:
        """Wait for a time. It is durable: the process may exit meanwhile, and the wait does not begin again.

        ``until``: an aware datetime, in place of a duration. See ``RunConfig(inline_wait_seconds=...)``.
        """
        run = self._run
        duration = timedelta(seconds=seconds, minutes=minutes, hours=hours, days=days)
        wake_ms = _wake_ms(duration, until)
        scope = run.begin_call("flow.sleep")
        identity = run.identify(scope, "sleep", key, "!")
        return self._sleep(wake_ms, identity, run.driver.activity, not scope.path)

    async def _sleep(self, wake_ms: int, identity: str, number: int, in_main: bool) -> None:
        run = self._run
        driver, branch = run.driver, run.prefix + identity

        async def work() -> bool:
            recorded = await run.find_recorded(identity, None) if run.records else None
            wake = wake_ms if recorded is None else cast("int", recorded.data)
            if recorded is None:
                await run.before_live(identity)
                driver.journal.note_wake(run.position, branch, wake)
                await driver.waits.flush()
            if wake <= now_ms():
                return recorded is not None
            wait = driver.waits.add(OpenWait(branch, f"sleeping until {text_of_time(wake)}", wake_ms=wake))
            try:
                assert wait.done is not None
                await wait.done
            finally:
                driver.waits.remove(wait)
            return False

        await self._wait(work, identity, number, in_main)

    def wait_for(
        self,
        answer: type[AnswerT],
        *,
        reason: str,
        timeout: float | timedelta | None = None,  # It is durable.
        until: datetime | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, AnswerT]:
        """Wait for the answer of a person, and return it as an ``answer``; ``runner.signal(run_id, ...)`` gives it.

        The run is suspended as soon as nothing else is left to do. ``timeout`` in seconds, or ``until``: raises
        TimeoutError if no answer came by then. ``key``, else the name of the class, is the id that ``signal(node_id=...)``
        selects it by.
        """
        run = self._run
        if not (isinstance(answer, type) and issubclass(answer, BaseModel)):
            raise TypeError(
                f"flow.wait_for takes a pydantic model, a RootModel for plain values, got {answer!r}"
            )
        wake_ms: int | None = None
        if timeout is not None or until is not None:
            duration = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout or 0)
            wake_ms = _wake_ms(duration, until)
        scope = run.begin_call("flow.wait_for")
        identity = run.identify(scope, "wait", key, "!")
        question = Waiting(
            run.position, run.prefix + identity, key or answer.__name__, reason, schema_ref(answer)
        )
        return self._wait_for(answer, question, wake_ms, identity, run.driver.activity, not scope.path)

    async def _wait_for(
        self,
        answer: type[AnswerT],
        question: Waiting,
        wake_ms: int | None,
        identity: str,
        number: int,
        in_main: bool,
    ) -> AnswerT:
        run = self._run
        driver, branch = run.driver, run.prefix + identity
        outcomes: list[Any] = []

        async def work() -> bool:
            recorded = await run.find_recorded(identity, None) if run.records else None
            if recorded is not None and recorded.kind in ("answer", "expired"):
                outcomes.append(EXPIRED if recorded.kind == "expired" else recorded.data)
                return True
            wake = wake_ms if recorded is None else cast("int", recorded.data)
            earlier = driver.ctx.session.waiting.get((run.position, branch))
            if earlier is None or (earlier.reason, earlier.schema_ref) != (
                question.reason,
                question.schema_ref,
            ):
                await run.before_live(identity)
                if wake is not None and recorded is None:
                    driver.journal.note_wake(run.position, branch, wake)
                await driver.waits.ask(question)
            wait = driver.waits.add(OpenWait(branch, question.reason, wake_ms=wake, question=question))
            try:
                assert wait.done is not None
                outcome = await wait.done
                if outcome is EXPIRED and await driver.waits._take_answers([wait]):
                    outcome = cast("Any", driver.ctx.session.waiting)[run.position, branch].payload
                outcomes.append(outcome)
                if outcome is EXPIRED:
                    driver.journal.note_expired(run.position, branch)
                    # An answer that comes later is refused.
                    await driver.waits.ask(question._replace(payload=b"null"))
            finally:
                driver.waits.remove(wait)
            return False

        await self._wait(work, identity, number, in_main)
        (outcome,) = outcomes
        if outcome is EXPIRED:
            raise TimeoutError(f"no answer came in time: {question.reason}")
        return cast("AnswerT", schema_of(answer).decode(outcome))

    async def _wait(
        self, work: Callable[[], Coroutine[Any, Any, bool]], identity: str, number: int, in_main: bool
    ) -> None:
        """OpenWait, and go on in turn. ``work`` returns True if the wait had ended when the run was resumed."""
        run = self._run
        if run.driver.closing or run.has_ended:
            run.refuse(identity)
        run.alive += 1
        token, begin = object(), perf_counter_ns()
        task = asyncio.current_task()
        assert task is not None
        run.open[token] = task
        try:
            await run.take_turn(identity, await work(), number, in_main)
        except asyncio.CancelledError:
            run.note_cancelled(identity, begin, None)
            raise
        finally:
            run.alive -= 1
            del run.open[token]

    # ------------------------------------------------------------------ values

    def now(self) -> datetime:
        """Return the time, in UTC. It is recorded with the next commit, and the same on replay."""
        run = self._run
        scope = run.begin_call("flow.now")
        identity = run.identify(scope, "now", None, "!")
        branch = run.prefix + identity
        value = run.driver.journal.value(run.position, "v", branch, lambda: str(now_ms()).encode())
        return datetime.fromtimestamp(int(value) / 1000, UTC)

    def random(self) -> float:
        """Return a random number from 0 up to 1: the same on replay."""
        return random.Random(self._random_bytes("flow.random")).random()

    def uuid(self) -> UUID:
        """Return a random UUID (version 4): the same on replay."""
        return UUID(bytes=self._random_bytes("flow.uuid")[:16], version=4)

    def _random_bytes(self, what: str) -> bytes:
        run = self._run
        scope = run.begin_call(what)
        identity = run.identify(scope, what, None, "!")
        seed = run.driver.journal.seed(run.position)
        return hashlib.sha256(b"%s:%s" % (seed, f"{run.prefix}{identity}".encode())).digest()


class _InnerFailed(Exception):
    """A flow inside a flow failed; the cause is what its body raised."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _wake_ms(duration: timedelta, until: datetime | None) -> int:
    if until is None:
        return now_ms() + max(0, round(duration.total_seconds() * 1000))
    if duration:
        raise ValueError("pass a duration or until=, not both")
    if until.tzinfo is None:
        raise ValueError(f"until must be an aware datetime, got {until!r}; pass datetime(..., tzinfo=UTC)")
    return round(until.timestamp() * 1000)


def _part_of(run: FlowRun, limit: int | None, name: str | None = None) -> FlowNode:
    """Return the record of a part of a flow that has no contract of its own."""
    node_id = name or run.node.node_id
    return FlowNode(node_id, _not_called, None, False, True, max_concurrency=limit)


def _not_called(*_: Any) -> Any:
    raise NotImplementedError


def _learn(run: FlowRun, node: Any, state: Any) -> tuple[Node | Group, str, str]:
    """Check the arguments of a step. Return its node, the name in its identity, and that of its coroutine."""
    record = _node_of(node, "flow.step")
    if not isinstance(state, BaseModel):
        raise TypeError(
            f"the input of step {record.node_id!r} must be a pydantic model, got {type(state).__name__}"
        )
    run.state_classes.add(type(state))
    known = (record, quoted(record.node_id), f"flow.step({record.node_id})")
    with contextlib.suppress(TypeError):  # It cannot be hashed.
        run.known[node] = known
    return known


def _node_of(node: Any, method: str) -> Node | Group:
    record = find_node(node)
    if isinstance(record, FlowNode):
        raise TypeError(f"{method} takes a node, and {record.node_id!r} is a flow; call it with flow.run")
    return record


# ---------------------------------------------------------------------- definition


class FlowFunction(Pipeline, Generic[In, Out]):
    """A flow: an async function that calls nodes as steps. Run it as a pipeline, or with ``flow.run`` inside another."""

    __slots__ = ("_stroma_contract", "_stroma_node", "_stroma_node_id", "body")

    body: Callable[[Flow, In], Coroutine[Any, Any, Out]]
    _stroma_node: FlowNode

    def __init__(
        self,
        flow_id: str,
        body: Callable[[Flow, In], Coroutine[Any, Any, Out]],
        contract: NodeContract[In, Out],
        max_concurrency: int | None,
    ) -> None:
        put = partial(object.__setattr__, self)
        check_id(flow_id, "flow id")
        put("body", body)
        node = FlowNode(
            flow_id,
            self,
            contract,
            False,
            True,
            body=lambda run, state: body(Flow(run), state),
            max_concurrency=max_concurrency,
        )
        put("_stroma_node", node)
        put("_stroma_node_id", flow_id)
        put("_stroma_contract", contract)
        super().__init__(flow_id, (self,))

    @property
    def node(self) -> FlowNode:
        """The record of the flow as a node of a sequence."""
        return self._stroma_node

    def __repr__(self) -> str:
        return f"<flow {self.name!r}>"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, flow: Flow, state: In) -> Coroutine[Any, Any, Out]:
        """Call the body as a part of another one: its calls are those of that flow."""
        if not isinstance(flow, Flow):
            raise TypeError(
                f"flow {self.name!r} was called with {type(flow).__name__}; run it with `await runner.run({self.name}, state)`"
            )
        return self.body(flow, state)


def define_flow(
    flow_id: str,
    body: Any,
    input_class: type[BaseModel] | None,
    output_class: type[BaseModel] | None,
    max_concurrency: int | None,
) -> FlowFunction[Any, Any]:
    """Return a function as a flow. Raises TypeError for one that cannot be the body of a flow."""
    name = getattr(body, "__qualname__", repr(body))
    if inspect.isasyncgenfunction(body):
        raise TypeError(
            f"flow {flow_id!r}: {name} is an async generator; return the output in place of yielding it"
        )
    if not inspect.iscoroutinefunction(body):
        raise TypeError(f"flow {flow_id!r}: {name} must be an `async def` function of (flow, state)")
    if max_concurrency is not None and (not isinstance(max_concurrency, int) or max_concurrency < 1):
        raise ValueError(f"max_concurrency must be at least 1, or None for no bound, got {max_concurrency!r}")
    parameters = list(inspect.signature(body).parameters)
    if len(parameters) < 2:
        raise TypeError(f"flow {flow_id!r}: {name} must take (flow, state), got ({', '.join(parameters)})")
    hints = _hints_of(body)
    input_model = _class_of(flow_id, "input", input_class, hints.get(parameters[1]))
    output_model = _class_of(flow_id, "output", output_class, hints.get("return"))
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=flow_id, input_schema=input_model, output_schema=output_model
    )
    return FlowFunction(flow_id, body, contract, max_concurrency)


def _hints_of(body: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(body)
    except Exception:  # A name that is known to type checkers only.
        return {}


def _class_of(flow_id: str, what: str, passed: Any, annotated: Any) -> type[BaseModel]:
    is_model = isinstance(annotated, type) and issubclass(annotated, BaseModel)
    if passed is None:
        if not is_model:
            raise TypeError(f"flow {flow_id!r} needs {what}=, or the annotation of a pydantic model")
        return cast("type[BaseModel]", annotated)
    if not (isinstance(passed, type) and issubclass(passed, BaseModel)):
        raise TypeError(f"flow {flow_id!r}: {what}= must be a pydantic model, got {passed!r}")
    agrees = not is_model or (
        issubclass(passed, annotated) if what == "input" else issubclass(annotated, passed)
    )
    if not agrees:
        raise TypeError(
            f"flow {flow_id!r} has {what}={passed.__name__}, and its function is annotated with {annotated.__name__}; "
            "let them agree"
        )
    return passed


class FlowDecorator(typing.Protocol, Generic[In, Out]):
    """Makes a flow of an async function of ``(flow, state)``."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


class AnnotatedFlowDecorator(typing.Protocol):
    """Makes a flow of an async function of ``(flow, state)``, with the classes of its annotations."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


@overload
def stroma_flow(
    flow_id: str, *, input: type[In], output: type[Out], max_concurrency: int | None = None
) -> FlowDecorator[In, Out]: ...
@overload
def stroma_flow(flow_id: str, *, max_concurrency: int | None = None) -> AnnotatedFlowDecorator: ...
def stroma_flow(
    flow_id: str,
    *,
    input: type[BaseModel] | None = None,
    output: type[BaseModel] | None = None,
    max_concurrency: int | None = None,
) -> Any:
    """Make a flow of an async function of ``(flow, state)``: a pipeline that decides in plain Python what comes next.

    ``input`` and ``output``: its classes; by default those of the annotations. ``max_concurrency``: how many of its steps
    run at once; None is all.
    """
    return lambda body: define_flow(flow_id, body, input, output, max_concurrency)
