"""The handle of a flow's body, flows as values, and the decorator that makes them."""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from asyncio.events import _get_running_loop
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypedDict, TypeVar, Unpack, overload
from uuid import UUID

from pydantic import BaseModel

from stroma.contracts.annotations import infer_contract
from stroma.contracts.contract import NodeContract, check_id
from stroma.contracts.node import FlowNode, Group, LooseContextNode, LooseNode, MeteredNode, name_of
from stroma.hooks.sets import check_arguments
from stroma.runner.flows.calls import call_flow, call_map, call_step, call_submit
from stroma.runner.flows.path import INNERMOST, FlowPath
from stroma.runner.flows.waits import call_receive, call_sleep, call_wait_for, wake_ms_of
from stroma.runner.pipeline import AnyState, Pipeline, SubmitOptions, check_bound

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)
AnswerT = TypeVar("AnswerT", bound=BaseModel)
#: A node of ``(state)`` or ``(state, ctx)`` as type checkers see it: async or not.
StepNode: TypeAlias = (
    Callable[[In], Coroutine[Any, Any, Out]]
    | Callable[[In, Any], Coroutine[Any, Any, Out]]
    | LooseNode[In, Out, Any]
    | LooseContextNode[In, Any, Out, Any]
    | MeteredNode[In, Out]
    | Callable[[In], Out]
    | Callable[[In, Any], Out]
)


