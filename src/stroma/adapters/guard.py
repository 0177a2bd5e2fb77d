"""The guard: callables of any framework as steps of a run, executed by the same engine.

::

    guard = Guard(StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=50_000)))

    @guard.step("search", output=Hits)
    def search(query: str) -> dict: ...

    with guard.run() as run:
        search("...")                      # called as before, in the same thread, with the same result
    run.stopped                            # the Failure that stopped it, or None

A guarded callable has the signature, the return value and the kind of what it wraps: a function, a coroutine
function, a generator function or an async one. Calls inside other guarded calls are their children.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, ParamSpec, TypeAlias, TypeVar, cast

from pydantic import BaseModel

from stroma.adapters._guarded_call import Call, Kind, wrapped
from stroma.adapters._guarded_run import ACTIVE, GuardedRun
from stroma.adapters._patches import restore
from stroma.adapters._state_views import View, arguments_of, first_argument, violation
from stroma.adapters._step import Control, GuardedStep
from stroma.checkpoint.decisions import ENDED
from stroma.contracts.contract import ContractRegistry, NodeContract, check_id
from stroma.contracts.node import gives_coroutine
from stroma.contracts.untyped import UntypedState
from stroma.engine.config import check_label
from stroma.engine.context import ReliabilityContext
from stroma.failures.errors import RunCancelled
from stroma.failures.failure import Failure, causes
from stroma.runner.runner import StromaRunner

__all__ = [
    "Contracts",
    "Control",
    "Guard",
    "GuardedRun",
    "GuardedStep",
    "RunCancelled",
    "UnknownNode",
    "what_stopped",
]

P = ParamSpec("P")
R = TypeVar("R")

#: Where a guarded callable keeps its guard.
_GUARD: Final = "_stroma_guarded"
_CONTRACT: Final = "_stroma_guarded_contract"
#: How many runs that have ended the default store has at most.
KEPT_RUNS: Final = 100
#: Contracts by the name that a framework has for a node or tool; a pair is the schemas of its input and
#: output.
Contracts: TypeAlias = Mapping[str, NodeContract[Any, Any] | tuple[type[BaseModel], type[BaseModel]]]


class UnknownNode(ValueError):
    """A contract names a node or tool that the framework does not have.

    Where: the function that attaches a guard to a graph, flow or agent.
    Cause: a name is misspelt, or belongs to another graph; its contract would never be checked.
    Fix: use one of the names in the message.
    """


class Guard:
    """Makes steps of callables. Safe to share between tasks, threads and event loops.

    ``target``: the runner whose registry, store and config its runs use, or the context of a run that the
    steps belong to. Outside of :meth:`run` all steps belong to one run, which lasts as long as the guard and
    has one budget.
    """

    def __init__(self, target: StromaRunner[Any] | ReliabilityContext | None = None) -> None:
        if isinstance(target, ReliabilityContext):
            self.registry: ContractRegistry = target.registry
            self._own: GuardedRun | None = GuardedRun(self, target, ends=False)
            self.runner: StromaRunner[Any] | None = None
        else:
            self.runner = StromaRunner.quick() if target is None else target
            self.registry, self._own = self.runner.registry, None
        self.open_runs: list[GuardedRun] = []
        #: Classes that an adapter has made for this guard.
        self.classes: dict[Any, type[Any]] = {}
        #: The ids of runs that have ended in a store that nobody has asked for, the oldest first.
        self._ended: deque[str] = deque()
        self._lock = threading.Lock()
        self._last: GuardedRun | None = None

    def __deepcopy__(self, _: Any) -> Guard:
        """Return the guard itself: a copy of what it guards has the same budget."""
        return self

    # ------------------------------------------------------------------ runs

    def run(
        self,
        input: Any = None,
        *,
        run_id: str | None = None,
        pipeline: str | None = None,
        conversation: str | None = None,
        user: str | None = None,
    ) -> GuardedRun:
        """Return a run for the calls inside ``with guard.run():`` or ``async with guard.run():``.

        ``input`` is its initial state for the journal and the hooks; any value is accepted. ``conversation``,
        ``user``: see RunConfig.
        """
        if self.runner is None:
            raise RuntimeError(
                "this guard belongs to the run of its context; create another one with Guard(runner)"
            )
        config = self.runner.config
        update: dict[str, Any] = {
            "run_id": config.take_run_id() if run_id is None else check_id(run_id, "run id")
        }
        if pipeline is not None:
            update["pipeline"] = check_id(pipeline, "pipeline name")
        if conversation is not None:
            update["conversation"] = check_label(conversation, "conversation")
        if user is not None:
            update["user"] = check_label(user, "user")
        config = config.model_copy(update=update)
        if config.events == "store":
            from stroma.runner.follow import with_event_log  # Not loaded by most runs.

            config = with_event_log(config)
        ctx = ReliabilityContext.for_run(config, self.registry, self.runner.checkpoint_manager)
        return GuardedRun(self, ctx, input, ends=True)

    def over(
        self, start: Callable[[], Iterable[Any]], input: Any = None, *, is_continuation: bool = False
    ) -> Iterator[Any]:
        """Iterate over the parts of a framework's result as a run, or as part of this guard's current run.

        ``is_continuation``: see :class:`GuardedRun`.
        """
        return iter(start()) if self.inside else self.begin(input, is_continuation).over(start)

    def aover(
        self, start: Callable[[], AsyncIterable[Any]], input: Any = None, *, is_continuation: bool = False
    ) -> AsyncIterator[Any]:
        """Do the same as :meth:`over` for an async framework."""
        return aiter(start()) if self.inside else self.begin(input, is_continuation).aover(start)

    def begin(self, input: Any, is_continuation: bool) -> GuardedRun:
        """Return a run as :meth:`run` does. ``is_continuation``: see :class:`GuardedRun`."""
        run = self.run(input)
        run.is_continuation = is_continuation
        return run

    def each_call(
        self,
        func: Callable[P, R],
        input: View,
        is_continuation: Callable[[tuple[Any, ...]], bool] = lambda _: False,
    ) -> Callable[P, R]:
        """Return a function each call of which is a run, or part of the current run of this guard.

        ``is_continuation(args)``: see :class:`GuardedRun`.
        """
        called: Callable[..., Any] = func

        async def arun(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return await called(*args, **kwargs)
            async with self.begin(input(args, kwargs), is_continuation(args)):
                return await called(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return called(*args, **kwargs)
            with self.begin(input(args, kwargs), is_continuation(args)):
                return called(*args, **kwargs)

        wrapped = functools.update_wrapper(arun if gives_coroutine(func) else run, func)
        return cast("Callable[P, R]", self.mark(wrapped))

    @property
    def current(self) -> GuardedRun:
        """The run that a step called here belongs to."""
        for run in reversed(ACTIVE.get()):
            if run.guard is self and not run.ended:
                return run
        # Frameworks call from threads without the context of their caller: the only open run is meant.
        open_runs = [run for run in self.open_runs if not run.ended]
        if len(open_runs) == 1:
            return open_runs[0]
        if self._own is None:
            own = self.run()
            own.ends = False
            self._own = self._own or own
        return self._own

    @property
    def inside(self) -> bool:
        """True inside a run of this guard, to which a framework's call then belongs."""
        return self.runner is None or any(run.guard is self and not run.ended for run in ACTIVE.get())

    @property
    def stopped(self) -> Failure | None:
        """The failure that stopped the current run, else the last one that ended; None without a failure."""
        if self.inside or self._last is None:
            return self.current.stopped
        return self._last.stopped

    @property
    def last(self) -> GuardedRun | None:
        """The run that ended last."""
        return self._last

    def ended(self, run: GuardedRun) -> None:
        """Take a run that has ended, before the store has its end."""
        self._last = run

    def forget_old(self, run: GuardedRun) -> None:
        """Delete the run that ended ``KEPT_RUNS`` ends ago from a store that nobody has asked for."""
        store = None if self.runner is None else self.runner.checkpoint_manager.store
        if not getattr(store, "is_default", False) or run.result.status not in ENDED:
            return
        with self._lock:
            with contextlib.suppress(ValueError):
                self._ended.remove(run.ctx.run_id)
            self._ended.append(run.ctx.run_id)
            old = self._ended.popleft() if len(self._ended) > KEPT_RUNS else None
        if old is not None:
            cast("Any", store).delete_now(old)

    def detach(self) -> None:
        """Restore the classes of frameworks that were changed for this guard. Safe to call twice.

        Adapters change them where no object can be attached: for agents inside agents, say. A change that
        another guard needs stays. What was attached itself stays attached, and its calls are steps.
        """
        restore(self)

    # ------------------------------------------------------------------ steps

    def wrap(
        self,
        step_id: str,
        func: Callable[P, R],
        *,
        kind: Kind | None = None,
        input_view: View | None = None,
        **options: Any,
    ) -> Callable[P, R]:
        """Return the callable as a step; options are the fields of :class:`Step`, all of which have defaults.

        Input is by default the arguments, by the names of the parameters. ``kind`` states how it is called,
        where inspection cannot tell. Raises TypeError for an object that is not callable, ValueError for an
        invalid id.
        """
        if isinstance(func, (staticmethod, classmethod)):  # The decorator stands above theirs.
            inner = self.wrap(step_id, func.__func__, kind=kind, input_view=input_view, **options)
            return cast("Callable[P, R]", type(func)(inner))
        if not callable(func):
            raise TypeError(f"{func!r} cannot be a step: it is not callable")
        step = GuardedStep(
            check_id(step_id, "step id"), input_view=input_view or arguments_of(func), **options
        )
        self.registry.step_ids.add(step_id)
        wrapper = wrapped(lambda: self.current, step, func, kind)
        # inspect.signature() follows __wrapped__. A __signature__ would hold `self`, and those who wrap a
        # method copy it.
        functools.update_wrapper(wrapper, func, updated=("__dict__",) if inspect.isroutine(func) else ())
        return cast("Callable[P, R]", self.mark(wrapper, step.contract))

    def call(self, step: GuardedStep, func: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call a function once as a step, for code that creates steps dynamically."""
        return cast("R", Call(self.current, step, func, args, kwargs).call())

    async def acall(
        self, step: GuardedStep, func: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any
    ) -> R:
        """Await a coroutine function once as a step."""
        return cast("R", await Call(self.current, step, func, args, kwargs).acall())

    def step(
        self,
        step_id: str,
        *,
        input: type[BaseModel] | None = None,
        output: type[BaseModel] | None = None,
        effect: bool = False,
        reconcile: Callable[[Any, str], Any] | None = None,
        **options: Any,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function as :meth:`wrap` does; each side of the contract is optional.

        ``effect``, ``reconcile``: for a function that must not be called twice blindly, see NodeContract.
        Where its output is stated or recorded, the caller gets that, as an instance of ``output``, or as
        plain data without one.
        """
        contract = None
        if input is not None or output is not None or effect or reconcile is not None:
            contract = contract_for(step_id, (input, output), effect=effect, reconcile=reconcile)

        def decorate(func: Callable[P, R]) -> Callable[P, R]:
            return self.wrap(step_id, func, contract=contract, **options)

        return decorate

    def wrap_step(
        self, step_id: str, func: Callable[..., Any], contract: NodeContract[Any, Any] | None = None
    ) -> Callable[..., Any]:
        """Return a function of ``(state, ...)`` as a step: its input is its first argument."""
        return self.wrap(step_id, func, contract=contract, input_view=first_argument)

    def mark(self, func: Any, contract: NodeContract[Any, Any] | None = None) -> Any:
        """Mark a function as guarded by this guard, with a contract."""
        func.__dict__[_GUARD] = self
        func.__dict__[_CONTRACT] = contract
        return func

    def has(self, func: Any, contract: NodeContract[Any, Any] | None = None) -> bool:
        """Return True if a function is guarded by this guard.

        Raises ValueError if another guard guards it, or this one without the contract that it is to have.
        """
        guard = getattr(func, _GUARD, None)
        if not isinstance(guard, Guard):  # Some objects have every attribute.
            return False
        if contract is not None and guard is self and getattr(func, _CONTRACT, None) != contract:
            raise ValueError(
                f"{contract.node_id!r} is already attached to this guard, with another contract or "
                "without one; pass all "
                "contracts when you attach it first, or create the object again"
            )
        if guard is not self:
            raise ValueError(
                f"{func!r} is already guarded by another guard; attach only one guard, or create "
                "the object again"
            )
        return True

    def contracts(
        self, contracts: Contracts | None, known: Iterable[str], what: str
    ) -> dict[str, NodeContract[Any, Any]]:
        """Return contracts by name. Raises UnknownNode for a name that is not ``known``."""
        names = list(known)
        for name in contracts or {}:
            if name not in names:
                have = ", ".join(map(repr, sorted(names))) or "none"
                raise UnknownNode(f"contract of unknown {what} {name!r}; known: {have}")
        return {name: contract_for(name, contract) for name, contract in (contracts or {}).items()}

    # ------------------------------------------------------------------ loops and turns of other code

    def on_tool_call(self, tool_name: str, args: dict[str, Any], ctx: ReliabilityContext) -> dict[str, Any]:
        """Return the arguments if the budget allows the call and they satisfy the tool's contract.

        Raises BudgetExceeded, ContractViolation.
        """
        ctx.cost_tracker.check_budget(ctx.budget, tool_name)
        _check(ctx, tool_name, "input", args)
        return args

    def on_tool_result(self, tool_name: str, result: Any, ctx: ReliabilityContext) -> Any:
        """Return the result if it satisfies the tool's contract. Raises ContractViolation."""
        _check(ctx, tool_name, "output", result)
        return result

    def on_turn_start(self, turn_id: str, message: Any, ctx: ReliabilityContext) -> Any:
        """Return the message if the budget allows the turn and it satisfies the turn's contract."""
        ctx.cost_tracker.check_budget(ctx.budget, turn_id)
        _check(ctx, turn_id, "input", message)
        return message

    def on_turn_end(self, turn_id: str, result: Any, ctx: ReliabilityContext) -> Any:
        """Return the answer if it satisfies the turn's contract. Raises ContractViolation."""
        _check(ctx, turn_id, "output", result)
        return result


def _check(ctx: ReliabilityContext, name: str, direction: Literal["input", "output"], value: Any) -> None:
    contract = ctx.registry.find(name)
    broken = None if contract is None else violation(name, contract, direction, value)
    if broken is not None:
        raise broken


def what_stopped(error: BaseException | None) -> BaseException | None:
    """Return the error of Stroma (a violated contract, a spent budget ...) behind a framework's, or None."""
    return next((cause for cause in causes(error) if type(cause).__module__.startswith("stroma.")), None)


def contract_for(
    name: str,
    contract: NodeContract[Any, Any] | tuple[type[BaseModel] | None, type[BaseModel] | None],
    **effect: Any,
) -> NodeContract[Any, Any]:
    """Return a contract for a contract or a pair of schemas; None is any value. ``effect``: other fields."""
    if isinstance(contract, NodeContract):
        return contract
    input_schema, output_schema = contract
    return NodeContract(
        node_id=name,
        input_schema=input_schema or UntypedState,
        output_schema=output_schema or UntypedState,
        **effect,
    )