class Flow:
    """The handle with which the body of a flow calls its steps. Each call is numbered when it is made."""

    __slots__ = ("_path",)

    def __init__(self, path: FlowPath) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"<flow {self._path.node.node_id!r} of run {self.run_id!r}>"

    @property
    def run_id(self) -> str:
        return self._path.driver.ctx.run_id

    @property
    def version(self) -> str | None:
        """The version of the pipeline with which the run began; None if it had none."""
        return self._path.driver.ctx.session.version or None

    # ------------------------------------------------------------------ steps

    @overload
    def step(
        self, node: StepNode[In, Out], state: In, *, key: str | None = None
    ) -> Coroutine[Any, Any, Out]: ...
    @overload
    def step(self, node: Group, state: BaseModel, *, key: str | None = None) -> Coroutine[Any, Any, Any]: ...
    def step(self, node: Any, state: Any, *, key: str | None = None) -> Coroutine[Any, Any, Any]:
        """Run a node on a state and return its output. It has its contract, retries, hooks and a commit.

        ``key`` names the call, in place of its number in the flow. Raises StepFailed once the node has
        stopped for good.
        """
        return call_step(self._path, node, state, key)

    @overload
    def map(
        self,
        node: StepNode[In, Out],
        items: Iterable[In],
        *,
        max_concurrency: int | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, list[Out]]: ...
    @overload
    def map(
        self,
        node: Group,
        items: Iterable[BaseModel],
        *,
        max_concurrency: int | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, list[Any]]: ...
    def map(
        self, node: Any, items: Iterable[Any], *, max_concurrency: int | None = None, key: str | None = None
    ) -> Coroutine[Any, Any, list[Any]]:
        """Run a node on each item, as separate steps, and return the outputs in order.

        The first item that stops for good cancels the others, and its StepFailed is raised.
        """
        return call_map(self._path, node, items, max_concurrency, key)

    # ------------------------------------------------------------------ flows and pipelines inside

    @overload
    def run(
        self, flow: FlowFunction[In, Out], state: In, *, key: str | None = None
    ) -> Coroutine[Any, Any, Out]: ...
    @overload
    def run(
        self, flow: AnyState, state: BaseModel, *, key: str | None = None
    ) -> Coroutine[Any, Any, Any]: ...
    def run(self, flow: Any, state: Any, *, key: str | None = None) -> Coroutine[Any, Any, Any]:
        """Run another flow, or a pipeline, under the budget and in the trace of this one. Return the output.

        Raises StepFailed if it failed.
        """
        return call_flow(self._path, flow, state, key)

    @overload
    def submit(
        self, flow: FlowFunction[In, Out], state: In, **options: Unpack[SubmitOptions]
    ) -> Coroutine[Any, Any, str]: ...
    @overload
    def submit(
        self, flow: AnyState, state: BaseModel, **options: Unpack[SubmitOptions]
    ) -> Coroutine[Any, Any, str]: ...
    def submit(self, flow: Any, state: Any, **options: Unpack[SubmitOptions]) -> Coroutine[Any, Any, str]:
        """Submit a separate run, which a worker starts, and return its id.

        A recorded step: it submits one run, also if the process dies meanwhile. For the keywords see
        :meth:`StromaRunner.submit`; without ``run_id`` the id is made of this call's idempotency key. The
        runs share neither budget nor trace, and neither ends the other. Raises StepFailed if the run cannot
        be submitted, TypeError for a pipeline that starts with a group, ValueError for an invalid keyword.
        """
        return call_submit(self._path, flow, state, options)

    # ------------------------------------------------------------------ time, people and messages

    def sleep(
        self,
        seconds: float = 0,
        *,
        minutes: float = 0,
        hours: float = 0,
        days: float = 0,
        until: datetime | None = None,
    ) -> Coroutine[Any, Any, None]:
        """Wait for a time. It is durable: the process may exit meanwhile, and the wait does not start again.

        ``until``: an aware datetime, in place of a duration. See ``RunConfig(inline_wait_seconds=...)``.
        """
        duration = seconds + 60 * (minutes + 60 * (hours + 24 * days))
        self._path.begin_call("flow.sleep")
        wake_ms = wake_ms_of(self._path, duration, until)
        assert wake_ms is not None  # There is a duration.
        return call_sleep(self._path, wake_ms)

    def wait_for(
        self,
        answer: type[AnswerT],
        *,
        reason: str,
        timeout: float | timedelta | None = None,  # It is durable.
        until: datetime | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, AnswerT]:
        """Wait for the answer of a person, and return it as an ``answer``; ``runner.signal()`` sends it.

        The run is suspended once no step is running. ``timeout`` in seconds, or ``until``:
        raises TimeoutError if no answer came by then. ``key`` identifies the call in place of its number.
        """
        self._path.begin_call("flow.wait_for")
        return call_wait_for(self._path, answer, reason, wake_ms_of(self._path, timeout, until), key)

    def receive(
        self,
        message: type[AnswerT],
        *,
        topic: str = "",
        timeout: float | timedelta | None = None,  # It is durable.
        key: str | None = None,
    ) -> Coroutine[Any, Any, AnswerT]:
        """Wait for the next message to the run, and return it as a ``message``; ``runner.send()`` sends it.

        ``topic``: that of the sender. Each message is received once, in the order in which they were sent.
        The run is suspended once no step is running. ``timeout`` in seconds: raises
        TimeoutError if no message came by then. Raises StepFailed for a message that is not a ``message``.
        ``key`` identifies the call in place of its number.
        """
        self._path.begin_call("flow.receive")
        return call_receive(self._path, message, topic, wake_ms_of(self._path, timeout, None), key)

    # ------------------------------------------------------------------ values

    def now(self) -> datetime:
        """Return the time of the last event of the flow, in UTC: the same on replay."""
        self._path.begin_call("flow.now")
        return datetime.fromtimestamp(self._path.driver.time_ms() / 1000, UTC)

    def random(self) -> float:
        """Return a random number from 0 up to 1: the same on replay."""
        return random.Random(self._random_bytes("flow.random")).random()

    def uuid(self) -> UUID:
        """Return a random UUID (version 4): the same on replay."""
        return UUID(bytes=self._random_bytes("flow.uuid")[:16], version=4)

    def _random_bytes(self, what: str) -> bytes:
        path = self._path
        path.begin_call(what)
        path.random_count += 1
        seed = path.driver.journal.seed(path.position)
        return hashlib.sha256(b"%s:%s%d" % (seed, path.prefix.encode(), path.random_count)).digest()


TakenT = TypeVar("TakenT", bound=BaseModel, contravariant=True)
OutputT = TypeVar("OutputT", bound=BaseModel, covariant=True)


class FlowLimits(TypedDict, total=False):
    """Version and limits of a flow; None: no version, and no limit.

    Attributes:
        version, accepts: see Pipeline.
        max_concurrency: maximum number of steps of a run that are executed at the same time.
        max_runs, max_runs_per_key: see Pipeline.
    """

    version: str | None
    accepts: Sequence[str]
    max_concurrency: int | None
    max_runs: int | None
    max_runs_per_key: int | None


class FlowFunction(Pipeline, Generic[TakenT, OutputT]):
    """A flow: an async function that calls nodes as steps. It runs as a pipeline, or with ``flow.run``."""

    body: Callable[[Flow, TakenT], Coroutine[Any, Any, OutputT]]
    _stroma_node: FlowNode

    def __init__(
        self,
        flow_id: str,
        body: Callable[[Flow, TakenT], Coroutine[Any, Any, OutputT]],
        contract: NodeContract[TakenT, OutputT],
        **limits: Unpack[FlowLimits],
    ) -> None:
        check_id(flow_id, "flow id")
        of_pipeline: Any = {name: value for name, value in limits.items() if name != "max_concurrency"}
        width = limits.get("max_concurrency")
        node = FlowNode(
            flow_id,
            self,
            contract,
            wants_context=False,
            is_async=True,
            body=lambda path, state: body(Flow(path), state),
            max_concurrency=width,
        )
        vars(self).update(body=body, _stroma_node=node, _stroma_node_id=flow_id, _stroma_contract=contract)
        super().__init__(flow_id, (self,), **of_pipeline)

    @property
    def _takes_any_state(self) -> Literal[False]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

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

    def __call__(self, flow: Flow, state: TakenT) -> Coroutine[Any, Any, OutputT]:
        """Call the body as a part of another one: its calls are those of that flow."""
        if not isinstance(flow, Flow):
            raise TypeError(
                f"flow {self.name!r} was called with {type(flow).__name__}; "
                f"run it with `await runner.run({self.name}, state)`"
            )
        return self.body(flow, state)


def current_flow() -> Flow | None:
    """Return the flow whose body this code belongs to; None elsewhere, also in the steps of a flow."""
    reference = INNERMOST.get()
    path = None if reference is None else reference()
    return None if path is None or _get_running_loop() is not path.driver.loop else Flow(path)


def define_flow(
    flow_id: str | None,
    body: Any,
    schemas: tuple[type[BaseModel] | None, type[BaseModel] | None],
    limits: FlowLimits,
    scope: FrameType,
) -> FlowFunction[Any, Any]:
    """Return a function as a flow. Raises TypeError for one that cannot be the body of a flow.

    ``flow_id``: by default the function's name. ``schemas``: of input and output; None: as annotated.
    ``scope``: the frame that decorates.
    """
    if flow_id is None:
        flow_id = name_of(body)
    name = getattr(body, "__qualname__", repr(body))
    if inspect.isasyncgenfunction(body):
        raise TypeError(
            f"flow {flow_id!r}: {name} is an async generator; return the output in place of yielding it"
        )
    if not inspect.iscoroutinefunction(getattr(body, "__func__", body)):
        raise TypeError(f"flow {flow_id!r}: {name} must be an `async def` function of (flow, state)")
    check_bound(limits.get("max_concurrency"))
    _check_parameters(f"flow {flow_id!r}", body)
    contract = infer_contract("flow", flow_id, body, schemas, scope)
    return FlowFunction(flow_id, body, contract, **limits)


def _check_parameters(name: str, body: Any) -> None:
    if callable(body):  # infer_contract() refuses a classmethod.
        check_arguments(name, body, ("flow", "state"))


#: Makes a flow of an async function of ``(flow, state)``.
FlowDecorator: TypeAlias = Callable[[Callable[[Flow, In], Coroutine[Any, Any, Out]]], FlowFunction[In, Out]]


class AnnotatedFlowDecorator(Protocol):
    """Makes a flow of an async function of ``(flow, state)``, with the classes of its annotations."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


@overload
def stroma_flow(body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...
@overload
def stroma_flow(
    name: str | None = None, *, input: type[In], output: type[Out], **limits: Unpack[FlowLimits]
) -> FlowDecorator[In, Out]: ...
@overload
def stroma_flow(name: str | None = None, **limits: Unpack[FlowLimits]) -> AnnotatedFlowDecorator: ...
def stroma_flow(
    name: str | Callable[..., Any] | None = None,
    *,
    input: type[BaseModel] | None = None,
    output: type[BaseModel] | None = None,
    **limits: Unpack[FlowLimits],
) -> Any:
    """Make a flow of an async function of ``(flow, state)``: a pipeline that decides in plain Python.

    Args:
        name: name of the flow in stores, metrics and spans. Default: the name of the function; then
            ``@stroma_flow`` needs no parentheses.
        input: pydantic model of its input. Default: the annotation of ``state``.
        output: pydantic model of its output. Default: the annotation of the returned value.
        limits: see FlowLimits.
    """
    if name is not None and not isinstance(name, str):
        return define_flow(None, name, (input, output), limits, sys._getframe(1))
    return lambda body: define_flow(name, body, (input, output), limits, sys._getframe(1))
